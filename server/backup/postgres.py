"""PostgreSQL's own programs, and connections that may take their time."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import asyncpg

_CHUNK_BYTES: Final = 256 * 1024
_SAID_BYTES: Final = 4000
_PATIENT: Final = {
    "jit": "off",
    "statement_timeout": "0",
    "lock_timeout": "60s",
    "idle_in_transaction_session_timeout": "0",
}


class ProgramFailed(Exception):
    """A program of PostgreSQL ended badly; says the last that it said."""


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[asyncpg.Connection]:
    """Connect for statements that may take hours."""
    connection = await asyncpg.connect(
        url, server_settings={**_PATIENT, "application_name": "backup"}
    )
    try:
        yield connection
    finally:
        await connection.close()


@dataclass(frozen=True, slots=True)
class Programs:
    """pg_dump and pg_restore of the server's version."""

    directory: Path | None
    """Where they are; None: on the path."""

    async def dump(self, url: str, snapshot: str) -> AsyncGenerator[bytes, None]:
        """Yield a dump of a database in pg_dump's custom format, compressed.

        Raises:
            ProgramFailed: It does not end well; then what was yielded is no dump.
        """
        arguments = (
            "--format=custom",
            "--compress=gzip:3",
            f"--snapshot={snapshot}",
            "--no-owner",
            # Whoever restores may not be allowed to make them; `provision` does.
            "--exclude-extension=*",
            "--lock-wait-timeout=60s",
        )
        process = await self._start("pg_dump", url, *arguments, stdout=asyncio.subprocess.PIPE)
        said = asyncio.create_task(_last_words(process))
        try:
            if process.stdout is None:
                raise ProgramFailed("pg_dump has no output")
            while chunk := await process.stdout.read(_CHUNK_BYTES):
                yield chunk
            await _succeeded(process, said, "pg_dump")
        finally:
            await _end(process, said)

    async def restore(self, url: str, dump: AsyncIterable[bytes]) -> None:
        """Fill an empty database from a dump: all of it, or nothing.

        Raises:
            ProgramFailed: It does not end well.
        """
        process = await self._start(
            "pg_restore",
            url,
            "--single-transaction",
            "--exit-on-error",
            "--no-owner",
            stdin=asyncio.subprocess.PIPE,
        )
        said = asyncio.create_task(_last_words(process))
        try:
            if process.stdin is None:
                raise ProgramFailed("pg_restore has no input")
            # When it ends early, what it said tells more than a broken pipe.
            with suppress(BrokenPipeError, ConnectionResetError):
                async for chunk in dump:
                    process.stdin.write(chunk)
                    await process.stdin.drain()
                process.stdin.close()
            await _succeeded(process, said, "pg_restore")
        finally:
            await _end(process, said)

    async def _start(
        self,
        name: str,
        url: str,
        *arguments: str,
        stdin: int = asyncio.subprocess.DEVNULL,
        stdout: int = asyncio.subprocess.DEVNULL,
    ) -> asyncio.subprocess.Process:
        parts = urlsplit(url)
        # Everybody on a machine sees the arguments of its programs.
        bare = parts._replace(netloc=_without_password(parts.netloc)).geturl()
        environment = {**os.environ, "PGPASSWORD": unquote(parts.password or "")}
        if self.directory:
            # An image of ours has them beside the programs; Python is not to see them.
            environment["LD_LIBRARY_PATH"] = str(self.directory.with_name("lib"))
        return await asyncio.create_subprocess_exec(
            str(self.directory / name) if self.directory else name,
            f"--dbname={bare}",
            *arguments,
            stdin=stdin,
            stdout=stdout,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )


def _without_password(netloc: str) -> str:
    user, at, host = netloc.rpartition("@")
    return f"{user.partition(':')[0]}{at}{host}"


async def _last_words(process: asyncio.subprocess.Process) -> str:
    """Read what a program says, and return the end of it."""
    if process.stderr is None:
        return ""
    said = b""
    while chunk := await process.stderr.read(_SAID_BYTES):
        said = (said + chunk)[-_SAID_BYTES:]
    return said.decode(errors="replace").strip()


async def _succeeded(
    process: asyncio.subprocess.Process, said: asyncio.Task[str], name: str
) -> None:
    words = await said
    if status := await process.wait():
        raise ProgramFailed(f"{name} ended with {status}: {words}")


async def _end(process: asyncio.subprocess.Process, said: asyncio.Task[str]) -> None:
    """Leave no process behind."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    said.cancel()
    await asyncio.wait([said])
