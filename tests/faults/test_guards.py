"""Guards are worth what happens without them: each is shown on, and with its comparison removed."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import UUID

import asyncpg
import numpy as np
import pytest

from server.caller import Caller
from server.database import Connection, Database, SystemDatabase
from server.enqueue import enqueue
from server.errors import LeaseLost
from server.jobs.model import Completed
from server.jobs.queue import Queue
from server.memory.columns import ScoreColumns
from server.memory.import_store import Chunk, ImportStore
from server.memory.meditation_store import MeditationStore
from server.memory.model import Draft, Source, Tier
from server.memory.score_batches import Batch
from server.memory.scoring_store import ScoringStore
from tests.conftest import FakeClock, data_keys_of
from tests.faults.figures import Figures

UNGUARDED, GUARDED = 10, 100
SIZE = 5

OWNER = ("AND fence = $3", "AND $3::bigint IS NOT NULL")
CURSOR = (
    "AND cursor_user_id = $4 AND cursor_memory_id = $5",
    "AND $4::uuid IS NOT NULL AND $5::uuid IS NOT NULL",
)
TOKEN = ("AND lease_token = outcome.token", "")
WORKER = ("AND worker_id = $4", "AND $4::text IS NOT NULL")


class Without:
    """A system database whose statements lack some comparisons. All else is the real thing."""

    def __init__(self, database: SystemDatabase, *removed: tuple[str, str]) -> None:
        self._database = database
        self._removed = removed
        self.missed = {guard for guard, _ in removed}
        """Comparisons that no statement held so far."""

    @property
    def connections(self) -> int:
        return self._database.connections

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator["Unguarded"]:
        async with self._database.transaction() as connection:
            yield Unguarded(connection, self)

    async def fetch_alone(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        return await self._database.fetch_alone(self.strip(statement), *arguments)

    def strip(self, statement: str) -> str:
        for guard, instead in self._removed:
            if guard in statement:
                self.missed.discard(guard)
                statement = statement.replace(guard, instead)
        return statement


class Unguarded:
    """A connection that strips statements before it sends them."""

    def __init__(self, connection: Connection, without: Without) -> None:
        self._connection = connection
        self._without = without

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._connection, name)

        async def call(statement: str, *arguments: Any, **options: Any) -> Any:
            return await method(self._without.strip(statement), *arguments, **options)

        return call


def scores_of(batch: Batch) -> ScoreColumns:
    half = np.full(len(batch.rows), 0.5, "<f4")
    return ScoreColumns(1, half, half, half, half, half, half)


class Zombie:
    """The sequence of a worker that comes back late: once a round, on a run of its own."""

    def __init__(
        self, database: Database, system: SystemDatabase, owner: asyncpg.Connection, caller: Caller
    ) -> None:
        self._meditations = MeditationStore(database)
        self._system = system
        self._owner = owner
        self._caller = caller
        self._fence = 0

    async def late(self, zombie: ScoringStore, *, after_the_other: bool) -> tuple[str, int]:
        """Let another take over, then apply what the zombie still has in hand.

        Args:
            zombie: The store by which the zombie writes.
            after_the_other: Whether the other has scored the same batch by then.

        Returns:
            What the zombie was told, and how many memories the run counts at its end.
        """
        rightful = ScoringStore(self._system, 1)
        run = (await self._meditations.start(self._caller, "", full_run=True)).id
        self._fence += 2
        old = await zombie.open_shard(run, 0, self._fence)
        in_hand = await zombie.read(old, old.cursor, SIZE)
        new = await rightful.open_shard(run, 0, self._fence + 1)
        batch = await rightful.read(new, new.cursor, SIZE)
        assert in_hand is not None
        assert batch is not None
        if after_the_other:
            await rightful.apply(new, batch, scores_of(batch))
        told = await self._told(zombie, old, in_hand)
        if not after_the_other:
            told += " / " + await self._told(rightful, new, batch)
        return told, await self._end(run)

    async def _told(self, store: ScoringStore, shard: Any, batch: Batch) -> str:
        try:
            await store.apply(shard, batch, scores_of(batch))
        except LeaseLost:
            return "refused"
        return "taken"

    async def _end(self, run: UUID) -> int:
        scored: int = await self._owner.fetchval(
            "UPDATE meditation_shards SET done = true WHERE meditation_id = $1 RETURNING scored",
            run,
        )
        await self._owner.execute(
            "UPDATE meditations SET state = 'succeeded', finished_at = now() WHERE id = $1", run
        )
        return scored


@pytest.fixture
async def zombie(
    database: Database,
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    caller: Caller,
    clock: FakeClock,
) -> Zombie:
    drafts = [
        Draft(
            tier=Tier.LONG_TERM,
            content=f"memory {n}",
            tags=(),
            source=Source.IMPORT,
            session_id="",
            session_position=None,
            speaker="",
            occurred_at=None,
        )
        for n in range(SIZE)
    ]
    await ImportStore(database, data_keys_of(database)).store(caller, Chunk(drafts), clock())
    return Zombie(database, system_database, owner, caller)


def lacking(database: SystemDatabase, *removed: tuple[str, str]) -> tuple[ScoringStore, Without]:
    without = Without(database, *removed)
    return ScoringStore(cast("SystemDatabase", without), 1), without


async def rounds(
    zombie: Zombie, store: ScoringStore, times: int, *, after_the_other: bool
) -> Mapping[tuple[str, int], int]:
    """Return how often each outcome occurred."""
    outcomes: dict[tuple[str, int], int] = {}
    for _ in range(times):
        outcome = await zombie.late(store, after_the_other=after_the_other)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


async def test_late_scores_are_refused(
    zombie: Zombie, system_database: SystemDatabase, figures: Figures
) -> None:
    store = ScoringStore(system_database, 1)
    after = await rounds(zombie, store, GUARDED, after_the_other=True)
    before = await rounds(zombie, store, GUARDED, after_the_other=False)
    assert after == {("refused", SIZE): GUARDED}
    assert before == {("refused / taken", SIZE): GUARDED}
    figures.guards.append(f"late scores, guarded: refused {2 * GUARDED}/{2 * GUARDED}")


async def test_without_fence_and_cursor_late_scores_count_twice(
    zombie: Zombie, system_database: SystemDatabase, figures: Figures
) -> None:
    store, without = lacking(system_database, OWNER, CURSOR)
    outcomes = await rounds(zombie, store, UNGUARDED, after_the_other=True)
    assert without.missed == set()
    assert outcomes == {("taken", 2 * SIZE): UNGUARDED}
    figures.guards.append(
        f"late scores, no fence, no cursor: counted twice {UNGUARDED}/{UNGUARDED}"
    )


async def test_without_fence_a_zombie_turns_the_rightful_worker_away(
    zombie: Zombie, system_database: SystemDatabase, figures: Figures
) -> None:
    store, without = lacking(system_database, OWNER)
    outcomes = await rounds(zombie, store, UNGUARDED, after_the_other=False)
    assert without.missed == set()
    assert outcomes == {("taken / refused", SIZE): UNGUARDED}
    figures.guards.append(
        f"late scores, no fence: the rightful worker refused {UNGUARDED}/{UNGUARDED}"
    )


async def settle_late(queue: Queue, late: Queue, owner: asyncpg.Connection, job_id: UUID) -> str:
    """Settle a job by a lease that passed on to another worker; return whose result it has."""
    (old,) = await queue.lease("zombie", ["test"], 1)
    await owner.execute(
        "UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE id = $1", job_id
    )
    assert await queue.reclaim() == 1
    (new,) = await queue.lease("rightful", ["test"], 1)
    await late.settle("zombie", [Completed(old.held, '{"by": "zombie"}')])
    await queue.settle("rightful", [Completed(new.held, '{"by": "rightful"}')])
    whose: str = await owner.fetchval("SELECT result ->> 'by' FROM jobs WHERE id = $1", job_id)
    return whose


@pytest.mark.parametrize(
    ("removed", "winner", "times"),
    [((), "rightful", GUARDED), ((TOKEN, WORKER), "zombie", UNGUARDED)],
    ids=["guarded", "unguarded"],
)
async def test_late_settlement_stands_only_without_the_lease_token(
    system_database: SystemDatabase,
    owner: asyncpg.Connection,
    figures: Figures,
    removed: tuple[tuple[str, str], ...],
    winner: str,
    times: int,
) -> None:
    without = Without(system_database, *removed)
    queue, late = Queue(system_database, 60), Queue(cast("SystemDatabase", without), 60)
    winners = []
    for _ in range(times):
        async with system_database.transaction() as connection:
            job_id = await enqueue(connection, kind="test", payload={})
        winners.append(await settle_late(queue, late, owner, job_id))
    assert without.missed == set()
    assert winners == [winner] * times
    how = "unguarded" if removed else "guarded"
    figures.guards.append(
        f"late settlement, {how}: the result is the {winner} one's {times}/{times}"
    )
