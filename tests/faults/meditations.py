"""A library of memories, meditations over it, and the count of every score that was committed."""

import asyncio
import datetime as dt
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import asyncpg
import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from local.mesh import Mesh
from server import ids
from tests.faults.driver import User
from tests.faults.history import PASSING
from tests.faults.reach import as_superuser, until

SIZE: Final = 20_000
_CHUNK: Final = 1000
_MOODS: Final = ("a wonderful", "a dreadful", "an ordinary", "a rather good", "a sad", "a lucky")
_COLUMNS: Final = (
    *("score", "relevance_to_goals", "emotional_weight", "predictive_value", "recency_frequency"),
    *("sentiment", "scorer_version", "scored_at"),
)

Scores = Mapping[UUID, tuple[object, ...]]
"""All columns that a meditation writes, by memory."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run stands."""

    scored: int
    done: bool
    fence: int


class Library:
    """The memories of one user. All runs over them have the same `as_of`, so they compare."""

    def __init__(self, mesh: Mesh, user: User) -> None:
        self._mesh = mesh
        self.user = user
        self.user_id = ids.parse(ids.USER, user.user_id, "user")

    async def fill(self) -> None:
        """Import the memories, fix `as_of`, and have the database count committed scores."""

        async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
            for start in range(0, SIZE, _CHUNK):
                memories = [
                    pb.Memory(content=f"it was {_MOODS[n % len(_MOODS)]} day, number {n}")
                    for n in range(start, start + _CHUNK)
                ]
                yield pb.ImportMemoriesRequest(first_index=start, memories=memories)

        answer = await self.user.client.memory.ImportMemories(chunks(), timeout=120)
        assert answer.created == SIZE
        as_of = dt.datetime.now(dt.UTC)
        async with as_superuser(self._mesh) as superuser:
            await superuser.execute(
                f"""
                ALTER TABLE meditations ALTER COLUMN as_of SET DEFAULT '{as_of.isoformat()}';
                CREATE TABLE committed_scores (memory_id uuid NOT NULL);
                CREATE FUNCTION count_score() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER
                    SET search_path = public AS
                    'BEGIN INSERT INTO committed_scores VALUES (NEW.memory_id); RETURN NULL; END';
                CREATE TRIGGER count_score AFTER UPDATE OF score ON memory_scores
                    FOR EACH ROW WHEN (NEW.user_id = '{self.user_id}' AND NEW.score IS NOT NULL)
                    EXECUTE FUNCTION count_score();
                """
            )

    async def forget_scores(self) -> None:
        """Make every memory one that was never scored."""
        async with as_superuser(self._mesh) as superuser:
            await superuser.execute(
                f"UPDATE memory_scores SET {', '.join(f'{name} = NULL' for name in _COLUMNS)}"
                " WHERE user_id = $1",
                self.user_id,
            )
            await superuser.execute("TRUNCATE committed_scores")

    async def meditate(self) -> UUID:
        """Start a run and return its id."""
        answer = await self.user.client.memory.Meditate(pb.MeditateRequest(), timeout=10)
        return ids.parse(ids.MEDITATION, answer.meditation.id, "id")

    async def place(self, run: UUID) -> Place:
        """Return where a run stands, as soon as the database can say it."""
        while True:
            try:
                async with as_superuser(self._mesh) as superuser:
                    return await place(superuser, run)
            except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                await asyncio.sleep(0.05)

    async def reaches(self, run: UUID, scored: int) -> Place:
        """Wait until a run has scored so many memories, at most its end."""
        async with as_superuser(self._mesh) as superuser:
            while True:
                here = await place(superuser, run)
                if here.done or here.scored >= scored:
                    return here
                await asyncio.sleep(0.002)

    async def moves_on(self, run: UUID, scored: int, *, beyond_fence: int = -1) -> Place:
        """Wait until a run has scored more than so many memories, perhaps under a later lease."""

        async def moved() -> Place | None:
            here = await self.place(run)
            return here if here.scored > scored and here.fence > beyond_fence else None

        return await until(moved, 60, pause=0.005)

    async def ends(self, run: UUID, seconds: float) -> pb.Meditation:
        """Wait through the edge until a run has succeeded."""
        deadline = time.monotonic() + seconds
        request = pb.GetMeditationRequest(id=ids.show(ids.MEDITATION, run))
        while True:
            assert time.monotonic() < deadline, f"the run stands at {await self.place(run)}"
            seen = await self._seen(request)
            if seen is not None and seen.state == pb.MEDITATION_STATE_SUCCEEDED:
                return seen
            await asyncio.sleep(0.05)

    async def _seen(self, request: pb.GetMeditationRequest) -> pb.Meditation | None:
        try:
            return (await self.user.client.memory.GetMeditation(request, timeout=3)).meditation
        except grpc.aio.AioRpcError as error:
            if error.code() not in PASSING:
                raise
            return None

    async def scores(self) -> Scores:
        """Return what is stored for every memory."""
        async with as_superuser(self._mesh) as superuser:
            rows = await superuser.fetch(
                f"SELECT memory_id, {', '.join(_COLUMNS)} FROM memory_scores WHERE user_id = $1",
                self.user_id,
            )
        return {row["memory_id"]: tuple(row)[1:] for row in rows}

    async def times_scored(self) -> Sequence[int]:
        """Return how many scores of each memory were committed since they were forgotten."""
        async with as_superuser(self._mesh) as superuser:
            rows = await superuser.fetch(
                """
                SELECT count(committed.memory_id) AS times
                  FROM memory_scores
                  LEFT JOIN committed_scores AS committed USING (memory_id)
                 WHERE user_id = $1
                 GROUP BY memory_id
                """,
                self.user_id,
            )
        return [row["times"] for row in rows]

    async def attempts(self, run: UUID) -> int | None:
        """Return how often the job of the run's only shard was begun, None if it is not done."""
        async with as_superuser(self._mesh) as superuser:
            attempts: int | None = await superuser.fetchval(
                """
                SELECT max(attempt)
                  FROM jobs
                 WHERE payload ->> 'meditation_id' = $1
                HAVING array_agg(state) = ARRAY['succeeded']
                """,
                ids.show(ids.MEDITATION, run),
            )
        return attempts


async def place(connection: asyncpg.Connection, run: UUID) -> Place:
    """Return where a run stands."""
    row = await connection.fetchrow(
        "SELECT scored, done, fence FROM meditation_shards WHERE meditation_id = $1", run
    )
    return Place(**row)
