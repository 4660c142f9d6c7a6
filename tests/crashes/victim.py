"""A service that can be killed, and is back at once: the next one waits already."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import grpc

from local.layout import CHECKOUT
from local.servers import BUCKET, Stores
from tests.conftest import Urls
from tests.crashes.faults import Fault

_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
)


_START_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Passed:
    """What happened in the process that is alive."""

    passes: Counter[str]
    """How often each crash point was passed."""
    happened: int
    """How often the fault happened."""


class Victim:
    """One service after the other at the same socket."""

    def __init__(
        self, module: str, directory: Path, settings: Mapping[str, str], guards: tuple[str, ...]
    ) -> None:
        self._module = module
        self.log = directory / "log"
        self.recovery_seconds: list[float] = []
        """How long it took after each death until calls were taken again."""
        self._socket = directory / "socket"
        self._settings = settings
        self._without = guards
        self._alive: Process | None = None
        self._next: Process | None = None
        self.channel = grpc.aio.insecure_channel(f"unix:{self._socket}", options=_OPTIONS)

    async def start(self) -> None:
        """Serve, with one in reserve."""
        self._next = await self._prepare()
        await self._take_over()

    async def stop(self) -> None:
        """End both."""
        await self.channel.close(None)
        for process in (self._alive, self._next):
            if process is not None:
                _end(process)
                await process.wait()

    async def arm(self, fault: Fault | None) -> Passed:
        """Let a fault happen from now on, and return what happened up to now."""
        assert self._alive is not None
        return await self._tell(self._alive, fault)

    async def revive(self) -> bool:
        """Have the next one take over if this one died; return whether it did."""
        assert self._alive is not None
        # A killed process closes its connections a moment before it counts as ended.
        try:
            async with asyncio.timeout(0.05):
                await self._alive.wait()
        except TimeoutError:
            return False
        started = time.monotonic()
        _end(self._alive)
        await self._take_over()
        await self.channel.channel_ready()
        self.recovery_seconds.append(time.monotonic() - started)
        return True

    async def _take_over(self) -> None:
        assert self._next is not None
        self._alive, self._next = self._next, None
        await self._tell(self._alive, None)
        self._next = await self._prepare()

    async def _tell(self, process: Process, fault: Fault | None) -> Passed:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(fault) if fault else None).encode() + b"\n")
        async with asyncio.timeout(_START_SECONDS):
            line = await process.stdout.readline()
        assert line, f"it did not start, or died at the wrong time: {self._last_words()}"
        told: dict[str, Any] = json.loads(line)
        return Passed(Counter(told["passes"]), told["happened"])

    def _last_words(self) -> str:
        return self.log.read_text()[-2000:]

    async def _prepare(self) -> Process:
        with self.log.open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self._module, str(self._socket), *self._without),
                stdin=PIPE,
                stdout=PIPE,
                stderr=log,
                cwd=CHECKOUT,
                env={**os.environ, **self._settings},
            )


def _end(process: Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    if process.returncode is None:
        process.kill()


@asynccontextmanager
async def served(
    stores: Stores,
    urls: Urls,
    master_key: Path,
    *,
    without: tuple[str, ...] = (),
    module: str = "tests.crashes.served",
    **more: str,
) -> AsyncIterator[Victim]:
    """Serve the memory service, or another, over the stores of a test.

    Args:
        stores: PostgreSQL, Valkey and S3.
        urls: How to reach the database.
        master_key: The file of the master key.
        without: Guards that it lacks.
        module: What begins it, as `tests.crashes.served` does.
        more: Further settings, as the environment has them.
    """
    directory = Path(mkdtemp(prefix="kimberly-"))
    settings = {
        "DATABASE_URL": urls.application,
        "SYSTEM_DATABASE_URL": urls.system,
        "REDIS_URL": stores.valkey.url,
        "S3_ENDPOINT": stores.s3.endpoint,
        "S3_ACCESS_KEY": stores.s3.access_key,
        "S3_SECRET_KEY": stores.s3.secret_key,
        "S3_BUCKET": BUCKET,
        "S3_SECURE": "false",
        "LISTEN_SOCKET": str(directory / "socket"),
        "OUTBOUND_SOCKET": str(directory / "outbound"),
        "MASTER_KEY_FILE": str(master_key),
        "TOKEN_ISSUER": "https://kimberly.test",
        "TRUST_DOMAIN": "kimberly.local",
        "NAMESPACE": "test",
        **more,
    }
    victim = Victim(
        module, directory, {f"KIMBERLY_{name}": value for name, value in settings.items()}, without
    )
    try:
        await victim.start()
        yield victim
    finally:
        await victim.stop()
    shutil.rmtree(directory)
