"""Child processes: started so that they die with us, watched, and started again when they end.

Start them from a thread that lives as long as they should: the kernel ends a child when the
thread that started it ends.
"""

import asyncio
import contextlib
import enum
import os
import pwd
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from local.lock import Identity
from local.private import write_json

Probe = Callable[[], Awaitable[bool]]

POLL_SECONDS = 0.03
START_ATTEMPTS = 3
LOG_BYTES = 10 * 1024 * 1024
TAIL_LINES = 40


@dataclass(frozen=True, slots=True)
class Program:
    """What to run, how to see that it is ready, and how to stop it."""

    name: str
    command: tuple[str, ...]
    log: Path
    is_ready: Probe
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    """Where it listens, for people to read."""
    user: str | None = None
    """Run as this user of the machine; None for the one we are."""
    ready_seconds: float = 30.0
    stop_signal: signal.Signals = signal.SIGTERM
    stop_seconds: float = 3.0
    """How long it may take to stop before it is killed."""
    orphan_signal: signal.Signals = signal.SIGKILL
    """What the kernel sends it when its supervisor is gone."""


class ProcessFailedError(Exception):
    """A process did not become ready. The message ends with the last lines of its log."""

    def __init__(self, program: Program, reason: str, *, since: int = 0) -> None:
        lines = tail(program.log, since=since)
        shown = "\n".join(f"    {line}" for line in lines) or "    (the log is empty)"
        super().__init__(f"{program.name} {reason}. Its log, {program.log}, ends with:\n{shown}")


def tail(log: Path, *, since: int = 0) -> list[str]:
    """Return the last lines of a log file, from byte `since` on; none if there is no file."""
    try:
        with log.open("rb") as file:
            file.seek(max(since, log.stat().st_size - 64 * 1024))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-TAIL_LINES:]


def installed(package: str) -> Path:
    """Return the directory of an installed package that carries a binary.

    It is found, not imported: importing these packages does things of its own.

    Raises:
        FileNotFoundError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed; `make ready` installs everything")
    return Path(spec.origin).parent


def as_user(user: str, command: Iterable[str]) -> tuple[str, ...]:
    """Return the command that runs `command` as another user, without any other group."""
    entry = pwd.getpwnam(user)
    identity = (f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups")
    return ("setpriv", *identity, "--no-new-privs", "--", *command)


def _wrapped(program: Program) -> tuple[str, ...]:
    # setpriv sets the death signal and then becomes the program. A preexec_fn would do the same
    # from Python after a fork, which is not safe in a process that has threads.
    death = program.orphan_signal.name.removeprefix("SIG")
    command = program.command if program.user is None else as_user(program.user, program.command)
    if program.user is None:
        return ("setpriv", f"--pdeathsig={death}", "--no-new-privs", "--", *command)
    return (command[0], f"--pdeathsig={death}", *command[1:])


class Child:
    """One running child. Signals go through its pidfd and so cannot reach another process."""

    def __init__(self, program: Program) -> None:
        _rotate(program.log)
        with program.log.open("ab") as log:
            self.log_start = log.tell()
            self._popen = subprocess.Popen(
                _wrapped(program),
                cwd=program.directory,
                env=dict(program.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the supervisor only, which stops things in order.
                start_new_session=True,
                umask=0o077,
            )
        self.started_at = time.monotonic()
        self._exited = asyncio.Event()
        self._pidfd = os.pidfd_open(self._popen.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._popen.pid

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return not self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        """The exit code; negative after a signal; None while it runs."""
        return self._popen.returncode

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is None:
            return "still runs"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"

    def send(self, number: signal.Signals) -> None:
        """Send a signal; do nothing if the child has ended."""
        if self.is_running:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> None:
        """Wait until the child has ended."""
        await self._exited.wait()

    async def ends_within(self, seconds: float) -> bool:
        """Wait until the child has ended, at most so long. Return whether it has."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._exited.wait()
        return not self.is_running

    async def stop(self, number: signal.Signals, seconds: float) -> None:
        """Ask the child to stop; kill it if it takes longer than `seconds`."""
        self.send(number)
        if not await self.ends_within(seconds):
            self.send(signal.SIGKILL)
            await self.wait()

    def kill(self) -> None:
        """Kill the child and wait for it without the event loop: for when that is going away."""
        if self.is_running:
            self.send(signal.SIGKILL)
            self._reap()

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._popen.wait()
        os.close(self._pidfd)
        self._exited.set()


def _rotate(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))


class State(enum.Enum):
    """Where a supervised process stands."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start: twice as long each time, up to a limit."""

    first_seconds: float = 0.2
    limit_seconds: float = 10.0
    healthy_seconds: float = 30.0
    """Having been ready for this long makes the next wait a short one again."""
    _next: float = 0.0

    def after(self, ready_seconds: float) -> float:
        """Return the pause after a life in which the process was ready for so long."""
        if self._next == 0.0 or ready_seconds >= self.healthy_seconds:
            self._next = self.first_seconds
        pause, self._next = self._next, min(2 * self._next, self.limit_seconds)
        return pause


class Process:
    """One program that is kept running until it is told to stop."""

    def __init__(
        self, program: Program, changed: Callable[["Process"], None], longest_pause_seconds: float
    ) -> None:
        self.program = program
        self._longest_pause_seconds = longest_pause_seconds
        self.state = State.STARTING
        self.restarts = 0
        self.failure: ProcessFailedError | None = None
        self._changed = changed
        self._child: Child | None = None
        self._was_ready = False
        self._settled = asyncio.Event()
        self._stopping = asyncio.Event()

    @property
    def name(self) -> str:
        """The name of its program."""
        return self.program.name

    @property
    def pid(self) -> int | None:
        """The process id, None between two lives."""
        return self._child.pid if self._child and self._child.is_running else None

    @property
    def uptime_seconds(self) -> float | None:
        """How long the present life has lasted."""
        return time.monotonic() - self._child.started_at if self.pid and self._child else None

    async def wait_ready(self) -> None:
        """Wait until the process has been ready for the first time, or is ready again.

        Raises:
            ProcessFailedError: it never became ready.
        """
        await self._settled.wait()
        if self.failure is not None:
            raise self.failure

    async def run(self) -> None:
        """Keep the program running until `stop`. What the program does never raises here."""
        backoff = Backoff(limit_seconds=self._longest_pause_seconds)
        try:
            while not self._stopping.is_set():
                pause = backoff.after(await self._live())
                if self.failure is not None:
                    return
                await self._rest(pause)
        finally:
            if self._child:
                self._child.kill()
            self._enter(State.FAILED if self.failure else State.STOPPED)
            self._settled.set()

    async def stop(self) -> None:
        """Stop the program and do not start it again."""
        self._stopping.set()
        if self._child and self._child.is_running:
            self._enter(State.STOPPING)
            await self._child.stop(self.program.stop_signal, self.program.stop_seconds)

    async def _live(self) -> float:
        """Run the program until it ends. Return for how many seconds it was ready."""
        self._enter(State.STARTING)
        try:
            self._child = child = Child(self.program)
        except OSError as error:
            self._give_up(f"cannot be started: {error}")
            return 0.0
        self._changed(self)
        if not await self._becomes_ready(child):
            return 0.0
        ready_at = time.monotonic()
        self._was_ready = True
        self._enter(State.READY)
        self._settled.set()
        await child.wait()
        return time.monotonic() - ready_at

    async def _becomes_ready(self, child: Child) -> bool:
        try:
            async with asyncio.timeout(self.program.ready_seconds):
                while not await self.program.is_ready():
                    if await child.ends_within(POLL_SECONDS):
                        break
        except TimeoutError:
            await child.stop(self.program.stop_signal, self.program.stop_seconds)
            self._give_up(f"was not ready after {self.program.ready_seconds:.0f} s")
            return False
        if child.is_running:
            return True
        if self.restarts + 1 >= START_ATTEMPTS or child.exit_code == os.EX_CONFIG:
            self._give_up(f"{child.ending} before it was ready")
        return False

    def _give_up(self, reason: str) -> None:
        # What ran once is worth trying for ever; what never ran is most likely set up wrongly.
        if not self._was_ready and not self._stopping.is_set():
            since = self._child.log_start if self._child else 0
            self.failure = ProcessFailedError(self.program, reason, since=since)

    async def _rest(self, seconds: float) -> None:
        if self._stopping.is_set():
            return
        self.restarts += 1
        if self._was_ready:
            self._settled.clear()
        self._enter(State.RESTARTING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    def _enter(self, state: State) -> None:
        self.state = state
        self._changed(self)


class Supervisor:
    """Owns processes: starts them, keeps them running, and stops them stage by stage."""

    def __init__(
        self, group: asyncio.TaskGroup, record: Path, longest_pause_seconds: float
    ) -> None:
        self.processes: dict[str, Process] = {}
        self.listeners: list[Callable[[Process], None]] = []
        self._group = group
        self._record = record
        self._longest_pause_seconds = longest_pause_seconds
        self._stages: dict[int, list[Process]] = {}
        self._background: list[asyncio.Task[None]] = []

    def start(self, program: Program, *, stage: int) -> Process:
        """Start a program. When all stops, higher stages stop before lower ones."""
        process = Process(program, self._note, self._longest_pause_seconds)
        self.processes[process.name] = process
        self._stages.setdefault(stage, []).append(process)
        self._group.create_task(process.run(), name=process.name)
        return process

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the processes until the supervisor stops. It must not raise."""
        self._background.append(self._group.create_task(work))

    async def stop(self) -> None:
        """Stop everything, the highest stage first."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for stage in sorted(self._stages, reverse=True):
            await together(*(process.stop() for process in self._stages[stage]))

    def _note(self, process: Process) -> None:
        alive = {
            name: identity.as_record()
            for name, each in self.processes.items()
            if each.pid and (identity := Identity.of(each.pid))
        }
        write_json(self._record, alive)
        for listener in self.listeners:
            listener(process)


@contextlib.asynccontextmanager
async def supervise(
    record: Path, *, longest_pause_seconds: float = 10.0
) -> AsyncIterator[Supervisor]:
    """Open a supervisor. It stops everything when the context ends, also after an error.

    Args:
        record: File that names the living children, for `local.lock.end_leftovers`.
        longest_pause_seconds: How long what ends again and again may stay down.
    """
    failure: Exception | None = None
    async with asyncio.TaskGroup() as group:
        supervisor = Supervisor(group, record, longest_pause_seconds)
        try:
            yield supervisor
        except Exception as error:  # noqa: BLE001 - raised again below, outside of the group
            failure = error
        finally:
            await supervisor.stop()
    # Within the group it would reach the caller as an ExceptionGroup.
    if failure is not None:
        raise failure


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """Do things at once. The first failure ends the others and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def run_once(program: Program) -> None:
    """Run a program to its end. Its probe is not asked.

    Raises:
        ProcessFailedError: it ended with an error, or took longer than its `ready_seconds`.
    """
    child = Child(program)
    try:
        ended = await child.ends_within(program.ready_seconds)
    finally:
        child.kill()
    if not ended:
        reason = f"was not done after {program.ready_seconds:.0f} s"
        raise ProcessFailedError(program, reason, since=child.log_start)
    if child.exit_code != 0:
        raise ProcessFailedError(program, child.ending, since=child.log_start)
