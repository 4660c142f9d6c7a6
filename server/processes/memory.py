"""The memory process: the three tiers, and what workers do to them."""

from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import timedelta

import grpc
from kimberly.agents.v1 import agents_pb2_grpc
from kimberly.embedding.v1 import embedding_pb2_grpc
from kimberly.maintenance.v1 import maintenance_pb2_grpc
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.privacy.v1 import privacy_pb2_grpc
from kimberly.scoring.v1 import scoring_pb2_grpc

from server.blobs import Blobs
from server.cache import Redis
from server.clock import utc_now
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase
from server.embedding_models import load_embedders
from server.erased import ErasedUsers
from server.kms import Kms
from server.memory.agent_jobs import AgentJobs
from server.memory.agent_reads import AgentReads
from server.memory.agent_work_service import AgentWorkService
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
from server.memory.embedding_store import EmbeddingStore
from server.memory.exporting import Exporter
from server.memory.goal_store import GoalStore
from server.memory.histories import Histories
from server.memory.import_store import ImportStore
from server.memory.importing import Importer
from server.memory.key_rotation import KeyRotation
from server.memory.lifecycle_store import LifecycleStore
from server.memory.maintenance_service import MaintenanceService
from server.memory.meditation_store import MeditationStore
from server.memory.metrics import MemoryReadings, ShortTermReading
from server.memory.objects import DoomedObjects, Kind
from server.memory.promotion import Promotion
from server.memory.promotion_rounds import PromotionRounds
from server.memory.query_handlers import Queries
from server.memory.question_vectors import QuestionVectors
from server.memory.reindex_store import ReindexStore
from server.memory.retention_store import RetentionStore
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
from server.memory.sweeping import Sweep
from server.memory.tidying import Tidying
from server.memory.transcripts import Transcripts
from server.memory.undoing import Undoing
from server.memory.usage_store import UsageStore
from server.memory.watching import Feed, Watcher
from server.privacy.dumping import Dumper
from server.privacy.erasing import Eraser
from server.privacy.erasure_store import ErasureStore
from server.privacy.export_store import ExportStore
from server.privacy.exporting import UserExporter
from server.privacy.work_service import PrivacyWorkService
from server.processes.parts import (
    Application,
    known_ended_grants,
    open_blobs,
    open_databases,
    open_kms,
    open_redis,
    open_remote_keys,
    open_toll,
    patience,
    watch_seconds,
)
from server.settings import Settings
from server.users import withdrawals


@dataclass(frozen=True, slots=True)
class _Parts:
    """What is open, and what more than one service of this process works with."""

    database: Database
    system: SystemDatabase
    kms: Kms
    redis: Redis
    blobs: Blobs
    data_keys: DataKeys
    opener: Opener
    store: MemoryStore
    short_term: ShortTermStore
    embeddings: EmbeddingStore
    promotion: Promotion
    rounds: PromotionRounds
    retention: RetentionStore
    reads: AgentReads
    collection: Collection
    exporter: Exporter


@dataclass(frozen=True, slots=True)
class _Running:
    """What memories are asked by, and has a loop of its own until the process stops."""

    feed: Feed
    answers: Answers
    counts: RetrievalCounts


async def compose(settings: Settings, stack: AsyncExitStack) -> Application:
    """Return what the memory process serves; what it opened is closed with the stack."""
    # Before anything is opened: whoever names a wrong folder is told at once.
    vectors = _question_vectors(settings)
    database, system = await stack.enter_async_context(open_databases(settings, "memory"))
    keys = await open_remote_keys(settings, stack)
    ended = await known_ended_grants(system)
    kms = await open_kms(settings, stack)
    redis, blobs = open_redis(settings, stack), open_blobs(settings)
    changes = ChangeStore(system)
    parts = _parts(settings, database, system, kms, redis, blobs, changes)
    running = _Running(Feed(changes), Answers(redis), RetrievalCounts(system, parts.short_term))
    memories = _memories(settings, parts, running, vectors)
    scoring = _scoring(settings, parts)
    embedding = EmbeddingService(EmbeddingJobs(database, system), parts.embeddings)
    maintenance = _maintenance(settings, parts)
    agent_work = AgentWorkService(
        AgentJobs(database, system),
        parts.store,
        parts.short_term,
        parts.opener,
        parts.reads,
        utc_now,
    )
    privacy_work = _privacy_work(settings, parts)
    readings = MemoryReadings(system)

    def register(server: grpc.aio.Server) -> None:
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories, server)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring, server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(embedding, server)
        maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(maintenance, server)
        agents_pb2_grpc.add_AgentWorkServiceServicer_to_server(agent_work, server)
        privacy_pb2_grpc.add_PrivacyWorkServiceServicer_to_server(privacy_work, server)

    return Application(
        register,
        keys,
        ended,
        ErasedUsers(system),
        open_toll(settings, stack, system),
        loops=[blobs.keep_versions, running.feed.run, running.answers.run, running.counts.run],
        readings=[
            readings.usage,
            readings.meditations,
            readings.interrupted,
            readings.vectors,
            ShortTermReading(redis).held,
        ],
        announce_drain=running.feed.drain,
    )


def _question_vectors(settings: Settings) -> QuestionVectors:
    directory = settings.question_models_directory
    return QuestionVectors(load_embedders(directory) if directory else None)


def _parts(
    settings: Settings,
    database: Database,
    system: SystemDatabase,
    kms: Kms,
    redis: Redis,
    blobs: Blobs,
    changes: ChangeStore,
) -> _Parts:
    data_keys = DataKeys(database, kms)
    opener = Opener(data_keys)
    short_term = ShortTermStore(redis, database, timedelta(seconds=settings.short_term_seconds))
    promotion = Promotion(database, short_term)
    reads = AgentReads(database)
    collection = Collection(BulkStore(database), short_term, opener, reads)
    return _Parts(
        database=database,
        system=system,
        kms=kms,
        redis=redis,
        blobs=blobs,
        data_keys=data_keys,
        opener=opener,
        store=MemoryStore(database, data_keys),
        short_term=short_term,
        embeddings=EmbeddingStore(database),
        promotion=promotion,
        rounds=PromotionRounds(system, short_term, promotion, utc_now),
        retention=RetentionStore(system),
        reads=reads,
        collection=collection,
        exporter=Exporter(collection, changes),
    )


def _memories(
    settings: Settings, parts: _Parts, running: _Running, vectors: QuestionVectors
) -> MemoryService:
    database, short_term, opener = parts.database, parts.short_term, parts.opener
    search, shared = SearchStore(database), SharedStore(database)
    url_lifetime = timedelta(seconds=settings.upload_url_seconds)
    doomed = DoomedObjects(database, parts.blobs)
    transcripts = Transcripts(database, parts.blobs, doomed, url_lifetime)
    retrieval = Retrieval(
        search,
        EmbeddingSearch(database),
        short_term,
        shared,
        opener,
        utc_now,
        vectors=vectors,
    )
    return MemoryService(
        parts.store,
        BatchStore(database, parts.data_keys),
        LifecycleStore(database),
        UsageStore(database),
        search,
        shared,
        parts.embeddings,
        short_term,
        parts.promotion,
        Sessions(database, short_term, parts.promotion, parts.collection, search, transcripts),
        Queries(retrieval, running.answers, running.counts),
        Attachments(AttachmentStore(database), parts.blobs, doomed, url_lifetime),
        transcripts,
        MeditationStore(database),
        Undoing(parts.system),
        GoalStore(database),
        Streams(
            Importer(ImportStore(database, parts.data_keys), utc_now),
            parts.exporter,
            Watcher(running.feed, parts.collection.some, session_seconds=watch_seconds(settings)),
        ),
        opener,
        parts.reads,
        utc_now,
    )


def _scoring(settings: Settings, parts: _Parts) -> ScoringService:
    return ScoringService(
        ScoringStore(parts.system, settings.meditation_shards, writers=settings.scoring_writers),
        Tidying(
            parts.system,
            parts.retention,
            parts.promotion,
            parts.rounds,
            utc_now,
            most_a_day=settings.archived_a_day,
        ),
    )


def _maintenance(settings: Settings, parts: _Parts) -> MaintenanceService:
    sweep = Sweep(
        parts.system,
        parts.blobs,
        utc_now,
        url_lifetime=timedelta(seconds=settings.upload_url_seconds),
        margin=timedelta(seconds=settings.sweep_margin_seconds),
    )
    return MaintenanceService(
        KeyRotation(parts.system, parts.kms),
        ReindexStore(parts.database, parts.data_keys),
        sweep,
        parts.retention,
        parts.rounds,
        utc_now,
    )


def _privacy_work(settings: Settings, parts: _Parts) -> PrivacyWorkService:
    eraser = Eraser(
        parts.system,
        ErasureStore(parts.system, patience(settings)),
        parts.data_keys,
        parts.blobs,
        parts.redis,
        object_kinds=(*Kind, withdrawals.KIND),
    )
    database = parts.database
    exporter = UserExporter(
        ExportStore(database, timedelta(days=settings.export_days)),
        Dumper(database, parts.system),
        Histories(parts.exporter, LifecycleStore(database), parts.short_term, parts.opener),
        parts.blobs,
    )
    return PrivacyWorkService(eraser, exporter)
