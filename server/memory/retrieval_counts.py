"""How often queries returned each memory: counted here, written every few seconds."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import suppress
from typing import Final
from uuid import UUID

import asyncpg
import structlog

from server import ids
from server.database import SystemDatabase
from server.errors import StoreUnavailable

MOST_COUNTED: Final = 100_000
"""How many memories are counted between two writes; the counts of further ones are left out."""
_AT_ONCE: Final = 2_000
"""To prepare more for Postgres would keep queries waiting for milliseconds."""
_LAST_SECONDS: Final = 3.0

log = structlog.get_logger()


class RetrievalCounts:
    """Adds to `retrieved_count`, which the next meditation reads.

    A query costs no write: counts are gathered in this process and written together. A process
    that is killed takes those of its last seconds with it; one that is stopped writes them.
    """

    def __init__(self, database: SystemDatabase, *, every_seconds: float = 5.0) -> None:
        self._database = database
        self._every_seconds = every_seconds
        self._counts: defaultdict[UUID, Counter[str]] = defaultdict(Counter)
        self._size = 0

    def note(self, user_id: UUID, memory_ids: Iterable[str]) -> None:
        """Count memories of a user that an answer holds, named as the API shows them."""
        if self._size < MOST_COUNTED:
            of_user = self._counts[user_id]
            self._size -= len(of_user)
            of_user.update(memory_ids)
            self._size += len(of_user)

    async def flush(self) -> None:
        """Write all counts. What cannot be written is kept for the next time."""
        noted = [
            (user_id, memory_id, times)
            for user_id, of_user in self._counts.items()
            for memory_id, times in of_user.items()
        ]
        self._counts.clear()
        self._size = 0
        for start in range(0, len(noted), _AT_ONCE):
            try:
                await self._write(noted[start : start + _AT_ONCE])
            except (StoreUnavailable, TimeoutError, asyncpg.PostgresError) as error:
                log.warning("retrieval counts wait", error=repr(error))
                self._put_back(noted[start:])
                return

    async def run(self) -> None:
        """Write counts every few seconds, and once more when cancelled."""
        try:
            while True:
                await asyncio.sleep(self._every_seconds)
                await self.flush()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    await self.flush()

    def _put_back(self, noted: Iterable[tuple[UUID, str, int]]) -> None:
        for user_id, memory_id, times in noted:
            self._counts[user_id][memory_id] += times
        self._size = sum(map(len, self._counts.values()))

    async def _write(self, batch: list[tuple[UUID, str, int]]) -> None:
        async with self._database.transaction() as connection:
            # Row by row through the primary key: the planner would rather read the whole table.
            # And nobody is told that these are safe.
            await connection.execute(
                "SET LOCAL enable_hashjoin = off; SET LOCAL enable_mergejoin = off; "
                "SET LOCAL synchronous_commit = off"
            )
            await connection.execute(
                """
                WITH counted AS MATERIALIZED (
                    SELECT scores.user_id, scores.memory_id, times
                      FROM unnest($1::uuid[], $2::uuid[], $3::integer[])
                           AS noted (user_id, memory_id, times)
                      JOIN memory_scores AS scores
                        ON scores.user_id = noted.user_id AND scores.memory_id = noted.memory_id
                     -- A meditation locks them in this order too.
                     ORDER BY scores.user_id, scores.memory_id
                       FOR NO KEY UPDATE OF scores
                )
                UPDATE memory_scores AS scores
                   SET retrieved_count = retrieved_count + times
                  FROM counted
                 WHERE scores.user_id = counted.user_id AND scores.memory_id = counted.memory_id
                """,
                [user_id for user_id, _, _ in batch],
                [ids.parse(ids.MEMORY, memory_id, "id") for _, memory_id, _ in batch],
                [times for _, _, times in batch],
            )
