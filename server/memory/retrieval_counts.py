"""How often queries returned each memory: counted here, written every few seconds."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple
from uuid import UUID

import asyncpg
import structlog

from server import ids
from server.caller import Caller
from server.database import SystemDatabase
from server.errors import StoreUnavailable
from server.memory.short_term import ShortTermStore

MOST_COUNTED: Final = 100_000
"""How many memories are counted between two writes; the counts of further ones are left out."""
_AT_ONCE: Final = 2_000
"""To prepare more for Postgres would keep queries waiting for milliseconds."""
_LAST_SECONDS: Final = 3.0

log = structlog.get_logger()


class _Noted(NamedTuple):
    caller: Caller
    name: str
    times: int


class RetrievalCounts:
    """Adds to how often each memory was retrieved, which the next meditation reads.

    A query costs no write: counts are gathered in this process and written together, those of
    short-term memories in Redis, from where a promotion takes them along. A process that is killed
    takes those of its last seconds with it; one that is stopped writes them.
    """

    def __init__(
        self, database: SystemDatabase, short_term: ShortTermStore, *, every_seconds: float = 5.0
    ) -> None:
        self._database = database
        self._short_term = short_term
        self._every_seconds = every_seconds
        self._durable = _Counts()
        self._short = _Counts()

    def note(self, caller: Caller, durable: Iterable[str], short_term: Iterable[str]) -> None:
        """Count memories of a user that an answer holds, named as the API shows them.

        Args:
            caller: Whose memories they are.
            durable: Those in Postgres.
            short_term: Those in Redis.
        """
        if self._durable.size + self._short.size < MOST_COUNTED:
            self._durable.add(caller, durable)
            self._short.add(caller, short_term)

    async def flush(self) -> None:
        """Write all counts. What cannot be written is kept for the next time."""
        await _flush(self._short, self._write_short)
        await _flush(self._durable, self._write)

    async def run(self) -> None:
        """Write counts every few seconds, and once more when cancelled."""
        writing: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(self._every_seconds)
                # Held by this name: what is cancelled half-way may be written or not.
                writing = asyncio.create_task(self.flush())
                await asyncio.shield(writing)
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_SECONDS):
                    if writing:
                        await writing
                    await self.flush()

    async def _write_short(self, batch: Sequence[_Noted]) -> None:
        retrieved = [(one.caller, _id_of(one), one.times) for one in batch]
        here = await self._short_term.count(retrieved)
        # What is gone from Redis was promoted meanwhile, if it is anywhere.
        self._durable.put_back(one for one, is_here in zip(batch, here, strict=True) if not is_here)

    async def _write(self, batch: Sequence[_Noted]) -> None:
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
                [one.caller.user_id for one in batch],
                [_id_of(one) for one in batch],
                [one.times for one in batch],
            )


class _Counts:
    """Counts that wait to be written."""

    def __init__(self) -> None:
        self._of: defaultdict[Caller, Counter[str]] = defaultdict(Counter)
        self.size = 0
        """Of how many memories."""

    def add(self, caller: Caller, names: Iterable[str]) -> None:
        """Count memories of a user once more."""
        of_user = self._of[caller]
        self.size -= len(of_user)
        of_user.update(names)
        self.size += len(of_user)

    def take(self) -> list[_Noted]:
        """Return all counts, and begin anew."""
        noted = [
            _Noted(caller, name, times)
            for caller, of_user in self._of.items()
            for name, times in of_user.items()
        ]
        self._of.clear()
        self.size = 0
        return noted

    def put_back(self, noted: Iterable[_Noted]) -> None:
        """Add what was taken and is still to be written."""
        for one in noted:
            self._of[one.caller][one.name] += one.times
        self.size = sum(map(len, self._of.values()))


async def _flush(
    counts: _Counts, write: Callable[[Sequence[_Noted]], Coroutine[Any, Any, None]]
) -> None:
    noted = counts.take()
    for start in range(0, len(noted), _AT_ONCE):
        try:
            await write(noted[start : start + _AT_ONCE])
        except (StoreUnavailable, TimeoutError, asyncpg.PostgresError) as error:
            log.warning("retrieval counts wait", error=repr(error))
            counts.put_back(noted[start:])
            return


def _id_of(noted: _Noted) -> UUID:
    return ids.parse(ids.MEMORY, noted.name, "id")
