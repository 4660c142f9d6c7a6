"""One state of the database: dumped, counted and digested as it was at one moment."""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import asyncpg

from server.backup.failures import BackupFailed
from server.backup.manifest import Table, Transactions
from server.backup.postgres import Programs, connect

_PAGE: Final = 500
_PROBES: Final = 3
_NEIGHBOURS: Final = 10
_CATCH_UP_SECONDS: Final = 60.0
"""How long a replica may take to have what the primary had when a backup began."""
_LOOK_SECONDS: Final = 0.1
_HAS_REPLAYED: Final = "SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn"


@dataclass(frozen=True, slots=True)
class Named:
    """An object that a row names."""

    table: str
    tenant_id: UUID
    user_id: UUID
    id: UUID
    version_id: str | None
    size_bytes: int
    sha256: str

    @property
    def key(self) -> str:
        """The key in S3; kinds of objects are called as their tables are."""
        return f"{self.table}/{self.tenant_id.hex}/{self.user_id.hex}/{self.id.hex}"


@dataclass(frozen=True, slots=True)
class Sealed:
    """Where the newest signed checkpoint of a tenant's audit log is."""

    tenant_id: UUID
    position: int


class Snapshot:
    """A transaction that sees one state, and whoever else looks at the same."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        urls: tuple[str, str],
        name: str,
        mark: datetime,
    ) -> None:
        self._connection = connection
        self._url, self._primary_url = urls
        self._name = name
        self.mark = mark
        """Every write that was acknowledged before is in it."""

    @classmethod
    @asynccontextmanager
    async def open(cls, url: str, primary_url: str) -> AsyncIterator["Snapshot"]:
        """Hold a state until the end.

        Args:
            url: Of a role that reads every row of every table; at a replica, if there is one.
            primary_url: Of the database that is written to, as a role that sees all users.

        Raises:
            BackupFailed: The replica stays behind.
        """
        async with connect(url) as connection:
            mark = await _mark(connection, primary_url)
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                name = await connection.fetchval("SELECT pg_export_snapshot()")
                yield cls(connection, (url, primary_url), name, mark)

    async def transactions(self) -> Transactions:
        """Return how far transactions were numbered."""
        row = await self._connection.fetchrow(
            "SELECT transactions_ended() AS ended, transactions_begun() AS begun"
        )
        return Transactions(row["ended"], row["begun"])

    async def migrations(self) -> int:
        """Return the number of the last migration."""
        number: int = await self._connection.fetchval("SELECT max(number) FROM migrations")
        return number

    async def dump(self, programs: Programs) -> AsyncGenerator[bytes, None]:
        """Yield what pg_dump writes of this state.

        Raises:
            ProgramFailed: It does not end well.
        """
        async for chunk in programs.dump(self._url, self._name):
            yield chunk

    async def tables(self) -> Mapping[str, Table]:
        """Count and digest every table, on a connection of its own: beside the dump."""
        async with (
            connect(self._url) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            # It takes no parameters; the name is PostgreSQL's own.
            await connection.execute(f"SET TRANSACTION SNAPSHOT '{self._name}'")
            return await digest_tables(connection)

    async def objects(self) -> AsyncIterator[Named]:
        """Yield the objects that rows name, in order of their digests.

        Exports are not among them: they are copies, and can be asked for again.
        """
        async for row in self._connection.cursor(
            """
            SELECT * FROM (
                SELECT 'attachments' AS table, tenant_id, user_id, id, version_id, size_bytes,
                       encode(sha256, 'hex') AS sha256
                  FROM attachments
                 WHERE state = 'complete'
                 UNION ALL
                SELECT 'transcripts', tenant_id, user_id, id, version_id, size_bytes,
                       encode(sha256, 'hex')
                  FROM transcripts
            ) AS object
             ORDER BY sha256 COLLATE "C", id
            """,
            prefetch=_PAGE,
        ):
            yield Named(**row)

    async def checkpoints(self) -> AsyncIterator[Sealed]:
        """Yield the newest checkpoint of each tenant's audit log."""
        async for row in self._connection.cursor(
            "SELECT tenant_id, position FROM audit_checkpoints ORDER BY tenant_id", prefetch=_PAGE
        ):
            yield Sealed(**row)

    async def probes(self) -> AsyncIterator[bytes]:
        """Yield vectors as lines of JSON, each with what is nearest to it.

        Those in a graph come first, which is one index more that has to be right.
        """
        rows = await self._connection.fetch(
            """
            SELECT user_id, model, memory_id, dimension, in_graph, vector::text AS vector
              FROM embeddings
             ORDER BY in_graph DESC, content_hash, memory_id
             LIMIT $1
            """,
            _PROBES,
        )
        for row in rows:
            probe = {name: row[name] for name in ("model", "dimension", "in_graph", "vector")}
            probe |= {name: row[name].hex for name in ("user_id", "memory_id")}
            probe["nearest"] = await nearest(self._connection, probe)
            yield json.dumps(probe).encode() + b"\n"

    async def names(self, object_: Named) -> bool:
        """Tell whether a row names an object now, rather than at the time of the snapshot."""
        # A replica may not know yet that the row went, and the object after it.
        async with connect(self._primary_url) as connection:
            found: bool = await connection.fetchval(
                f"SELECT EXISTS (SELECT FROM {object_.table}"  # noqa: S608 - one of two names
                " WHERE tenant_id = $1 AND user_id = $2 AND id = $3)",
                object_.tenant_id,
                object_.user_id,
                object_.id,
            )
        return found


async def _mark(connection: asyncpg.Connection, primary_url: str) -> datetime:
    """Return a time by the primary's clock: what was acknowledged before can be read by now.

    Raises:
        BackupFailed: The connection is to a replica that stays behind.
    """
    mark: datetime
    if not await connection.fetchval("SELECT pg_is_in_recovery()"):
        mark = await connection.fetchval("SELECT clock_timestamp()")
        return mark
    async with connect(primary_url) as primary:
        mark = await primary.fetchval("SELECT clock_timestamp()")
        # Behind all that was written so far, and flushed with it.
        end = await primary.fetchval("SELECT pg_logical_emit_message(true, 'backup', '')::text")
    try:
        async with asyncio.timeout(_CATCH_UP_SECONDS):
            while True:
                if await connection.fetchval(_HAS_REPLAYED, end):
                    return mark
                await asyncio.sleep(_LOOK_SECONDS)
    except TimeoutError as error:
        raise BackupFailed(
            f"the replica is more than {_CATCH_UP_SECONDS:.0f} s behind the database"
        ) from error


async def digest_tables(connection: asyncpg.Connection) -> Mapping[str, Table]:
    """Count the rows of every table, and digest them.

    Each row is hashed as text. Hashes are added up, so that the order of rows, which a restore may
    change, is of no account, and no memory is needed however many they are.
    """
    # Rows as text: they are to read the same whatever a cluster's settings are.
    await connection.execute("SET LOCAL timezone = 'UTC'; SET LOCAL extra_float_digits = 3")
    names = await connection.fetch(
        """
        SELECT relname, quote_ident(relname) AS quoted
          FROM pg_class
         WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
         ORDER BY relname
        """
    )
    return {name: await _digest_table(connection, quoted) for name, quoted in names}


async def _digest_table(connection: asyncpg.Connection, quoted: str) -> Table:
    row = await connection.fetchrow(
        f"""
        SELECT count(*) AS rows,
               sum(('x' || substr(hash, 1, 16))::bit(64)::bigint::numeric) AS low,
               sum(('x' || substr(hash, 17, 16))::bit(64)::bigint::numeric) AS high
          FROM (SELECT encode(sha256(convert_to(row::text, 'UTF8')), 'hex') AS hash
                  FROM {quoted} AS row) AS hashed
        """  # noqa: S608 - names from the catalogue, as it quotes them
    )
    digest = hashlib.sha256(f"{row['rows']} {row['low']} {row['high']}".encode()).hexdigest()
    return Table(row["rows"], digest)


async def nearest(connection: asyncpg.Connection, probe: Mapping[str, Any]) -> list[str]:
    """Return the memories whose vectors are nearest to a user's vector, found by looking at all."""
    rows = await connection.fetch(
        """
        SELECT memory_id
          FROM embeddings
         WHERE user_id = $1 AND model = $2 AND dimension = $3
         ORDER BY vector <#> $4::text::halfvec, memory_id
         LIMIT $5
        """,
        UUID(probe["user_id"]),
        probe["model"],
        probe["dimension"],
        probe["vector"],
        _NEIGHBOURS,
    )
    return [row["memory_id"].hex for row in rows]


async def nearest_by_graph(connection: asyncpg.Connection, probe: Mapping[str, Any]) -> float:
    """Return how near the nearest vector is that the graph leads to, as an inner product."""
    async with connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
        dimension = int(probe["dimension"])
        product: float = await connection.fetchval(
            f"""
            SELECT -(vector::halfvec({dimension}) <#> $1::text::halfvec({dimension}))
              FROM embeddings
             WHERE in_graph AND dimension = {dimension}
             ORDER BY vector::halfvec({dimension}) <#> $1::text::halfvec({dimension})
             LIMIT 1
            """,  # noqa: S608 - a number
            probe["vector"],
        )
    return product
