"""What must be in no log, trace or metric, looked for in all that a test run leaves.

Passwords, tokens and keys are known by their look; what users said, by having been overheard on its
way to a service. `tests/conftest.py` has pytest call the hooks at the end: each test's captured
output is looked through when the test ends, logs of a mesh before they are removed and when the run
ends, its metrics before it stops, and the spans of one that is traced after that. A run in which
something is found has failed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from local.mesh import Mesh
from tests.telemetry.receiver import Receiver

_LOOKS: Final = {
    "a password": r"correct.horse.battery",
    "an access token": r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}",
    "an API key": r"\bkim_[0-9a-f]{10}_[\w-]{43}",
    # Put together, so that this file is none that holds them: `deploy secrets check`.
    "a key of age": "AGE-SECRET-" + r"KEY-1\w{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE" + " KEY-----",
}
_TOKEN: Final = re.compile(r"[\w-]{43}")
"""As refresh tokens and those that are mailed look, and the names of keys, which are no secret."""
_PLAIN: Final = re.compile(r"\w[ !#-\[\]-~]*")
"""What no log writes in another way, from its first word on."""
_WORD: Final = re.compile(r"\w+")
_BEGINNING: Final = 12
"""Characters by which what was said is looked up. Shorter texts are words that everybody says."""
_LONGEST: Final = 60
_AROUND: Final = 60
_SECRETS: Final = "secrets"
_LOGS: Final = "log"
"""What local/layout.py calls a directory of logs, and tests of pods the log of one."""


class Watch:
    """Hears what is said, and looks for it and for what opens doors."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        """What was found, and around it what stands there, by place."""
        self.looked = 0
        """How many characters were looked through."""
        self._looks = {what: re.compile(look) for what, look in _LOOKS.items()}
        self._said: dict[str, set[str]] = {}
        self._kept: set[str] = set()

    def hear(self, message: Message) -> None:
        """Remember what somebody says in a request."""
        for text in _texts(message):
            if _TOKEN.fullmatch(text):
                token = text.lstrip("-")
                self._said.setdefault(token[:_BEGINNING], set()).add(token)
                continue
            plain = _PLAIN.search(text[:_LONGEST])
            # One word is an id, a name, an address.
            if plain and " " in plain[0][:_BEGINNING] and len(plain[0]) >= _BEGINNING:
                self._said.setdefault(plain[0][:_BEGINNING], set()).add(plain[0].strip())

    def look(self, place: str, text: str) -> None:
        """Look through a text."""
        self.looked += len(text)
        for what, at in itertools.chain(self._by_look(text), self._said_in(text)):
            around = text[max(0, at - _AROUND) : at + _AROUND]
            self.found.setdefault(f"{what} in {place}", around)

    def look_into(self, directory: Path) -> None:
        """Look through the logs under a directory, for the secrets beside them too."""
        files = list(_files_under(directory))
        for secret in files:
            if secret.parent.name == _SECRETS:
                self._keep(_text_of(secret, shorter_than=1000).strip())
        for file in files:
            if _LOGS in (file.name, file.parent.name):
                self.look(str(file), _text_of(file))

    def look_at_metrics(self, mesh: Mesh) -> None:
        """Look through what every process of a mesh tells Prometheus."""
        with httpx.Client(timeout=60, trust_env=False) as client:
            for process, urls in mesh.describe()["metrics"].items():
                for url in urls:
                    self.look(f"metrics of {process}", client.get(url).text)

    def look_at_spans(self, receiver: Receiver) -> None:
        """Look through every span that processes and Envoys sent."""
        for span in receiver.spans:
            self.look(f"span {span.name} of {span.service}", span.text)

    def _keep(self, secret: str) -> None:
        if len(secret) >= 16 and "\n" not in secret:
            self._kept.add(secret)

    def _by_look(self, text: str) -> Iterator[tuple[str, int]]:
        for what, look in self._looks.items():
            yield from ((what, match.start()) for match in look.finditer(text))
        for secret in self._kept:
            if (at := text.find(secret)) >= 0:
                yield "a secret of the stores", at

    def _said_in(self, text: str) -> Iterator[tuple[str, int]]:
        if not self._said:
            return
        for match in _WORD.finditer(text):
            at = match.start()
            for said in self._said.get(text[at : at + _BEGINNING], ()):
                if text.startswith(said, at):
                    yield f"what was said ({said!r})", at


def _files_under(directory: Path) -> Iterator[Path]:
    """Yield all files that stay: processes that still end take away their own meanwhile."""
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names)


def _text_of(file: Path, *, shorter_than: float = math.inf) -> str:
    """Return what a file holds; nothing if it is none, too long, or gone by now."""
    try:
        if file.is_file() and file.stat().st_size < shorter_than:
            return file.read_text(errors="replace")
    except FileNotFoundError:
        pass
    return ""


WATCH: Final = Watch()
"""Of this process, which is one run of tests."""


def overheard(channel: grpc.aio.Channel) -> grpc.aio.Channel:
    """Have what is sent through a channel heard; returns the channel."""
    for kind in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
        setattr(channel, kind, _overheard(getattr(channel, kind)))
    return channel


def _overheard(begin: Callable[..., Any]) -> Callable[..., Any]:
    def hearing(
        path: str,
        request_serializer: Callable[[Any], bytes] | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        def serialize(message: Any) -> bytes:
            if isinstance(message, Message):
                WATCH.hear(message)
            sent: bytes = request_serializer(message) if request_serializer else message
            return sent

        return begin(path, serialize, *rest, **options)

    return hearing


def _texts(message: Message) -> Iterator[str]:
    """Yield every text in a message, and in those within it."""
    for field, value in message.ListFields():
        values: Iterable[Any] = value if _is_many(value) else (value,)
        if field.type == FieldDescriptor.TYPE_STRING:
            yield from (each for each in values if isinstance(each, str))
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            for each in values:
                if isinstance(each, Message):
                    yield from _texts(each)


def _is_many(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


# --- what pytest calls -------------------------------------------------------------------------

_ON: Final = pytest.StashKey[bool]()
_FOUND: Final = "found"
"""Under this name, what one of several processes has found reaches the one that started them."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Look through what is removed before it is."""
    stash = session.config.stash
    stash[_ON] = True

    def before(event: str, arguments: tuple[Any, ...]) -> None:
        # Relative to another directory: in the middle of a removal that was already seen.
        if event == "shutil.rmtree" and stash[_ON] and arguments[1] is None:
            WATCH.look_into(Path(arguments[0]))

    sys.addaudithook(before)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Look through what a test and the services in its process have put out."""
    if report.when == "teardown":
        for name, text in report.sections:
            WATCH.look(f"{name} of {report.nodeid}", text)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Look through the logs that are left, and fail the run if anything was found ever."""
    session.config.stash[_ON] = False
    factory = getattr(session.config, "_tmp_path_factory", None)
    if factory is not None:
        WATCH.look_into(factory.getbasetemp())
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_FOUND] = WATCH.found
    if WATCH.found and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what was found by a process that ran some of the tests."""
    WATCH.found.update(getattr(node, "workeroutput", {}).get(_FOUND, {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was found."""
    if WATCH.found:
        terminalreporter.section("found where it must not be", red=True, bold=True)
    for what, around in WATCH.found.items():
        terminalreporter.line(f"{what}: …{around!r}…")
