"""Every command that the documentation names exists: targets, subcommands, flags, scripts, objects.

What can be parsed is parsed by the very programs, without being run. What belongs to programs that
are not here (kubectl's own flags, flyctl, terraform) is not; docs/operations.md says what was never
run.
"""

import json
import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
import typer
import typer.core
from kimberly.cli import app as kimberly

from deploy.__main__ import app as deploy
from deploy.manifests import Document, Manifests
from deploy.rendering import TOOLS, render, targets
from local.__main__ import app as local
from local.layout import CHECKOUT
from server.__main__ import app as server

DOCUMENTS = (
    "README.md",
    "secrets/README.md",
    "envoy/README.md",
    *(str(path.relative_to(CHECKOUT)) for path in sorted(CHECKOUT.glob("docs/*.md"))),
)
APPS = {"server": server, "deploy": deploy, "local": local, "kimberly.cli": kimberly}
MISSING = ("Missing argument", "Missing option", "Missing command")
USAGE: Any = typer.BadParameter.__base__
"""What every command line raises that is not understood."""
OTHERS = ("docker", "flyctl", "kind", "kubectl", "ssh", "terraform")
"""Programs of others that act on what is not here."""

_BLOCK = re.compile(r"^( *)```(?:ba)?sh\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
_ANY_BLOCK = re.compile(r"^ *```.*?^ *```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^    (make .*)$", re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a document."""

    document: str
    words: tuple[str, ...]
    is_whole: bool
    """Whether it could be typed as it stands. In prose, what is obvious is left out."""

    def __str__(self) -> str:
        return f"{self.document}: {' '.join(self.words)}"


def commands_of(document: str) -> Iterator[Command]:
    text = (CHECKOUT / document).read_text()
    for _, block in _BLOCK.findall(text):
        script = _HERE_DOCUMENT.sub("", block).replace("\\\n", " ")
        for line in script.splitlines():
            yield from split(document, line, is_whole=True)
    for line in _INDENTED.findall(text):
        yield from split(document, line, is_whole=True)
    for span in _SPAN.findall(_ANY_BLOCK.sub("", text)):
        yield from split(document, span, is_whole=False)


def split(document: str, line: str, *, is_whole: bool) -> Iterator[Command]:
    """Split a line at pipes and the like, and leave out variables and placeholders."""
    try:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        # A part of something longer, such as a string over several lines.
        return
    simple: list[str] = []
    # Where its output goes is none of the command's words.
    words = [word for at, word in enumerate(words) if ">" not in (word, words[at - 1])]
    for word in (*words, ";"):
        if set(word) <= set("|&;"):
            if simple:
                yield Command(document, tuple(simple), is_whole)
            simple = []
        elif "…" not in word and (simple or not _ASSIGNMENT.fullmatch(word)):
            simple.append(word)


COMMANDS = [command for document in DOCUMENTS for command in commands_of(document)]


def starting_with(*programs: str) -> list[Command]:
    return [command for command in COMMANDS if command.words[0] in programs]


# --- make ----------------------------------------------------------------------------------------


def test_every_target_of_make_exists() -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    made = set(re.findall(r"^([\w./ %-]+?):(?!=)", makefile, re.MULTILINE))
    known = {name for names in made for name in names.split()}
    variables = set(re.findall(r"^(\w+) \?=", makefile, re.MULTILINE))
    named = starting_with("make")
    assert len(named) > 20
    for command in named:
        for word in command.words[1:]:
            name, is_variable, _ = word.partition("=")
            assert name in (variables if is_variable else known), str(command)


# --- ours ----------------------------------------------------------------------------------------


def module_of(command: Command) -> tuple[str, tuple[str, ...]] | None:
    """Return the module that a command runs, and what that is told."""
    words = command.words
    if words[0] == "kimberly":
        return "kimberly.cli", words[1:]
    if words[0] == "deploy" and len(words) > 1:
        return "deploy", words[1:]
    if re.search(r"(^|/)python3?$", words[0]) and words[1:2] == ("-m",):
        return words[2], words[3:]
    return None


RUN = [(command, *found) for command in COMMANDS if (found := module_of(command))]


@pytest.mark.parametrize(("command", "module", "told"), RUN, ids=lambda each: str(each)[:60])
def test_every_module_subcommand_and_flag_exists(
    command: Command, module: str, told: tuple[str, ...]
) -> None:
    assert find_spec(module), str(command)
    if module in APPS:
        problem = refusal(module, told)
        if problem and not command.is_whole:
            problem = "" if problem.startswith(MISSING) else problem
        assert not problem, f"{command}: {problem}"


def refusal(module: str, told: tuple[str, ...]) -> str:
    """Return why a command line is not understood; it is parsed and not run."""
    command, name, rest = typer.main.get_command(APPS[module]), module, list(told)
    parent: Any = None
    try:
        while True:
            parent = command.make_context(name, rest, parent=parent)
            remaining = [*parent._protected_args, *parent.args]
            if not (remaining and isinstance(command, typer.core.TyperGroup)):
                return ""
            name, command, rest = command.resolve_command(parent, remaining)
    except USAGE as error:
        return str(error.format_message())


def test_a_flag_that_does_not_exist_would_be_seen() -> None:
    assert refusal("server", ("backup", "restore", "--until", "now")).startswith("No such option")
    assert refusal("server", ("backup", "undo")).startswith("No such command")
    assert refusal("server", ("set-plan", "usr_1")).startswith(MISSING)
    assert refusal("server", ("backup", "restore", "--at", "now", "--unsigned")) == ""


def test_every_path_exists() -> None:
    """Scripts, and files of the checkout that commands read."""
    folders = "deploy|images|kustomize|terraform|fly|secrets|requirements|observability|local|docs"
    path = re.compile(rf"(?:{folders})/[\w./-]+")
    for command in COMMANDS:
        for word in command.words:
            if path.fullmatch(word) and not re.search(
                r"[A-Z]{3}|\.enc\.|\.recipients|backend\.hcl|tfvars", word
            ):
                place = CHECKOUT / word
                assert place.exists(), str(command)
                if place.suffix == ".sh":
                    assert place.stat().st_mode & 0o111, f"{word} cannot be executed"


def test_every_script_of_deploy_says_how_it_is_used() -> None:
    for script in (*CHECKOUT.glob("deploy/*.sh"), *CHECKOUT.glob("images/*.sh")):
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        assert any(script.name in str(command) for command in COMMANDS) or (
            script.name in "".join(path.read_text() for path in CHECKOUT.glob(".github/*/*.yml"))
            or script.name in "".join(path.read_text() for path in CHECKOUT.glob("images/*.sh"))
            or script.name in "".join(path.read_text() for path in CHECKOUT.glob("tests/*/*.py"))
        ), f"nobody says when {script.name} is run"


# --- what kubectl is asked of --------------------------------------------------------------------

KINDS = {
    "deployment": "Deployment",
    "statefulset": "StatefulSet",
    "service": "Service",
    "cronjob": "CronJob",
    "job": "Job",
}


@cache
def cluster() -> tuple[Document, ...]:
    """Return everything that some overlay puts into a cluster."""
    names = ("local", "staging")
    return tuple(
        document
        for name in names
        for document in Manifests.parse(render(targets()[name])).documents
    )


def exists(kind: str, name: str) -> bool:
    return any(
        document["kind"] == kind and document["metadata"]["name"] == name for document in cluster()
    )


@pytest.mark.skipif(not TOOLS.is_dir(), reason="make build/deploy/installed brings kustomize")
def test_every_object_that_kubectl_is_asked_of_exists() -> None:
    # Those of operators are installed by their own instructions.
    ours = [each for each in starting_with("kubectl") if "kimberly" in each.words]
    named = [(each, *pair) for each in ours for pair in objects_of(each.words)]
    assert len(named) > 10
    for command, kind, name in named:
        assert exists(kind, name), f"{command}: there is no {kind} {name}"
    for command in ours:
        for before, word in pairwise(command.words):
            label, _, value = word.partition("=")
            if before == "-l" and label == "app.kubernetes.io/name":
                assert f'"{label}": "{value}"' in json.dumps(cluster()), str(command)
            if before == "-c":
                assert word in containers(command.words), str(command)


def objects_of(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the kinds and names that kubectl is told, but for jobs that a command makes."""
    for at, word in enumerate(words):
        kind, _, name = word.removeprefix("--from=").partition("/")
        if kind in KINDS and name and kind != "job":
            yield KINDS[kind], name
        if word == "deployment" and "restart" in words:
            yield from (("Deployment", each) for each in words[at + 1 :])


def containers(words: Sequence[str]) -> set[str]:
    """Return the names of the containers of what a command names."""
    name = next(word.partition("/")[2] for word in words if word.startswith("deployment/"))
    return {
        container["name"]
        for document in cluster()
        if document["kind"] == "Deployment" and document["metadata"]["name"] == name
        for part in ("initContainers", "containers")
        for container in document["spec"]["template"]["spec"].get(part, ())
    }


# --- what was not run ----------------------------------------------------------------------------


def test_a_chapter_that_acts_on_what_is_not_here_says_what_was_not_run() -> None:
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    for chapter in text.split("\n## ")[1:]:
        acts = re.search(
            rf"`(?:{'|'.join(OTHERS)}) |^ *(?:{'|'.join(OTHERS)}) ", chapter, re.MULTILINE
        )
        if acts:
            assert "*Not run*" in chapter, chapter.splitlines()[0]
