"""The memory process: the three tiers, and what workers do to them."""

from contextlib import AsyncExitStack
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
from server.database import SystemDatabase
from server.embedding_models import load_embedders
from server.erased import ErasedUsers
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


async def compose(settings: Settings, stack: AsyncExitStack) -> Application:
    """Return what the memory process serves; what it opened is closed with the stack."""
    # Before anything is opened: whoever names a wrong folder is told at once.
    vectors = _question_vectors(settings)
    database, system = await stack.enter_async_context(open_databases(settings, "memory"))
    keys = await open_remote_keys(settings, stack)
    ended = await known_ended_grants(system)
    kms = await open_kms(settings, stack)
    data_keys = DataKeys(database, kms)
    opener = Opener(data_keys)
    redis = open_redis(settings, stack)
    blobs = open_blobs(settings)
    doomed = DoomedObjects(database, blobs)
    url_lifetime = timedelta(seconds=settings.upload_url_seconds)
    search = SearchStore(database)
    shared = SharedStore(database)
    answers = Answers(redis)
    short_term = ShortTermStore(redis, database, timedelta(seconds=settings.short_term_seconds))
    counts = RetrievalCounts(system, short_term)
    embeddings = EmbeddingStore(database)
    changes = ChangeStore(system)
    feed = Feed(changes)
    reads = AgentReads(database)
    collection = Collection(BulkStore(database), short_term, opener, reads)
    promotion = Promotion(database, short_term)
    transcripts = Transcripts(database, blobs, doomed, url_lifetime)
    exporter = Exporter(collection, changes)
    store = MemoryStore(database, data_keys)
    memories = MemoryService(
        store,
        BatchStore(database, data_keys),
        LifecycleStore(database),
        UsageStore(database),
        search,
        shared,
        embeddings,
        short_term,
        promotion,
        Sessions(database, short_term, promotion, collection, search, transcripts),
        Queries(
            Retrieval(
                search,
                EmbeddingSearch(database),
                short_term,
                shared,
                opener,
                utc_now,
                vectors=vectors,
            ),
            answers,
            counts,
        ),
        Attachments(AttachmentStore(database), blobs, doomed, url_lifetime),
        transcripts,
        MeditationStore(database),
        Undoing(system),
        GoalStore(database),
        Streams(
            Importer(ImportStore(database, data_keys), utc_now),
            exporter,
            Watcher(feed, collection.some, session_seconds=watch_seconds(settings)),
        ),
        opener,
        reads,
        utc_now,
    )
    retention = RetentionStore(system)
    rounds = PromotionRounds(system, short_term, promotion, utc_now)
    scoring = _scoring(settings, system, retention, promotion, rounds)
    agent_work = AgentWorkService(
        AgentJobs(database, system), store, short_term, opener, reads, utc_now
    )
    embedding = EmbeddingService(EmbeddingJobs(database, system), embeddings)
    maintenance = MaintenanceService(
        KeyRotation(system, kms),
        ReindexStore(database, data_keys),
        _sweep(settings, system, blobs),
        retention,
        rounds,
        utc_now,
    )
    erased = ErasedUsers(system)
    privacy_work = PrivacyWorkService(
        _eraser(settings, system, data_keys, blobs, redis),
        UserExporter(
            ExportStore(database, timedelta(days=settings.export_days)),
            Dumper(database, system),
            Histories(exporter, LifecycleStore(database), short_term, opener),
            blobs,
        ),
    )
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
        erased,
        open_toll(settings, stack, system),
        loops=[blobs.keep_versions, feed.run, answers.run, counts.run],
        readings=[
            readings.usage,
            readings.meditations,
            readings.interrupted,
            readings.vectors,
            ShortTermReading(redis).held,
        ],
        announce_drain=feed.drain,
    )


def _question_vectors(settings: Settings) -> QuestionVectors:
    directory = settings.question_models_directory
    return QuestionVectors(load_embedders(directory) if directory else None)


def _scoring(
    settings: Settings,
    system: SystemDatabase,
    retention: RetentionStore,
    promotion: Promotion,
    rounds: PromotionRounds,
) -> ScoringService:
    return ScoringService(
        ScoringStore(system, settings.meditation_shards, writers=settings.scoring_writers),
        Tidying(
            system,
            retention,
            promotion,
            rounds,
            utc_now,
            most_a_day=settings.archived_a_day,
        ),
    )


def _eraser(
    settings: Settings, system: SystemDatabase, data_keys: DataKeys, blobs: Blobs, redis: Redis
) -> Eraser:
    return Eraser(
        system,
        ErasureStore(system, patience(settings)),
        data_keys,
        blobs,
        redis,
        object_kinds=(*Kind, withdrawals.KIND),
    )


def _sweep(settings: Settings, system: SystemDatabase, blobs: Blobs) -> Sweep:
    return Sweep(
        system,
        blobs,
        utc_now,
        url_lifetime=timedelta(seconds=settings.upload_url_seconds),
        margin=timedelta(seconds=settings.sweep_margin_seconds),
    )
