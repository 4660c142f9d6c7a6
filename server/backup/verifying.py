"""Proves that a backup can be restored: by restoring it, and comparing."""

import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import structlog

from server.backup.creating import PROBES
from server.backup.manifest import Manifest, Table
from server.backup.postgres import ProgramFailed, Programs, connect
from server.backup.repository import Damaged, Repository
from server.backup.restoring import catalogue, lines, load
from server.backup.sealing import KeyRefused, Unsealer
from server.backup.snapshot import digest_tables, nearest, nearest_by_graph

log = structlog.get_logger()

_NAMED: Final = 100
"""How many problems a report names; it says how many there are."""

Provision = Callable[[str, str], Awaitable["Scratch"]]
"""Makes roles and an empty database of a name on a server that its superuser's URL names."""
CheckLog = Callable[["Scratch", Sequence[Mapping[str, Any]]], Awaitable[tuple[int, list[str]]]]
"""Verifies the audit logs of a database, with their signed checkpoints; returns how many events
hold, and what is wrong."""


class ScratchRefused(Exception):
    """What was named as a scratch server is the one that is backed up."""


@dataclass(frozen=True, slots=True)
class Scratch:
    """A database that is thrown away."""

    superuser_url: str
    owner_url: str
    system_url: str


@dataclass(slots=True)
class Report:
    """What a verification looked at, and what is wrong."""

    backup: str
    mark: str
    tables: int = 0
    rows: int = 0
    events: int = 0
    probes: int = 0
    objects: int = 0
    object_bytes: int = 0
    restore_seconds: float = 0.0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether all that was written can be had again."""
        return not self.problems

    def fields(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        kept = {name: getattr(self, name) for name in self.__slots__ if name != "problems"}
        return kept | {"problems": self.problems[:_NAMED], "problem_count": len(self.problems)}


class Verifier:
    """Restores backups into a server beside, which nothing else uses."""

    def __init__(
        self,
        repository: Repository,
        unsealer: Unsealer,
        programs: Programs,
        *,
        scratch_url: str,
        provision: Provision,
        check_log: CheckLog,
        checkpoints: str,
    ) -> None:
        """Prepare to verify.

        Args:
            repository: Where backups are.
            unsealer: Holds a key that opens them.
            programs: Of PostgreSQL.
            scratch_url: Of the server to restore into, as its superuser.
            provision: Makes a database on it.
            check_log: Verifies audit logs.
            checkpoints: The stream that holds signed checkpoints.
        """
        self._repository = repository
        self._unsealer = unsealer
        self._programs = programs
        self._scratch_url = scratch_url
        self._provision = provision
        self._check_log = check_log
        self._checkpoints = checkpoints

    async def verify(self, manifest: Manifest, progress: Callable[[float], None]) -> Report:
        """Restore a backup, compare all of it, and throw it away.

        Everything is looked at, whatever was found before: a report names all that is wrong.

        Raises:
            StoreUnavailable: The bucket does not answer.
        """
        begun = time.monotonic()
        report = Report(manifest.id, manifest.mark.isoformat())
        report.problems += await self._repository.damages(manifest)
        progress(0.2)
        for reached, look in ((0.6, self._database), (1.0, self._objects)):
            try:
                await look(manifest, report)
            except (Damaged, KeyRefused, ProgramFailed) as error:
                # Of damage the report may know already.
                if str(error) not in report.problems:
                    report.problems.append(str(error))
            progress(reached)
        if manifest.lost:
            report.problems.append(f"{manifest.lost} objects were missing when it was made")
        report.seconds = round(time.monotonic() - begun, 3)
        return report

    async def _database(self, manifest: Manifest, report: Report) -> None:
        async with self._scratch(f"verify_{secrets.token_hex(8)}") as scratch:
            begun = time.monotonic()
            await load(
                self._repository, self._unsealer, manifest, self._programs, scratch.owner_url
            )
            report.restore_seconds = round(time.monotonic() - begun, 3)
            async with connect(scratch.superuser_url) as connection:
                async with connection.transaction():
                    tables = await digest_tables(connection)
                report.tables = len(tables)
                report.rows = sum(table.rows for table in tables.values())
                report.problems += _differences(manifest.tables, tables)
                await self._probe(connection, manifest, report)
            checkpoints = await self._read(manifest, self._checkpoints)
            report.events, broken = await self._check_log(scratch, checkpoints)
            report.problems += broken

    async def _probe(
        self, connection: asyncpg.Connection, manifest: Manifest, report: Report
    ) -> None:
        """Ask for what is nearest to some vectors, by looking at all and by the graph."""
        for probe in await self._read(manifest, PROBES):
            report.probes += 1
            if await nearest(connection, probe) != probe["nearest"]:
                report.problems.append(f"other memories are nearest to {probe['memory_id']}")
            if probe["in_graph"]:
                product = await nearest_by_graph(connection, probe)
                vector = json.loads(probe["vector"])
                if product is None or product < 0.99 * sum(x * x for x in vector):
                    report.problems.append(f"the graph does not find {probe['memory_id']}")

    async def _objects(self, manifest: Manifest, report: Report) -> None:
        """Read every object once, and compare its digest."""
        last = ""
        entries = catalogue(self._repository, self._unsealer, manifest)
        async with aclosing(entries):
            async for entry in entries:
                named = entry.named
                if entry.state != "kept" or named.sha256 == last:
                    continue
                last = named.sha256
                try:
                    parts = self._repository.read_object(
                        named.sha256, named.size_bytes, self._unsealer
                    )
                    async with aclosing(parts):
                        async for part in parts:
                            report.object_bytes += len(part)
                    report.objects += 1
                except Damaged as error:
                    report.problems.append(str(error))

    async def _read(self, manifest: Manifest, stream: str) -> list[dict[str, Any]]:
        async with aclosing(lines(self._repository, self._unsealer, manifest, stream)) as found:
            return [fields async for fields in found]

    @asynccontextmanager
    async def _scratch(self, name: str) -> AsyncIterator[Scratch]:
        """Make a database, and throw it away at the end."""
        scratch = await self._provision(self._scratch_url, name)
        try:
            yield scratch
        finally:
            async with connect(self._scratch_url) as connection:
                await connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


async def refuse_same_server(scratch_url: str, url: str) -> None:
    """Refuse to verify on the server that is backed up, whose roles would get other passwords.

    Raises:
        ScratchRefused: It is the same.
    """
    seen = []
    for each in (scratch_url, url):
        async with connect(each) as connection:
            seen.append(
                await connection.fetchval("SELECT system_identifier FROM pg_control_system()")
            )
    if seen[0] == seen[1]:
        host = urlsplit(scratch_url).hostname or "the local one"
        raise ScratchRefused(f"the scratch server ({host}) is the server that is backed up")


def _differences(expected: Mapping[str, Table], found: Mapping[str, Table]) -> list[str]:
    """Say which tables are not what they were."""
    problems = [f"table {name} is missing" for name in sorted(expected.keys() - found.keys())]
    for name in sorted(expected.keys() & found.keys()):
        then, now = expected[name], found[name]
        if then.rows != now.rows:
            problems.append(f"table {name} has {now.rows} rows, not {then.rows}")
        elif then.digest != now.digest:
            problems.append(f"table {name} has other rows than it had")
    return problems
