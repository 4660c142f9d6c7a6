"""Loopback ports of a mesh: chosen once, remembered, and used again."""

import contextlib
import fcntl
import json
import os
import random
import socket
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from local.private import make_private

LOOPBACK = "127.0.0.1"
# Below the ports that Linux gives to outgoing connections (32768 and up): one of those could take
# a port between the moment it is chosen and the moment its server listens.
CANDIDATES = range(20_000, 22_700)
GRPC_OFFSET = 10_000
"""SeaweedFS listens on each of its ports and on this many above it."""


class Ports:
    """The ports of one mesh. They stay claimed until the context that opened them ends.

    A claim is a lock on a file named after the port, so that meshes that start at the same moment
    do not choose the same ones.
    """

    def __init__(self, record: Path, claims: contextlib.ExitStack) -> None:
        self._record = record
        self._claims = claims
        self._known = _read(record)
        self._mine: set[int] = set()

    def claim(
        self, name: str, *, preferred: Iterable[int] = (), offsets: Iterable[int] = (0,)
    ) -> int:
        """Return a free port for `name`: the one it had before if that is free.

        Args:
            name: What the port is for.
            preferred: Ports to try before choosing one at random.
            offsets: Distances from the port that must be free as well.

        Raises:
            OSError: no port is free.
        """
        remembered = [self._known[name]] if name in self._known else []
        # Not for secrecy: a random order makes it unlikely that two meshes try the same port.
        chance = random.sample(CANDIDATES, len(CANDIDATES))
        wanted = tuple(offsets)
        for port in (*remembered, *preferred, *chance):
            if self._take([port + offset for offset in wanted]):
                self._known[name] = port
                return port
        raise OSError("no loopback port is free")

    def save(self) -> None:
        """Remember the ports for the next start."""
        draft = self._record.with_suffix(".new")
        draft.write_text(json.dumps(self._known, indent=2) + "\n")
        draft.replace(self._record)

    def _take(self, ports: list[int]) -> bool:
        if self._mine.intersection(ports):
            return False
        with contextlib.ExitStack() as taken:
            for port in ports:
                claim = _lock(port)
                if claim is None:
                    return False
                taken.enter_context(claim)
                if not _is_free(port):
                    return False
            self._claims.push(taken.pop_all())
        self._mine.update(ports)
        return True


@contextlib.contextmanager
def open_ports(record: Path) -> Iterator[Ports]:
    """Open the ports that `record` remembers."""
    with contextlib.ExitStack() as claims:
        yield Ports(record, claims)


def is_unused(port: int) -> bool:
    """Tell whether no mesh has claimed a port and nobody listens on it."""
    claim = _lock(port)
    if claim is None:
        return False
    with claim:
        return _is_free(port)


def _read(record: Path) -> dict[str, int]:
    try:
        return {str(name): int(port) for name, port in json.loads(record.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _lock(port: int) -> IO[str] | None:
    directory = Path(tempfile.gettempdir()) / f"kimberly-{os.getuid()}-ports"
    make_private(directory)
    file = (directory / str(port)).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of the last run that are winding down do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
