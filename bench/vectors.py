"""python -m bench.vectors: what a search by vectors finds of what looking at all of them finds."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Final
from uuid import UUID

import asyncpg
import numpy as np
import numpy.typing as npt
import typer
from pgvector import HalfVector

from bench import conversations
from bench.conversations import DataError
from bench.progress import notices, step
from bench.table import markdown
from local.layout import Layout
from local.postgres import APPLICATION, OWNER, SUPERUSER
from local.servers import Stores
from server.caller import Caller
from server.database import Database, open_pool, type_codecs
from server.memory import ranking
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embedding_store import GRAPH_DIMENSIONS, SCANNED
from server.memory.embeddings import Embedding
from server.memory.model import Filter
from server.migrate import migrate, read_migrations

_MODEL: Final = "bench"
_LIMIT: Final = 100
"""So many candidates answers of ten and of twenty are made of."""
_DEPTHS: Final = (10, 20)
_SHARES: Final = (0.001, 0.01, 0.1)
_OTHERS: Final = 0.1
"""What each of the others has."""
_TALK: Final = 20
"""How many random vectors are one talk."""
_SHIFT: Final = 0.5
"""Length of what the vectors of one talk have in common, beside what they were made from."""
_NOISE: Final = 0.5
"""Length of what sets a vector apart from the one that it was made from."""
_WARM_UP: Final = 10
_HEAD: Final = (
    "owns", "rows", "in the graph", "recall@10", "recall@20", "fewest found", "p50", "p99",
)  # fmt: skip

Vectors = npt.NDArray[np.float32]
Talk = Vectors
"""The vectors of its turns, a row each."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Kind(StrEnum):
    """What the vectors are like."""

    TALKS = "talks"
    """Sessions of the conversations, again and again, each time moved and with noise."""
    RANDOM = "random"
    """Directions that have nothing to do with each other: the worst there is."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A user, and what share of the rows they own."""

    number: int
    share: float
    rows: int
    in_graph: int

    @property
    def caller(self) -> Caller:
        """Who they are, alone in their tenant."""
        whose = UUID(int=(self.number + 1) << 96)
        return Caller(whose, whose)

    def memory_id(self, place: int) -> UUID:
        """Return the id of one of their memories."""
        return UUID(int=self.caller.user_id.int + place)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be there, and what it is made from."""

    kind: Kind
    rows: int
    scanned: int
    sessions: Sequence[Talk]
    questions: Vectors

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        dimension: int = self.questions.shape[1]
        return dimension

    @property
    def owners(self) -> list[Owner]:
        """Who owns the rows: first those who ask, then the others."""
        rest = 1 - sum(_SHARES)
        shares = [*_SHARES, *[_OTHERS] * int(rest / _OTHERS)]
        shares.append(1 - sum(shares))
        return [self._owner(number, share) for number, share in enumerate(shares)]

    @property
    def name(self) -> str:
        """Another one for each plan, for a database."""
        return f"vectors_{self.kind}_{self.dimension}_{self.rows}_{self.scanned}"

    def talks(self, owner: Owner) -> list[Talk]:
        """Return what a user's vectors are, of length 1 but for what a half number loses."""
        dice = np.random.default_rng(owner.number)
        talks: list[Talk] = []
        left = owner.rows
        while left:
            made = self._talk(dice)[:left].astype(np.float16).astype(np.float32)
            talks.append(made)
            left -= len(made)
        return talks

    def _owner(self, number: int, share: float) -> Owner:
        rows = round(share * self.rows)
        return Owner(number, share, rows, max(rows - self.scanned, 0))

    def _talk(self, dice: np.random.Generator) -> Talk:
        if self.kind is Kind.RANDOM:
            return _directions(dice, _TALK, self.dimension)
        session = self.sessions[int(dice.integers(len(self.sessions)))]
        shift = _SHIFT * _directions(dice, 1, self.dimension)
        return _unit(session + shift + _NOISE * _directions(dice, *session.shape))


@dataclass(frozen=True, slots=True)
class Found:
    """What one question brought."""

    amounts: dict[UUID, float]
    seconds: float


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=10_000, help="Vectors of all users.")] = 100_000,
    kind: Annotated[Kind, typer.Option(help="What the vectors are like.")] = Kind.TALKS,
    scanned: Annotated[
        int, typer.Option(min=0, help="How many of each user are in no graph; 0 is the worst.")
    ] = SCANNED,
    questions: Annotated[int, typer.Option(min=10, help="How many are asked.")] = 200,
    data: Annotated[
        Path, typer.Option(envvar="BENCH_DATA", help="The conversations, as JSON.")
    ] = conversations.DATA,
    always_by_graph: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option(help="Search the graph where a scan costs less, too.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="Where the vectors stay, for a next time.")
    ] = None,
) -> None:
    """Measure the search by vectors of users who own 0.1, 1 and 10 % of the rows, in process.

    Recall is the share of the nearest ten and twenty that is among those found. What is nearest is
    worked out here, from the vectors and the rule that a turn counts together with those around
    it. `fewest found` is of the hundred candidates that are asked for.

    Let nothing else run meanwhile. 100 000 rows take a minute to make, 300 000 three.
    """
    try:
        plan = _plan(kind, rows, scanned, questions, data)
    except DataError as error:
        notices.print(error)
        raise typer.Exit(1) from error
    with _directory(state) as directory:
        table = asyncio.run(_measure(plan, directory, always_by_graph=always_by_graph))
    print(f"{rows:,} vectors of {plan.dimension} numbers, {kind}:\n\n{markdown(_HEAD, table)}")


@contextmanager
def _directory(state: Path | None) -> Iterator[Path]:
    if state:
        yield state.resolve()
        return
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        yield Path(directory)


def _plan(kind: Kind, rows: int, scanned: int, questions: int, data: Path) -> Plan:
    told = conversations.load(data)
    sessions: dict[tuple[str, str], list[Vectors]] = {}
    for one in told:
        for turn in one.turns:
            if turn.vector is None:
                raise DataError(f"there are no vectors beside {data}")
            sessions.setdefault((one.name, turn.session), []).append(turn.vector)
    talks = [_unit(np.array(vectors)) for vectors in sessions.values()]
    dice = np.random.default_rng(0)
    asked = np.array([question.vector for one in told for question in one.questions])
    if kind is Kind.RANDOM:
        asked = _directions(dice, questions, asked.shape[1])
    chosen = dice.permutation(len(asked))[:questions]
    plan = Plan(kind, rows, scanned, talks, _unit(asked[chosen]))
    if plan.dimension not in GRAPH_DIMENSIONS:
        raise DataError(f"there is no graph of {plan.dimension} dimensions")
    return plan


async def _measure(plan: Plan, directory: Path, *, always_by_graph: bool) -> list[list[str]]:
    async with Stores(Layout(directory)) as stores:
        await _make(stores, plan)
        url = stores.dsn(APPLICATION, plan.name)
        async with await open_pool(url, size=2, name="bench") as pool:
            search = EmbeddingSearch(Database(pool), always_by_graph=always_by_graph)
            asking = plan.owners[: len(_SHARES)]
            return [await _asked(search, plan, owner) for owner in asking]


async def _asked(search: EmbeddingSearch, plan: Plan, owner: Owner) -> list[str]:
    """Ask all questions of one user, and return the row of the table."""
    embeddings = [Embedding(_MODEL, values) for values in plan.questions]
    for embedding in embeddings[:_WARM_UP]:
        await _ask(search, owner, embedding)
    found = []
    with step(f"asking who owns {owner.share:.1%}", len(embeddings)) as advance:
        for embedding in embeddings:
            found.append(await _ask(search, owner, embedding))
            advance(1)
    exact = _exact(plan, owner)
    recalls = [_recall(owner, found, exact, depth) for depth in _DEPTHS]
    p50, p99 = np.percentile([one.seconds * 1_000 for one in found], [50, 99])
    return [
        f"{owner.share:.1%}",
        f"{owner.rows:,}",
        f"{owner.in_graph:,}",
        *(f"{recall:.3f}" for recall in recalls),
        str(min(len(one.amounts) for one in found)),
        f"{p50:.1f} ms",
        f"{p99:.1f} ms",
    ]


async def _ask(search: EmbeddingSearch, owner: Owner, embedding: Embedding) -> Found:
    started = time.perf_counter()
    near = await search.nearest(owner.caller, embedding, Filter(), _LIMIT)
    seconds = time.perf_counter() - started
    return Found({one.id: one.amount for one in near.candidates}, seconds)


def _exact(plan: Plan, owner: Owner) -> npt.NDArray[np.float32]:
    """Return how near each memory is to each question: a row each memory."""
    return np.concatenate([_smoothed(talk @ plan.questions.T) for talk in plan.talks(owner)])


def _smoothed(cosines: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the weighted means over each turn of a talk and the turns around it."""
    turns = len(cosines)
    away = np.abs(np.subtract.outer(np.arange(turns), np.arange(turns)))
    weights = np.append(ranking.NEIGHBOURHOOD, 0.0)[
        np.minimum(away, len(ranking.NEIGHBOURHOOD))
    ].astype(np.float32)
    means: npt.NDArray[np.float32] = weights @ cosines / weights.sum(axis=1, keepdims=True)
    return means


def _recall(
    owner: Owner, found: Iterable[Found], exact: npt.NDArray[np.float32], depth: int
) -> float:
    """Return what share of the nearest is among the best of what was found, on average."""
    shares = []
    for question, one in enumerate(found):
        nearest = np.argsort(-exact[:, question])[:depth]
        wanted = {owner.memory_id(int(place)) for place in nearest}
        best = sorted(one.amounts, key=lambda key: -one.amounts[key])[:depth]
        shares.append(len(wanted & set(best)) / len(wanted))
    return float(np.mean(shares))


# --- what is there


async def _make(stores: Stores, plan: Plan) -> None:
    """Make the database of a plan, unless it is there."""
    postgres = stores.postgres
    async with _connected(stores, "postgres") as connection:
        if await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", plan.name):
            return
    draft = f"{plan.name}_draft"
    async with _connected(stores, "postgres") as connection:
        await connection.execute(f"DROP DATABASE IF EXISTS {draft}")
    await postgres.provision(draft)
    owner = await asyncpg.connect(stores.dsn(OWNER, draft))
    try:
        await migrate(owner, read_migrations())
    finally:
        await owner.close()
    async with _connected(stores, draft) as connection:
        await type_codecs(connection)
        await _fill(connection, plan)
    # In one step: what has the name was always finished.
    async with _connected(stores, "postgres") as connection:
        await connection.execute(f"ALTER DATABASE {draft} RENAME TO {plan.name}")


@asynccontextmanager
async def _connected(stores: Stores, database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(stores.dsn(SUPERUSER, database))
    try:
        yield connection
    finally:
        await connection.close()


async def _fill(connection: asyncpg.Connection, plan: Plan) -> None:
    """Insert all rows past triggers and foreign keys, and make the graph when they are there."""
    graph = f"embeddings_graph_{plan.dimension}"
    definition = await connection.fetchval("SELECT pg_get_indexdef($1::text::regclass)", graph)
    await connection.execute(f"DROP INDEX {graph}")
    await connection.execute("SET session_replication_role = replica")
    with step("inserting", plan.rows) as advance:
        for owner in plan.owners:
            await _insert(connection, plan, owner)
            advance(owner.rows)
    with step("making the graph", 1):
        await connection.execute("SET maintenance_work_mem = '2GB'")
        await connection.execute(definition)
    with step("looking through all of it", 1):
        await connection.execute("VACUUM (ANALYZE)")


async def _insert(connection: asyncpg.Connection, plan: Plan, owner: Owner) -> None:
    caller, talks = owner.caller, plan.talks(owner)
    places = [
        (talk, position) for talk in range(len(talks)) for position in range(len(talks[talk]))
    ]
    memory_ids = [owner.memory_id(place) for place in range(owner.rows)]
    hashes = [sha256(one.bytes).digest() for one in memory_ids]
    await connection.execute(
        """
        WITH of_user AS (
            INSERT INTO memory_usage (tenant_id, user_id, long_term_count)
            VALUES ($1, $2, cardinality($4::uuid[]))
        ), of_model AS (
            INSERT INTO embedding_models (tenant_id, user_id, model, dimension, in_graph)
            VALUES ($1, $2, $3, $8, $9)
        ), of_will AS (
            INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
            SELECT $1, $2, purpose, 1, true
              FROM unnest(ARRAY['memory.store', 'memory.embed']) AS purpose
        ), made AS (
            INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                                  session_position, occurred_at, size_bytes, content_hash,
                                  created_at, updated_at, terms)
            SELECT $1, $2, id, 'long_term', 'a turn of a talk', '{}', 'chat', session_id, position,
                   now(), 100, content_hash, now(), now(), '{1:1}/1000000000'::sparsevec
              FROM unnest($4::uuid[], $5::text[], $6::integer[], $7::bytea[])
                AS made (id, session_id, position, content_hash)
            RETURNING id
        )
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, now() FROM made
        """,
        caller.tenant_id,
        caller.user_id,
        _MODEL,
        memory_ids,
        [f"talk {talk}" for talk, _ in places],
        [position for _, position in places],
        hashes,
        plan.dimension,
        owner.in_graph > 0,
    )
    rows = np.concatenate(talks)
    # Which of a user's vectors are in the graph has nothing to do with what they mean.
    outside = set(np.random.default_rng(1).permutation(owner.rows)[: owner.rows - owner.in_graph])
    await connection.copy_records_to_table(
        "embeddings",
        columns=[
            "tenant_id", "user_id", "model", "memory_id", "dimension", "in_graph", "content_hash",
            "vector",
        ],
        records=(
            (
                caller.tenant_id, caller.user_id, _MODEL, memory_ids[place], plan.dimension,
                place not in outside, hashes[place], HalfVector(row),
            )
            for place, row in enumerate(rows)
        ),
    )  # fmt: skip


def _directions(dice: np.random.Generator, count: int, dimension: int) -> Vectors:
    return _unit(dice.normal(size=(count, dimension)))


def _unit(vectors: npt.NDArray[np.floating]) -> Vectors:
    unit: Vectors = (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)
    return unit


if __name__ == "__main__":
    app()
