"""The table of README.md is true: nothing is missing, and every test it names exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
ON_THE_LIST = {f"A{number}" for number in range(1, 29)}

_ROW = re.compile(r"^\| (A\d+) \|(.*)\|$", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def rows() -> dict[str, list[tuple[str, str]]]:
    """Return the tests that the table names, by the number of the abuse."""
    text = (Path(__file__).parent / "README.md").read_text()
    return {number: _TEST.findall(row) for number, row in _ROW.findall(text)}


def exists(file: str, test: str) -> bool:
    path = TESTS / file
    return path.is_file() and f"def {test}(" in path.read_text()


def test_every_abuse_on_the_list_has_a_test() -> None:
    assert {number for number, tests in rows().items() if tests} == ON_THE_LIST


def test_every_test_in_the_table_exists() -> None:
    named = {named for tests in rows().values() for named in tests}
    assert not {named for named in named if not exists(*named)}
