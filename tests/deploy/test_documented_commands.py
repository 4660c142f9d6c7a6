"""Every command that the documentation names exists: targets, subcommands, flags, scripts, objects.

What can be parsed is parsed by the very programs, without being run. What belongs to programs that
are not here (kubectl's own flags, flyctl, terraform) is not; docs/operations.md says what was never
run.
"""

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import takewhile
from typing import Any

import pytest
import typer
import typer.core
from kimberly.cli import app as kimberly

from deploy.__main__ import app as deploy
from deploy.manifests import Manifests
from deploy.rendering import render, targets
from deploy.secrets import new_values
from local.__main__ import app as local
from local.layout import CHECKOUT
from server.__main__ import app as server
from tests.needs import needs_kustomize

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
    command: Any = typer.main.get_command(APPS[module])
    name: str | None = module
    rest = list(told)
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

# What runbooks have kubectl do: nothing that loses anything.
VERBS = {"create", "describe", "exec", "get", "logs", "port-forward", "rollout", "scale", "top"}
KINDS = {
    "certificate": "Certificate",
    "cronjob": "CronJob",
    "deployment": "Deployment",
    "secret": "Secret",
    "service": "Service",
    "statefulset": "StatefulSet",
}


@cache
def rendered() -> tuple[Manifests, ...]:
    return tuple(Manifests.parse(render(path)) for path in targets().values())


@cache
def named(kind: str) -> frozenset[str]:
    """Return the names of what some cluster has of a kind."""
    if kind == "Secret":
        # Kept beside the manifests, or made by cert-manager.
        certificates = (each for one in rendered() for each in one.of_kind("Certificate"))
        made = (each["spec"]["secretName"] for each in certificates)
        return frozenset((*new_values("staging"), *made))
    return frozenset(name for each in rendered() for name in each.named(kind))


def problems_of(words: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a command of kubectl's, but for its own flags."""
    told = list(words[1:])
    inside = told[told.index("--") + 1 :] if "--" in told else []
    told = told[: told.index("--")] if inside else told
    if told[:2] == ["-n", "cert-manager"]:
        # Others' own namespace.
        return
    ignored = ("history", "restart", "pod", "-it", "-o", "jsonpath={.data.ca\\.crt}")
    yield from _unknown([word for word in told if word not in ignored])
    found = module_of(Command("", tuple(inside), is_whole=True)) if inside else None
    if found and (problem := refusal(*found)):
        yield problem


def _unknown(words: Sequence[str]) -> Iterator[str]:
    for at, word in enumerate(words):
        kind, slash, name = word.removeprefix("--from=").partition("/")
        if slash and kind in KINDS and name not in named(KINDS[kind]):
            yield f"there is no {word}"
        if word in KINDS:
            lost = [each for each in _names(words[at + 1 :]) if each not in named(KINDS[word])]
            yield from (f"there is no {word} {each}" for each in lost)
        if word == "-c" and words[at + 1] not in _containers(words):
            yield f"there is no container {words[at + 1]}"
        if word == "-l" and not _selected(words[at + 1]):
            yield f"{words[at + 1]} selects nothing"


def _names(words: Sequence[str]) -> Iterator[str]:
    yield from takewhile(lambda word: re.fullmatch(r"[a-z][\w-]*", word), words)


def _containers(words: Sequence[str]) -> set[str]:
    """Return the containers of the pods that a command names, such as deployment/memory."""
    owners = {word.lower() for word in words}
    pods = [pod for each in rendered() for pod in each.pods if pod.name.lower() in owners]
    return {container.spec["name"] for pod in pods for container in pod.containers}


def _selected(selector: str) -> bool:
    key, _, value = selector.partition("=")
    if selector.startswith("!"):
        return True
    return any(pod.labels.get(key) == value for each in rendered() for pod in each.pods)


@needs_kustomize
def test_every_object_that_kubectl_is_asked_of_exists() -> None:
    asked = starting_with("kubectl")
    assert len(asked) > 40
    found = [f"{command}: {each}" for command in asked for each in problems_of(command.words)]
    assert found == []


def test_runbooks_lose_nothing_and_name_the_namespace() -> None:
    for command in starting_with("kubectl"):
        if command.document == "docs/runbooks.md":
            assert command.words[1] == "-n", str(command)
            assert command.words[2] in ("kimberly", "cert-manager"), str(command)
            assert command.words[3] in VERBS, str(command)


@needs_kustomize
@pytest.mark.parametrize(
    "line",
    [
        "kubectl -n kimberly logs deployment/scorer",
        "kubectl -n kimberly describe certificate identity-scorer",
        "kubectl -n kimberly rollout restart deployment auth scorer",
        "kubectl -n kimberly get secret scorer",
        "kubectl -n kimberly get pods -l app.kubernetes.io/name=scorer",
        "kubectl -n kimberly logs deployment/memory -c proxy",
        "kubectl -n kimberly create job --from=cronjob/scorer first",
        "kubectl -n kimberly exec deployment/auth -c app -- python3 -m server score",
    ],
)
def test_a_command_that_is_wrong_would_be_noticed(line: str) -> None:
    assert list(problems_of(line.split())) != []


# --- what was not run ----------------------------------------------------------------------------


def test_a_chapter_that_acts_on_what_is_not_here_says_what_was_not_run() -> None:
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    for chapter in text.split("\n## ")[1:]:
        acts = re.search(
            rf"`(?:{'|'.join(OTHERS)}) |^ *(?:{'|'.join(OTHERS)}) ", chapter, re.MULTILINE
        )
        if acts:
            assert "*Not run*" in chapter, chapter.splitlines()[0]
