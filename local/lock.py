"""Who runs the mesh of a state directory: one supervisor at a time."""

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

FILE = "lock"
POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Identity:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    started: str
    """Boot of the machine and clock tick in it at which the process began."""

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        """Return the identity of a living process, or None if there is none with this pid."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command stands in parentheses and may hold anything, also spaces and parentheses.
        fields = stat.rpartition(")")[2].split()
        if fields[0] in "ZX":
            return None
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return cls(pid, f"{boot}/{fields[19]}")

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> "Identity":
        """Return the identity that `record` describes."""
        return cls(int(record["pid"]), str(record["started"]))

    def as_record(self) -> dict[str, Any]:
        """Return what `parse` reads."""
        return {"pid": self.pid, "started": self.started}

    def is_alive(self) -> bool:
        """Tell whether this very process still runs."""
        return Identity.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Send a signal to this very process; do nothing if it is gone."""
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(self.pid)
            try:
                # Looked at again with the handle open: from here on the pid cannot be reused.
                if self.is_alive():
                    signal.pidfd_send_signal(handle, number)
            finally:
                os.close(handle)

    def wait_gone(self, seconds: float) -> bool:
        """Wait until the process is gone, at most so long. Return whether it is."""
        deadline = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True


class AlreadyRunningError(Exception):
    """Another supervisor holds the state directory."""

    def __init__(self, state: Path, holder: Identity | None) -> None:
        pid = f" (pid {holder.pid})" if holder else ""
        super().__init__(
            f"A mesh already runs in {state}{pid}. `make down` stops it; "
            "KIMBERLY_STATE names another directory for a second one."
        )


@contextlib.contextmanager
def hold(state: Path) -> Iterator[None]:
    """Hold a state directory; the kernel lets go of it when this process ends, however it ends.

    Raises:
        AlreadyRunningError: another process holds it.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / FILE).open("a+") as file:
        if not _lock(file):
            raise AlreadyRunningError(state, _read(state))
        me = Identity.of(os.getpid())
        file.truncate(0)
        file.write(json.dumps(me.as_record() if me else {}))
        file.flush()
        yield


def _lock(file: IO[str]) -> bool:
    # Tried for a moment: `holder_of` may hold it just then.
    deadline = time.monotonic() + 10 * POLL_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


def holder_of(state: Path) -> Identity | None:
    """Return the process that holds a state directory, or None if nobody does."""
    with kept_free(state) as is_free:
        holder = None if is_free else _read(state)
    return holder if holder and holder.is_alive() else None


@contextlib.contextmanager
def kept_free(state: Path) -> Iterator[bool]:
    """Tell whether nobody holds a state directory, and keep it so; for a moment only."""
    try:
        file = (state / FILE).open("a+")
    except FileNotFoundError:
        yield True
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def _read(state: Path) -> Identity | None:
    try:
        return Identity.parse(json.loads((state / FILE).read_text()))
    except (OSError, ValueError, KeyError):
        return None


def end_leftovers(record: Path, *, seconds: float = 5.0) -> None:
    """End the children of a supervisor that was killed, as its `record` names them.

    The kernel has told them to end already; this waits for the slow ones and forces the rest.
    """
    try:
        known = [Identity.parse(each) for each in json.loads(record.read_text()).values()]
    except (OSError, ValueError, KeyError, AttributeError):
        return
    for leftover in known:
        if not leftover.wait_gone(seconds):
            leftover.send(signal.SIGKILL)
            leftover.wait_gone(seconds)
