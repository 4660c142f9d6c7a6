"""The memory service of one test, behind the real chain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest
import pytest_asyncio
from kimberly.embedding.v1 import embedding_pb2_grpc as embedding_rpc
from kimberly.maintenance.v1 import maintenance_pb2_grpc as maintenance_rpc
from kimberly.memory.v1 import memory_pb2_grpc as rpc
from kimberly.scoring.v1 import scoring_pb2_grpc as scoring_rpc

from server.blobs import Blobs
from server.cache import Redis
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.jobs.queue import Queue
from server.kms.local import LocalKms
from server.memory import answers as kept_answers
from server.memory import legs, objects
from server.memory.agent_reads import AgentReads
from server.memory.answers import Answers
from server.memory.attachment_store import AttachmentStore
from server.memory.attachments import Attachments
from server.memory.batch_store import BatchStore
from server.memory.bulk_store import BulkStore
from server.memory.change_store import ChangeStore
from server.memory.collection import Collection
from server.memory.embedding_jobs import EmbeddingJobs
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embedding_service import EmbeddingService
from server.memory.embedding_store import SCANNED, EmbeddingStore
from server.memory.exporting import Exporter
from server.memory.goal_store import GoalStore
from server.memory.import_store import ImportStore
from server.memory.importing import Importer
from server.memory.lifecycle_store import LifecycleStore
from server.memory.meditation_store import MeditationStore
from server.memory.objects import DoomedObjects
from server.memory.promotion import Promotion
from server.memory.query_handlers import Queries
from server.memory.retrieval import Retrieval
from server.memory.retrieval_counts import RetrievalCounts
from server.memory.scoring_service import ScoringService
from server.memory.scoring_store import ScoringStore
from server.memory.search_store import SearchStore
from server.memory.sensitive import Opener
from server.memory.service import MemoryService
from server.memory.sessions import Sessions
from server.memory.shared_store import SharedStore
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.stream_handlers import Streams
from server.memory.tidying import Tidying
from server.memory.transcripts import Transcripts
from server.memory.undoing import Undoing
from server.memory.usage_store import UsageStore
from server.memory.watching import Feed, Watcher
from tests.conftest import FakeClock, Serve, data_keys_of, new_caller
from tests.maintenance import maintenance_service, tidying_of
from tests.memory.embedding_calls import choose, consent
from tests.memory.scoring_calls import SHARDS

URL_LIFETIME = timedelta(minutes=15)


@pytest.fixture
def patience_seconds() -> float:
    """How long queries wait for parts that they can do without: longer than a machine is busy."""
    return 30.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch, patience_seconds: float) -> None:
    monkeypatch.setattr(legs, "PATIENCE_SECONDS", patience_seconds)
    monkeypatch.setattr(kept_answers, "_PATIENCE_SECONDS", patience_seconds)
    monkeypatch.setattr(objects, "_PATIENCE_SECONDS", patience_seconds)


@pytest.fixture
def store(database: Database) -> MemoryStore:
    return MemoryStore(database, data_keys_of(database))


@pytest.fixture
def short_term(redis: Redis, database: Database) -> ShortTermStore:
    return ShortTermStore(redis, database, timedelta(days=1))


@pytest.fixture
def scanned() -> int:
    """How many vectors of a user and model are scanned; those above are in a graph."""
    return SCANNED


@pytest.fixture
def embeddings(database: Database, scanned: int) -> EmbeddingStore:
    return EmbeddingStore(database, scanned)


@pytest_asyncio.fixture
async def feed(system_database: SystemDatabase) -> AsyncIterator[Feed]:
    """The look-out for changes."""
    feed = Feed(ChangeStore(system_database), poll_seconds=0.02, patience_seconds=60)
    running = asyncio.create_task(feed.run())
    yield feed
    running.cancel()
    await asyncio.wait([running])


@pytest_asyncio.fixture
async def plans(owner: asyncpg.Connection) -> AsyncIterator[None]:
    """Gives the plans their sizes back, and takes away new ones: all tests have the same."""
    sizes = "short_term_bytes, long_term_bytes, permanent_bytes, vectors"
    before = await owner.fetch(f"SELECT name, {sizes} FROM plans")
    yield
    await owner.executemany(
        f"UPDATE plans SET ({sizes}) = ROW ($2, $3, $4, $5) WHERE name = $1",
        [tuple(row) for row in before],
    )
    names = [row["name"] for row in before]
    await owner.execute("DELETE FROM subscriptions WHERE plan <> ALL ($1)", names)
    await owner.execute("DELETE FROM plans WHERE name <> ALL ($1)", names)


@pytest.fixture
def session_seconds() -> float:
    """How long one may watch."""
    return 60.0


@pytest.fixture
def retrieval(database: Database, short_term: ShortTermStore, clock: FakeClock) -> Retrieval:
    return Retrieval(
        SearchStore(database),
        EmbeddingSearch(database),
        short_term,
        SharedStore(database),
        Opener(data_keys_of(database)),
        clock,
    )


@pytest.fixture
def counts(system_database: SystemDatabase, short_term: ShortTermStore) -> RetrievalCounts:
    """Writes only when a test says so."""
    return RetrievalCounts(system_database, short_term)


@pytest.fixture
def answers(redis: Redis) -> Answers:
    """Keeps answers only when a test says so."""
    return Answers(redis, from_the_first=True)


@pytest_asyncio.fixture
async def memories(
    serve: Serve,
    store: MemoryStore,
    short_term: ShortTermStore,
    embeddings: EmbeddingStore,
    retrieval: Retrieval,
    answers: Answers,
    counts: RetrievalCounts,
    database: Database,
    system_database: SystemDatabase,
    feed: Feed,
    session_seconds: float,
    blobs: Blobs,
    clock: FakeClock,
) -> rpc.MemoryServiceAsyncStub:
    """A stub of the memory service."""
    doomed = DoomedObjects(database, blobs)
    opener = Opener(data_keys_of(database))
    reads = AgentReads(database)
    collection = Collection(BulkStore(database), short_term, opener, reads)
    promotion = Promotion(database, short_term)
    transcripts = Transcripts(database, blobs, doomed, URL_LIFETIME)
    service = MemoryService(
        store,
        BatchStore(database, data_keys_of(database)),
        LifecycleStore(database),
        UsageStore(database),
        SearchStore(database),
        SharedStore(database),
        embeddings,
        short_term,
        promotion,
        Sessions(database, short_term, promotion, collection, SearchStore(database), transcripts),
        Queries(retrieval, answers, counts),
        Attachments(AttachmentStore(database), blobs, doomed, URL_LIFETIME),
        transcripts,
        MeditationStore(database),
        Undoing(system_database),
        GoalStore(database),
        Streams(
            Importer(ImportStore(database, data_keys_of(database)), clock),
            Exporter(collection, ChangeStore(system_database)),
            Watcher(
                feed,
                collection.some,
                session_seconds=session_seconds,
                heartbeat_seconds=0.2,
            ),
        ),
        opener,
        reads,
        clock,
    )
    channel = await serve(lambda server: rpc.add_MemoryServiceServicer_to_server(service, server))
    return rpc.MemoryServiceStub(channel)


@pytest.fixture
def promotion(database: Database, short_term: ShortTermStore) -> Promotion:
    return Promotion(database, short_term)


@pytest.fixture
def meditations(database: Database) -> MeditationStore:
    return MeditationStore(database)


@pytest.fixture
def scoring_store(system_database: SystemDatabase) -> ScoringStore:
    return ScoringStore(system_database, SHARDS)


@pytest.fixture
def most_a_day() -> int:
    """How many memories of a user are archived a day for want of room."""
    return 1000


@pytest.fixture
def tidying(
    database: Database,
    system_database: SystemDatabase,
    redis: Redis,
    clock: FakeClock,
    most_a_day: int,
) -> Tidying:
    return tidying_of(database, system_database, redis, clock, most_a_day=most_a_day)


@pytest_asyncio.fixture
async def scoring(
    serve: Serve, scoring_store: ScoringStore, tidying: Tidying
) -> scoring_rpc.ScoringServiceAsyncStub:
    service = ScoringService(scoring_store, tidying)
    channel = await serve(
        lambda server: scoring_rpc.add_ScoringServiceServicer_to_server(service, server)
    )
    return scoring_rpc.ScoringServiceStub(channel)


@pytest_asyncio.fixture
async def chooser(database: Database, system_database: SystemDatabase) -> Caller:
    """A user who consented and chose a model."""
    caller = await new_caller(database)
    await consent(system_database, caller)
    await choose(database, caller)
    return caller


@pytest.fixture
def queue(system_database: SystemDatabase) -> Queue:
    """The queue of jobs, for tests that do them without a worker."""
    return Queue(system_database, lease_seconds=30)


@pytest_asyncio.fixture
async def embedding(
    serve: Serve, database: Database, system_database: SystemDatabase
) -> embedding_rpc.EmbeddingServiceAsyncStub:
    """A stub of the embedding service."""
    service = EmbeddingService(EmbeddingJobs(database, system_database), EmbeddingStore(database))
    channel = await serve(
        lambda server: embedding_rpc.add_EmbeddingServiceServicer_to_server(service, server)
    )
    return embedding_rpc.EmbeddingServiceStub(channel)


@pytest_asyncio.fixture
async def maintenance_channel(
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    blobs: Blobs,
    redis: Redis,
    clock: FakeClock,
    master_key: Path,
) -> grpc.aio.Channel:
    """Leads to the maintenance service."""
    service = maintenance_service(
        database, system_database, LocalKms(master_key), blobs, redis, clock
    )
    return await serve(
        lambda server: maintenance_rpc.add_MaintenanceServiceServicer_to_server(service, server)
    )
