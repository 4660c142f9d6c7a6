"""Alerts: each fires and is quiet in a test of promtool's, and leads to text one can follow."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import kimberly.cli
import pytest
import typer
import yaml
from typer.main import get_command

import deploy.__main__
import local.__main__
import server.__main__
from deploy import rendering, tools
from deploy.manifests import Manifests
from deploy.slos import OBSERVABILITY, RULES, RUNBOOKS
from local.layout import CHECKOUT
from tests.deploy import expressions
from tests.needs import needs_kustomize, needs_prometheus

PROMTOOL = tools.PROMETHEUS / "promtool"
TESTS = sorted((OBSERVABILITY / "tests").glob("*.yaml"))
TEXT = (CHECKOUT / "docs" / "runbooks.md").read_text()
SECTIONS: Final[dict[str, str]] = dict(re.findall(r"(?ms)^## (\w+)\n(.*?)(?=^#|\Z)", TEXT))
SEVERITIES = {"page", "ticket", "notice"}


def by_hand() -> list[dict[str, Any]]:
    groups = yaml.safe_load((RULES / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expectations() -> Iterator[tuple[str, bool]]:
    """Yield each alert that a test looks at, and whether it is to fire."""
    for file in TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for each in test["promql_expr_test"]:
                name = re.search(r'alertname="(\w+)"', each["expr"])
                assert name is not None, each
                yield name[1], bool(each["exp_samples"])


def verdict(file: Path) -> tuple[int, str]:
    """Return the status of promtool for a file of tests, and what it says."""
    command = [str(PROMTOOL), "test", "rules", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


# --- promtool ----------------------------------------------------------------------------------


@needs_prometheus
def test_alerts_fire_and_are_quiet_when_they_should_be() -> None:
    for status, said in map(verdict, TESTS):
        assert status == 0, said


@pytest.mark.parametrize("fires", [True, False])
def test_no_alert_is_left_out_of_those_tests(fires: bool) -> None:
    looked_at = {name for name, expected in expectations() if expected is fires}
    assert looked_at == {rule["alert"] for rule in by_hand()}


@needs_prometheus
def test_an_alert_that_never_fires_would_be_noticed(tmp_path: Path) -> None:
    """Every expectation of an alert fails when no rule fires: nothing else makes them hold."""
    rules = yaml.safe_load((RULES / "alerts.yaml").read_text())
    for group in rules["groups"]:
        for rule in group["rules"]:
            rule["expr"] = f"({rule['expr']}) and on () vector(1) < 0"
    (tmp_path / "rules").mkdir()
    (tmp_path / "rules" / "alerts.yaml").write_text(yaml.safe_dump(rules))
    shutil.copytree(OBSERVABILITY / "tests", tmp_path / "tests")
    done = [verdict(file) for file in sorted((tmp_path / "tests").iterdir())]
    failed = sum(said.count("got: nil") for _, said in done)
    assert failed == sum(fires for _, fires in expectations())


# --- what an alert says ------------------------------------------------------------------------


@pytest.mark.parametrize("alert", expressions.alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_how_urgent_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in SEVERITIES
    assert alert["annotations"]["summary"].endswith(".")
    name = alert["alert"]
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOKS}#{name.lower()}"
    assert name in SECTIONS


def test_every_section_is_about_an_alert() -> None:
    assert SECTIONS.keys() == {alert["alert"] for alert in expressions.alerts()}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_says_what_to_look_at_what_to_do_and_when_it_is_over(name: str) -> None:
    for part in ("Means", "Look", "Do", "Over"):
        assert f"**{part}**" in SECTIONS[name]


# --- commands of the runbooks ------------------------------------------------------------------

# What kubectl is asked to do: nothing that loses anything.
VERBS = {"create", "describe", "exec", "get", "logs", "port-forward", "rollout", "scale", "top"}


def commands() -> list[str]:
    """Return every command of the runbooks, of its blocks and of its sentences."""
    blocks = re.findall(r"(?ms)^```sh\n(.*?)^```", TEXT)
    lines = [line for block in blocks for line in block.splitlines()]
    sentences = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", TEXT))
    own = ("kubectl ", "kimberly ", "python -m ", "deploy/", "make ")
    return lines + [each for each in sentences if each.startswith(own)]


@cache
def rendered() -> list[Manifests]:
    return [Manifests.parse(rendering.render(path)) for path in rendering.targets().values()]


def is_command(app: typer.Typer, words: list[str]) -> bool:
    """Tell whether a command line of ours begins with a command that there is."""
    node: Any = get_command(app)
    for word in words:
        if not hasattr(node, "commands"):
            break
        if word not in node.commands:
            return False
        node = node.commands[word]
    return not hasattr(node, "commands")


APPS = {
    "kimberly": kimberly.cli.app,
    "server": server.__main__.app,
    "deploy": deploy.__main__.app,
    "local": local.__main__.app,
}


def is_ours(line: str) -> bool:
    """Tell whether a command that is not kubectl's is one of ours."""
    words = shlex.split(line)
    if words[0] == "make":
        return re.search(rf"(?m)^{words[1]}:", (CHECKOUT / "Makefile").read_text()) is not None
    if words[0].startswith("deploy/"):
        return (CHECKOUT / words[0]).exists()
    if words[:2] in (["python", "-m"], ["python3", "-m"]):
        return is_command(APPS[words[2]], words[3:])
    return is_command(APPS[words[0]], words[1:])


def named(kind: str) -> set[str]:
    return {name for each in rendered() for name in each.named(kind)}


KINDS = {
    "certificate": "Certificate",
    "cronjob": "CronJob",
    "deployment": "Deployment",
    "service": "Service",
    "statefulset": "StatefulSet",
}


def problems_of(line: str) -> Iterator[str]:
    """Yield what is wrong with a command of kubectl's."""
    command, _, inside = line.partition(" -- ")
    words = shlex.split(command)[1:]
    if words[:2] == ["-n", "cert-manager"]:
        # Others' own namespace.
        return
    if words[:2] != ["-n", "kimberly"]:
        yield f"{line}: in which namespace?"
        return
    if words[2] not in VERBS:
        yield f"{line}: {words[2]} is not what a runbook asks for"
    rest = [word for word in words[3:] if word not in ("history", "restart", "pod", "-it", "-o")]
    yield from _unknown(line, rest)
    if inside.startswith(("python3 -m", "kimberly")) and not is_ours(inside):
        yield f"{line}: there is no {inside}"


def _unknown(line: str, words: list[str]) -> Iterator[str]:
    for at, word in enumerate(words):
        kind, slash, name = word.removeprefix("--from=").partition("/")
        if slash and kind in KINDS and name not in named(KINDS[kind]):
            yield f"{line}: there is no {word}"
        if word in KINDS and words[at + 1] not in named(KINDS[word]):
            yield f"{line}: there is no {word} {words[at + 1]}"
        if word == "-c" and words[at + 1] not in _containers(words):
            yield f"{line}: has no container {words[at + 1]}"
        if word == "-l" and not _selected(words[at + 1]):
            yield f"{line}: {words[at + 1]} selects nothing"


def _containers(words: list[str]) -> set[str]:
    """Return the containers of the pods that a command names, such as deployment/memory."""
    owners = {word.lower() for word in words}
    pods = [pod for each in rendered() for pod in each.pods if pod.name.lower() in owners]
    return {container.spec["name"] for pod in pods for container in pod.containers}


def _selected(selector: str) -> bool:
    key, _, value = selector.partition("=")
    return any(pod.labels.get(key) == value for each in rendered() for pod in each.pods)


@needs_kustomize
def test_every_command_of_the_runbooks_can_be_typed() -> None:
    found: list[str] = []
    for line in commands():
        if line.startswith("kubectl"):
            found += problems_of(line)
        elif not is_ours(line):
            found.append(f"{line}: there is no such command")
    assert found == []


@needs_kustomize
@pytest.mark.parametrize(
    "line",
    [
        "kubectl -n kimberly logs deployment/scorer",
        "kubectl -n kimberly describe certificate identity-scorer",
        "kubectl -n kimberly get pods -l app.kubernetes.io/name=scorer",
        "kubectl -n kimberly logs deployment/memory -c proxy",
        "kubectl -n kimberly delete pods",
        "kubectl get pods",
        "kubectl -n kimberly exec deployment/auth -c app -- python3 -m server score",
    ],
)
def test_a_command_that_is_wrong_would_be_noticed(line: str) -> None:
    assert list(problems_of(line)) != []


def statements() -> list[str]:
    blocks = re.findall(r"(?ms)^```sql\n(.*?)^```", TEXT)
    return [each.strip() for block in blocks for each in block.split(";") if each.strip()]


@pytest.mark.parametrize("statement", statements())
async def test_a_statement_of_the_runbooks_is_one_of_our_schema(statement: str, owner: Any) -> None:
    async with owner.transaction(readonly=True):
        await owner.fetch(statement)
