"""python -m bench.meditation: a night's scoring, from the job to the last memory archived.

The floor stands beside it: what PostgreSQL takes to give the same columns out, and to take as many
scores back, with nothing in between; and the UPDATE that would do it all in the database, over a
table that has the texts in the same rows.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from uuid import UUID

import asyncpg
import numpy as np
import psutil
import typer
from kimberly.client import connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from bench.load import latency_of
from bench.measure import Latency
from bench.pace import pace
from bench.progress import step
from bench.table import Markdown, Row, show
from bench.telling import Stub, address, bare_stub
from local import demo
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import SUPERUSER, SYSTEM
from server.database import SystemDatabase, open_pool
from server.enqueue import enqueue

_MIB = 1024 * 1024
_GOAL = "goal: 75 000/s"
_BURST = 100
"""Memories that a user writes one after the other; then others write."""
_OVER_QUOTA = 20
"""One of so many users keeps more than they may: a twentieth of their memories is to go."""
_FEW = 1_000
_OWN = 600
_PAUSE_SECONDS = 0.05
_POLL_SECONDS = 0.02
_FLOOR_BATCH = 16_384

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class Size:
    """How much there is to score."""

    memories: int
    users: int

    @property
    def each(self) -> int:
        """How many memories a user has."""
        return self.memories // self.users


@dataclass(slots=True)
class Peaks:
    """The most memory that processes held, by name, in bytes."""

    held: dict[str, int] = field(default_factory=dict)

    async def watch(self, mesh: Mesh, names: Sequence[str]) -> None:
        """Look again and again until cancelled."""
        processes = {name: psutil.Process(mesh.process(name).pid) for name in names}
        while True:
            for name, process in processes.items():
                self.held[name] = max(self.held.get(name, 0), process.memory_info().rss)
            await asyncio.sleep(0.1)


@dataclass(frozen=True, slots=True)
class Run:
    """A meditation of everybody's memories."""

    seconds: float
    processed: int
    scored: int
    archived: int
    queries: Latency
    peaks: Peaks


@app.command()
def main(
    memories: Annotated[int, typer.Option(min=_FEW, help="How many, of all users.")] = 1_000_000,
    users: Annotated[int, typer.Option(min=1, help="How many users they are of.")] = 1_000,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure a full run and one that stores what moved, in a mesh of its own, queries beside it.

    Sentiments are known, as on every night but the first. It takes some minutes, most of them to
    make the memories; let nothing else run meanwhile.
    """
    rows = asyncio.run(_measure(Size(memories, users)))
    show(rows, markdown=markdown)


async def _measure(size: Size) -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory))) as mesh:
            await mesh.wait_ready()
            owner = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
            try:
                await _fill(owner, size)
                async with _asking(mesh) as ask:
                    full = await _run(mesh, owner, ask, full=True)
                    moved = await _run(mesh, owner, ask, full=False)
                return [
                    pace(),
                    *_rows(size, full, moved),
                    *await _floor(owner),
                    await _wide(owner),
                ]
            finally:
                await owner.close()


def _rows(size: Size, full: Run, moved: Run) -> list[Row]:
    users = f"of {size.users} users, {full.seconds:.1f} s"
    return [
        Row(
            "full run, scored and stored",
            f"{full.scored / full.seconds:,.0f}/s",
            f"{_GOAL}; {full.scored:,} {users}, {full.archived:,} archived",
        ),
        Row(
            "run after it, looked at",
            f"{moved.processed / moved.seconds:,.0f}/s",
            f"{moved.scored:,} had moved; {moved.seconds:.1f} s",
        ),
        Row("query beside the full run, p50 / p99", str(full.queries), "goal: p99 50 ms"),
        *(
            Row(f"most memory of {name}", f"{held / _MIB:.0f} MiB", "goal: 300 MiB")
            for name, held in full.peaks.held.items()
        ),
    ]


# --- the memories


async def _fill(owner: asyncpg.Connection, size: Size) -> None:
    """Make memories as users would have written them, past the triggers that count them."""
    await owner.execute("SET session_replication_role = replica")
    people = sorted((UUID(bytes=secrets.token_bytes(16)) for _ in range(size.users)), key=str)
    await owner.execute(
        """
        INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
        SELECT one, one, 'memory.store', 1, true FROM unnest($1::uuid[]) AS one
        """,
        people,
    )
    bursts = [min(_BURST, size.each - at) for at in range(0, size.each, _BURST)]
    with step("making memories", len(bursts)) as advance:
        for burst in bursts:
            await owner.execute(_BURSTS_OF_ALL, people, burst)
            advance(1)
    await owner.execute(
        """
        INSERT INTO memory_usage (tenant_id, user_id, long_term_bytes, long_term_count)
        SELECT tenant_id, user_id, sum(size_bytes), count(*)
          FROM memories
         GROUP BY tenant_id, user_id
        """
    )
    await owner.execute(
        """
        INSERT INTO settings (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                              emotional_weight, predictive_value, recency_frequency, version,
                              long_term_bytes)
        SELECT tenant_id, user_id, 'english', 'balanced', 0.4, 0.3, 0.2, 0.1, 1,
               long_term_bytes * 19 / 20
          FROM memory_usage
         WHERE user_id = ANY ($1)
        """,
        people[:: min(_OVER_QUOTA, size.users)],
    )
    await owner.execute("RESET session_replication_role")
    await owner.execute("VACUUM ANALYZE memories, memory_scores, consents, memory_usage")
    await owner.execute("CHECKPOINT")


_BURSTS_OF_ALL = """
    WITH made AS (
        INSERT INTO memories (tenant_id, user_id, id, tier, content, source, occurred_at,
                              size_bytes, content_hash, created_at, updated_at, terms)
        SELECT one, one, uuidv7(), 'long_term', 'note ' || n || repeat(' of the day', 8), 'import',
               now(), 100, sha256(uuid_send(gen_random_uuid())), now(), now(),
               ('{' || n || ':1}/1000000000')::sparsevec
          FROM unnest($1::uuid[]) AS one, generate_series(1, $2) AS n
        RETURNING user_id, id
    )
    INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at, use_count,
                               retrieved_count, useful_count, sentiment)
    SELECT user_id, user_id, id, now() - random() * interval '90 days', random() * 12,
           random() * 20, random() * 5, random()
      FROM made
"""


# --- a run


@asynccontextmanager
async def _asking(mesh: Mesh) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Sign up a user with memories of their own; yield what asks one question, in seconds."""
    async with connect(address(mesh), mesh.ca) as client, bare_stub(mesh) as stub:
        email = f"bench-{secrets.token_hex(6)}@example.com"
        await client.sign_up(email, secrets.token_hex(12))
        granted = users.RecordConsentRequest(
            purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True
        )
        await client.users.RecordConsent(granted)
        metadata = (("authorization", f"Bearer {client.access_token}"),)
        said = [turn.text for turn in demo.read_transcript(demo.SAMPLE)]
        await _import(stub, metadata, said)

        async def ask() -> float:
            words = secrets.choice(said).split()
            # A word that nobody ever said: no cache knows the question.
            query = f"{' '.join(words[:8])} {secrets.token_hex(4)}"
            request = memory.QueryMemoriesRequest(query=query, top_k=10)
            began = time.perf_counter()
            await stub.QueryMemories(request, metadata=metadata)
            return time.perf_counter() - began

        for _ in range(50):
            await ask()
        yield ask


async def _import(stub: Stub, metadata: tuple[tuple[str, str], ...], said: Sequence[str]) -> None:
    own = [memory.Memory(content=f"{n} {said[n % len(said)]}") for n in range(_OWN)]
    chunks = [
        memory.ImportMemoriesRequest(memories=own[at : at + 200]) for at in range(0, _OWN, 200)
    ]
    await stub.ImportMemories(iter(chunks), metadata=metadata)


async def _run(
    mesh: Mesh,
    owner: asyncpg.Connection,
    ask: Callable[[], Awaitable[float]],
    *,
    full: bool,
) -> Run:
    """Ask for a run of all users, and wait for its end with questions meanwhile."""
    peaks, taken = Peaks(), list[float]()
    names = ["memory", *(name for name in mesh.processes if name.startswith("worker-"))]
    names = [name for name in names if not name.endswith("-sidecar")]
    watching = asyncio.create_task(peaks.watch(mesh, names))
    asking = asyncio.create_task(_ask_on(ask, taken))
    began = time.perf_counter()
    run = await _planned(mesh, owner, full=full)
    await _ended(owner, run)
    seconds = time.perf_counter() - began
    for task in (watching, asking):
        task.cancel()
    await asyncio.wait([watching, asking])
    done = await owner.fetchrow(
        """
        SELECT sum(processed)::bigint AS processed, sum(scored)::bigint AS scored,
               sum(archived)::bigint AS archived
          FROM meditation_shards
         WHERE meditation_id = $1
        """,
        run,
    )
    processed, scored, archived = done
    return Run(seconds, processed, scored, archived, latency_of(taken), peaks)


async def _ended(owner: asyncpg.Connection, run: UUID) -> None:
    running = "SELECT true FROM meditations WHERE id = $1 AND state = 'running'"
    while await owner.fetchval(running, run):  # noqa: ASYNC110 - other processes do the work
        await asyncio.sleep(_POLL_SECONDS)


async def _planned(mesh: Mesh, owner: asyncpg.Connection, *, full: bool) -> UUID:
    pool = await open_pool(mesh.stores.dsn(SYSTEM), size=1, name="bench")
    async with SystemDatabase(pool).transaction() as connection:
        job_id = await enqueue(connection, kind="meditation.plan", payload={"full": full})
    await pool.close()
    while True:
        run: UUID | None = await owner.fetchval(
            "SELECT id FROM meditations WHERE job_id = $1", job_id
        )
        if run:
            return run
        await asyncio.sleep(_POLL_SECONDS)


async def _ask_on(ask: Callable[[], Awaitable[float]], taken: list[float]) -> None:
    while True:
        taken.append(await ask())
        await asyncio.sleep(_PAUSE_SECONDS)


# --- the floor


async def _floor(owner: asyncpg.Connection) -> list[Row]:
    """Copy everything out, and write scores for all of it, in batches and nothing else."""
    count: int = await owner.fetchval("SELECT count(*) FROM memory_scores")
    began = time.perf_counter()

    async def drop(chunk: bytes) -> None:
        """Forget a chunk."""

    await owner.copy_from_query(
        """
        SELECT user_id, memory_id, last_seen_at, use_count, retrieved_count, useful_count,
               feedback, sentiment
          FROM memory_scores
         ORDER BY user_id, memory_id
        """,
        output=drop,
        format="binary",
    )
    copied = time.perf_counter() - began
    keys = await owner.fetch(
        "SELECT user_id, memory_id FROM memory_scores ORDER BY user_id, memory_id"
    )
    began = time.perf_counter()
    for at in range(0, count, _FLOOR_BATCH):
        batch = keys[at : at + _FLOOR_BATCH]
        await owner.execute(
            """
            UPDATE memory_scores AS memory
               SET score = batch.score
              FROM unnest($1::uuid[], $2::uuid[], $3::real[]) AS batch (user_id, memory_id, score)
             WHERE memory.user_id = batch.user_id AND memory.memory_id = batch.memory_id
            """,
            [row["user_id"] for row in batch],
            [row["memory_id"] for row in batch],
            np.random.default_rng(at).random(len(batch)).tolist(),
        )
    updated = time.perf_counter() - began
    return [
        Row("floor: COPY out, ordered", f"{count / copied:,.0f}/s", "the columns of a batch"),
        Row(
            "floor: narrow UPDATE from arrays", f"{count / updated:,.0f}/s", "one column of scores"
        ),
    ]


async def _wide(owner: asyncpg.Connection) -> Row:
    """Score in the database, in rows that hold the texts."""
    await owner.execute(
        """
        CREATE TABLE wide AS
        SELECT memory.user_id, memory.id, memory.content || repeat(' and more', 40) AS content,
               memory.terms, scores.last_seen_at, scores.use_count, scores.retrieved_count,
               scores.useful_count, scores.sentiment, scores.score, scores.relevance_to_goals,
               scores.emotional_weight, scores.predictive_value, scores.recency_frequency,
               scores.scored_at
          FROM memories AS memory
          JOIN memory_scores AS scores
            ON scores.user_id = memory.user_id AND scores.memory_id = memory.id;
        ALTER TABLE wide ADD PRIMARY KEY (user_id, id)
        """
    )
    began = time.perf_counter()
    status = await owner.execute(
        """
        UPDATE wide
           SET score = 0.4 * 0.5 + 0.3 * emotion + 0.2 * prediction + 0.1 * recency,
               relevance_to_goals = 0.5, emotional_weight = emotion,
               predictive_value = prediction, recency_frequency = recency, scored_at = now()
          FROM (SELECT user_id AS whose, id AS which, sentiment AS emotion,
                       (useful_count + 1.0) / (retrieved_count + 2) / (1 + days) AS prediction,
                       (exp(-days / 30) + least(use_count / 10.0, 1)) / 2 AS recency
                  FROM (SELECT *, date_part('epoch', now() - last_seen_at) / 86400 AS days
                          FROM wide) AS aged) AS part
         WHERE user_id = whose AND id = which
        """,
        timeout=300,
    )
    seconds = time.perf_counter() - began
    rows = int(status.removeprefix("UPDATE "))
    return Row("one UPDATE of a wide table", f"{rows / seconds:,.0f}/s", f"{seconds:.1f} s")


if __name__ == "__main__":
    app()
