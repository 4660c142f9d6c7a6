"""The SQL that is written down in the server."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import server

SERVER: Final = Path(server.__file__).parent
_Function = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Statement:
    """A string that reads or writes tables."""

    place: str
    """Module and function, such as auth.store.find."""
    text: str
    tables: frozenset[str]


def statements(tables: list[str]) -> Iterator[Statement]:
    """Yield every string of the server that touches one of these tables."""
    touching = re.compile(
        rf"\b(?:FROM|JOIN|INTO|UPDATE|USING)\s+(?:ONLY\s+)?({'|'.join(tables)})\b"
    )
    for path in sorted(SERVER.rglob("*.py")):
        module = ".".join(path.relative_to(SERVER).with_suffix("").parts)
        tree = ast.parse(path.read_text())
        constants = _constants(tree)
        for function, node in _strings(tree):
            text = _text(node, constants) or ""
            if touched := frozenset(touching.findall(text)):
                yield Statement(f"{module}.{function}", text, touched)


def _strings(tree: ast.AST, function: str = "-") -> Iterator[tuple[str, ast.expr]]:
    """Yield strings, whole, with the name of the function that they stand in."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue  # a docstring
        if isinstance(child, ast.Constant | ast.JoinedStr):
            yield function, child
        else:
            name = child.name if isinstance(child, _Function) else function
            yield from _strings(child, name)


def _constants(tree: ast.Module) -> Mapping[str, str]:
    """Return the strings that a module gives names to."""
    found: dict[str, str] = {}
    for node in tree.body:
        match node:
            case (
                ast.Assign(targets=[ast.Name(id=name)], value=value)
                | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
            ) if (text := _text(value, found)) is not None:
                found[name] = text
    return found


def _text(node: ast.expr, constants: Mapping[str, str]) -> str | None:
    """Return what a string says; of what is put into it, only the module's own constants."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part, constants) or "" for part in parts)
        case ast.FormattedValue(value=ast.Name(id=name)):
            return constants.get(name)
    return None
