"""The memory service of one test, behind the real chain."""

from __future__ import annotations

from datetime import timedelta

import pytest
import pytest_asyncio
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.blobs import Blobs
from server.cache import Redis
from server.database import Database
from server.memory.attachment_store import AttachmentStore
from server.memory.attachments import Attachments
from server.memory.embedding_search import EmbeddingSearch
from server.memory.embedding_store import SCANNED, EmbeddingStore
from server.memory.lifecycle_store import LifecycleStore
from server.memory.meditation_store import MeditationStore
from server.memory.retrieval import Retrieval
from server.memory.search_store import SearchStore
from server.memory.service import MemoryService
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.usage_store import UsageStore
from tests.conftest import FakeClock, Serve


@pytest.fixture
def store(database: Database) -> MemoryStore:
    return MemoryStore(database)


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
async def memories(
    serve: Serve,
    store: MemoryStore,
    short_term: ShortTermStore,
    embeddings: EmbeddingStore,
    database: Database,
    blobs: Blobs,
    clock: FakeClock,
) -> rpc.MemoryServiceAsyncStub:
    """A stub of the memory service."""
    service = MemoryService(
        store,
        LifecycleStore(database),
        UsageStore(database),
        SearchStore(database),
        embeddings,
        short_term,
        Retrieval(SearchStore(database), EmbeddingSearch(database), short_term, clock),
        Attachments(AttachmentStore(database), blobs, timedelta(minutes=15)),
        MeditationStore(database),
        clock,
    )
    channel = await serve(lambda server: rpc.add_MemoryServiceServicer_to_server(service, server))
    return rpc.MemoryServiceStub(channel)
