"""The composition root: settings become pools, pools services, services a server."""

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import structlog
from kimberly.auth.v1 import auth_pb2_grpc
from kimberly.billing.v1 import billing_pb2_grpc
from kimberly.embedding.v1 import embedding_pb2_grpc
from kimberly.jobs.v1 import jobs_pb2_grpc
from kimberly.maintenance.v1 import maintenance_pb2_grpc
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.privacy.v1 import privacy_pb2_grpc
from kimberly.scoring.v1 import scoring_pb2_grpc
from kimberly.users.v1 import users_pb2_grpc

from server import access, audit, ids, telemetry
from server.auth.access_tokens import Mint
from server.auth.api_key_store import ApiKeyStore
from server.auth.attempt_store import AttemptStore
from server.auth.breached import Breached, Commonplace, HashFile
from server.auth.housekeeping import Housekeeping
from server.auth.issuing import Issuer
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.auth.mail import Mailer, Outbox, Smtp
from server.auth.mail_store import MailStore
from server.auth.member_store import MemberStore
from server.auth.passwords import Passwords
from server.auth.postman import Postman
from server.auth.service import AuthService
from server.auth.session_store import SessionStore
from server.auth.store import AccountStore
from server.auth.tenant_service import TenantService
from server.billing.payments import ManualPayments
from server.billing.service import BillingService
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.blobs import Blobs
from server.cache import open_cache
from server.clock import utc_now
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase, open_pool
from server.enqueue import enqueue
from server.erased import ErasedUsers
from server.grants import EndedGrants
from server.jobs.doorbell import Doorbell
from server.jobs.forgetting import Forgetting
from server.jobs.queue import PLANS_OF_QUEUE, Queue
from server.jobs.schedule_store import ScheduleStore
from server.jobs.schedules import Planner, Schedule
from server.jobs.service import JobService
from server.jobs.store import JobStore
from server.jobs.watching import JobFeed
from server.jobs.worker_service import WorkerService
from server.kms import Kms
from server.kms.local import LocalKms
from server.kms.vault import Vault, open_vault
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
from server.memory.objects import DoomedObjects, Kind
from server.memory.promotion import Promotion
from server.memory.promotion_rounds import PromotionRounds
from server.memory.query_handlers import Queries
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
from server.migrate import migrate, read_migrations
from server.privacy.dumping import Dumper
from server.privacy.erasing import Eraser
from server.privacy.erasure_archive import ErasureArchive
from server.privacy.erasure_store import ErasureStore, Patience
from server.privacy.export_store import ExportStore
from server.privacy.exporting import UserExporter
from server.privacy.service import PrivacyService
from server.privacy.work_service import PrivacyWorkService
from server.provision import APPLICATION, OWNER, SYSTEM, Role, provision
from server.rpc.interceptors import chain
from server.rpc.serving import Server, channel_to_peers
from server.settings import MigrationSettings, ProvisionSettings, Settings
from server.tokens import KeySource, RemoteKeys, TokenVerifier
from server.users.audit_keys import AuditKeys
from server.users.audit_log import AuditLog
from server.users.audit_store import AuditStore
from server.users.checkpoint_archive import CheckpointArchive
from server.users.checkpoint_store import CheckpointStore
from server.users.checkpointer import Checkpointer
from server.users.service import UserService
from server.users.store import UserStore

log = structlog.get_logger()

REWRAP = "keys.rewrap"
"""The job that wraps data keys by the newest master key."""

_SESSION_PART = 0.8
"""Part of the longest time of a stream after which a worker is asked to connect anew."""

_COLLECTIONS = (50_000, 20, 20)
"""New objects before the young are looked at, and how much rarer the old ones are."""

Loop = Callable[[], Awaitable[Any]]


def _nothing() -> None:
    """Announce nothing: this process has no streams that live long."""


@dataclass(frozen=True, slots=True)
class Application:
    """What one process serves."""

    register: Callable[[grpc.aio.Server], None]
    keys: KeySource
    """Where access tokens are verified with."""
    ended: EndedGrants
    """The sessions and API keys whose access tokens are refused."""
    erased: ErasedUsers
    """Whose access tokens are refused all the same."""
    toll: Toll | None
    """How fast users may call; None: as fast as they like."""
    loops: Sequence[Loop] = field(default_factory=list)
    """What runs beside the server until it stops."""
    announce_drain: Callable[[], None] = _nothing
    """Tells streams that live long to end."""


@asynccontextmanager
async def _databases(
    settings: Settings, name: str, system_settings: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[Database, SystemDatabase]]:
    """Open both pools: one user's rows, and everything."""
    url = settings.database_url.get_secret_value()
    system_url = settings.system_database_url.get_secret_value()
    async with (
        await open_pool(url, size=settings.database_connections, name=name) as pool,
        await open_pool(
            system_url,
            size=settings.system_database_connections,
            name=f"{name}-system",
            settings=system_settings,
        ) as system_pool,
    ):
        yield Database(pool), SystemDatabase(system_pool)


async def _auth(settings: Settings, stack: AsyncExitStack) -> Application:
    database, system = await stack.enter_async_context(_databases(settings, "auth"))
    kms = await _kms(settings, stack)
    keyring = Keyring(
        KeyStore(system),
        kms,
        access_token_seconds=settings.access_token_seconds,
    )
    await keyring.ensure_signing_key()
    hashing = stack.enter_context(
        Passwords(concurrency=settings.password_hash_concurrency, breached=_breached(settings))
    )
    mint = Mint(
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        lifetime=timedelta(seconds=settings.access_token_seconds),
    )
    session_lifetime = timedelta(seconds=settings.refresh_token_seconds)
    attempts, mails, api_keys = AttemptStore(system), MailStore(system), ApiKeyStore(system)
    auth = AuthService(
        AccountStore(system),
        SessionStore(system),
        attempts,
        mails,
        api_keys,
        keyring,
        hashing,
        Issuer(keyring, mint, session_lifetime, utc_now),
        public_url=settings.public_url or settings.token_issuer,
    )
    ended = await _ended_grants(system)
    members = MemberStore(system)
    tenants = TenantService(members)
    checkpoint_store = CheckpointStore(system)
    audit_keys = AuditKeys(checkpoint_store, kms)
    await audit_keys.signer()
    archive = CheckpointArchive(_blobs(settings), checkpoint_store, audit_keys)
    checkpointer = Checkpointer(
        checkpoint_store,
        archive,
        audit_keys,
        every_seconds=settings.audit_checkpoint_seconds,
    )
    audit_log = AuditLog(AuditStore(system), archive, seal_seconds=settings.audit_seal_seconds)
    users = UserService(UserStore(database), audit_log)
    billing_store = BillingStore(system)
    billing = BillingService(billing_store, ManualPayments(billing_store))
    erased = ErasedUsers(system)
    erasures = ErasureStore(system, _patience(settings))
    erasure_archive = ErasureArchive(
        erasures, _blobs(settings), audit_keys.signer, audit_keys.known
    )
    privacy = PrivacyService(
        erasures,
        ExportStore(database, timedelta(days=settings.export_days)),
        hashing.match,
        audit_keys.signer,
        _blobs(settings),
        url_lifetime=timedelta(seconds=settings.upload_url_seconds),
    )

    def register(server: grpc.aio.Server) -> None:
        auth_pb2_grpc.add_AuthServiceServicer_to_server(auth, server)
        auth_pb2_grpc.add_TenantServiceServicer_to_server(tenants, server)
        users_pb2_grpc.add_UserServiceServicer_to_server(users, server)
        privacy_pb2_grpc.add_PrivacyServiceServicer_to_server(privacy, server)
        billing_pb2_grpc.add_BillingServiceServicer_to_server(billing, server)

    forgetful = [each.forget for each in (ended, attempts, mails, api_keys, members)]
    housekeeping = Housekeeping(forgetful)
    mailer = _mailer(settings)
    delivery = [Postman(mails, mailer).run] if mailer else []
    toll = _toll(settings, stack, system)
    return Application(
        register,
        keyring,
        ended,
        erased,
        toll,
        loops=[
            *_loops(toll),
            keyring.run,
            audit_log.run,
            checkpointer.run,
            ended.run,
            erased.run,
            erasure_archive.run,
            housekeeping.run,
            *delivery,
        ],
    )


def _toll(settings: Settings, stack: AsyncExitStack, system: SystemDatabase) -> Toll | None:
    if not settings.rate_limit_scale:
        return None
    redis = open_cache(settings.redis_url.get_secret_value())
    stack.push_async_callback(redis.aclose)
    return Toll(redis, BillingStore(system), scale=settings.rate_limit_scale)


def _loops(toll: Toll | None) -> list[Loop]:
    return [toll.run] if toll else []


def _patience(settings: Settings) -> Patience:
    """Return how long an erasure waits: for calls under way, and for URLs that are out."""
    return Patience(
        settle=timedelta(seconds=settings.erasure_settle_seconds),
        confirm=timedelta(seconds=settings.upload_url_seconds + settings.sweep_margin_seconds),
    )


async def _memory(settings: Settings, stack: AsyncExitStack) -> Application:
    database, system = await stack.enter_async_context(_databases(settings, "memory"))
    keys = await _remote_keys(settings, stack)
    ended = await _ended_grants(system)
    kms = await _kms(settings, stack)
    data_keys = DataKeys(database, kms)
    opener = Opener(data_keys)
    redis = open_cache(settings.redis_url.get_secret_value())
    stack.push_async_callback(redis.aclose)
    blobs = _blobs(settings)
    doomed = DoomedObjects(database, blobs)
    url_lifetime = timedelta(seconds=settings.upload_url_seconds)
    search = SearchStore(database)
    shared = SharedStore(database)
    answers = Answers(redis)
    counts = RetrievalCounts(system)
    short_term = ShortTermStore(redis, database, timedelta(seconds=settings.short_term_seconds))
    embeddings = EmbeddingStore(database)
    changes = ChangeStore(system)
    feed = Feed(changes)
    collection = Collection(BulkStore(database), short_term, opener)
    promotion = Promotion(database, short_term)
    transcripts = Transcripts(database, blobs, doomed, url_lifetime)
    exporter = Exporter(collection, changes)
    memories = MemoryService(
        MemoryStore(database, data_keys),
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
            Retrieval(search, EmbeddingSearch(database), short_term, shared, opener, utc_now),
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
            Watcher(feed, collection.some, session_seconds=_watch_seconds(settings)),
        ),
        opener,
        utc_now,
    )
    retention = RetentionStore(system)
    rounds = PromotionRounds(system, short_term, promotion, utc_now)
    scoring = ScoringService(
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
    embedding = EmbeddingService(EmbeddingJobs(database, system), embeddings)
    maintenance = MaintenanceService(
        KeyRotation(system, kms),
        ReindexStore(database, data_keys),
        Sweep(
            system,
            blobs,
            utc_now,
            url_lifetime=url_lifetime,
            margin=timedelta(seconds=settings.sweep_margin_seconds),
        ),
        retention,
        rounds,
        utc_now,
    )

    erased = ErasedUsers(system)
    privacy_work = PrivacyWorkService(
        Eraser(
            system,
            ErasureStore(system, _patience(settings)),
            data_keys,
            blobs,
            redis,
            object_kinds=tuple(Kind),
        ),
        UserExporter(
            ExportStore(database, timedelta(days=settings.export_days)),
            Dumper(database, system),
            Histories(exporter, LifecycleStore(database), short_term, opener),
            blobs,
        ),
    )

    def register(server: grpc.aio.Server) -> None:
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories, server)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring, server)
        embedding_pb2_grpc.add_EmbeddingServiceServicer_to_server(embedding, server)
        maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(maintenance, server)
        privacy_pb2_grpc.add_PrivacyWorkServiceServicer_to_server(privacy_work, server)

    toll = _toll(settings, stack, system)
    return Application(
        register,
        keys,
        ended,
        erased,
        toll,
        loops=[
            *_loops(toll),
            keys.run,
            ended.run,
            erased.run,
            blobs.keep_versions,
            feed.run,
            answers.run,
            counts.run,
        ],
        announce_drain=feed.drain,
    )


def _watch_seconds(settings: Settings) -> float:
    """Return how long one may watch: little longer than a token lives, and less than a stream."""
    return min(settings.stream_seconds * _SESSION_PART, settings.access_token_seconds)


async def _jobs(settings: Settings, stack: AsyncExitStack) -> Application:
    database, system = await stack.enter_async_context(_databases(settings, "jobs", PLANS_OF_QUEUE))
    keys = await _remote_keys(settings, stack)
    ended = await _ended_grants(system)
    doorbell = Doorbell(settings.system_database_url.get_secret_value())
    queue = Queue(system, settings.lease_seconds, settings.job_limits)
    workers = WorkerService(
        queue,
        doorbell,
        lease_seconds=settings.lease_seconds,
        session_seconds=settings.stream_seconds * _SESSION_PART,
    )
    nightly = Schedule(
        "meditation.nightly",
        settings.meditation_schedule,
        "meditation.plan",
        settings.meditation_time_zone,
    )
    rewrapping = Schedule("keys.rewrap", settings.rewrap_schedule, REWRAP)
    sweeping = Schedule("attachments.sweep", settings.sweep_schedule, "attachments.sweep")
    retention = Schedule("memories.sweep", settings.retention_schedule, "memories.sweep")
    promotion = Schedule("short_term.promote", settings.promotion_schedule, "short_term.promote")
    schedules = ScheduleStore(database, system)
    planner = Planner(system, [nightly, rewrapping, sweeping, retention, promotion], schedules)
    store = JobStore(database, system)
    feed = JobFeed(store, session_seconds=_watch_seconds(settings))
    jobs = JobService(store, feed, schedules)
    forgetting = Forgetting(
        queue, timedelta(days=settings.done_job_days), timedelta(days=settings.dead_job_days)
    )
    erased = ErasedUsers(system)

    def announce_drain() -> None:
        workers.drain()
        feed.drain()

    def register(server: grpc.aio.Server) -> None:
        jobs_pb2_grpc.add_JobServiceServicer_to_server(jobs, server)
        jobs_pb2_grpc.add_WorkerServiceServicer_to_server(workers, server)

    toll = _toll(settings, stack, system)
    return Application(
        register,
        keys,
        ended,
        erased,
        toll,
        loops=[
            *_loops(toll),
            keys.run,
            ended.run,
            erased.run,
            workers.run,
            planner.run,
            feed.run,
            forgetting.run,
        ],
        announce_drain=announce_drain,
    )


COMPOSERS: dict[str, Callable[[Settings, AsyncExitStack], Awaitable[Application]]] = {
    "auth": _auth,
    "memory": _memory,
    "jobs": _jobs,
}


async def serve(process: str, settings: Settings) -> None:
    """Run one process until SIGTERM or SIGINT, then drain it."""
    stopped = _stop_signal()
    async with AsyncExitStack() as stack:
        application = await COMPOSERS[process](settings, stack)
        server = _server(process, settings, application)
        application.register(server.grpc)
        async with asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(_forever(loop)) for loop in application.loops]
            _collect_rarely()
            await server.start()
            await stopped.wait()
            log.info("draining")
            await server.drain(
                health_seconds=settings.health_interval_seconds,
                grace_seconds=settings.drain_seconds,
                announce=application.announce_drain,
            )
            for task in loops:
                task.cancel()
    log.info("stopped")


def _collect_rarely() -> None:
    """Keep the garbage collector from looking at everything again after every few hundred objects.

    A call makes few cycles and many objects: looking for the former took a fifth of the time of
    bulk calls. What is there at the start stays for good.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)


async def migrate_database(settings: MigrationSettings) -> int:
    """Apply the migrations that are waiting and return how many that were."""
    connection = await asyncpg.connect(settings.owner_database_url.get_secret_value())
    try:
        return await migrate(connection, read_migrations())
    finally:
        await connection.close()


async def provision_database(settings: ProvisionSettings) -> str:
    """Make roles, database and extensions, and return the name of the database.

    Raises:
        WrongRole: A URL names another role than the migrations know.
    """
    owner_url = settings.owner_database_url.get_secret_value()
    roles = [
        Role.of_url(owner_url, OWNER),
        Role.of_url(settings.database_url.get_secret_value(), APPLICATION),
        Role.of_url(settings.system_database_url.get_secret_value(), SYSTEM),
    ]
    database = urlsplit(owner_url).path.lstrip("/")
    await provision(settings.superuser_database_url.get_secret_value(), database, roles)
    return database


async def rotate_signing_key(settings: Settings) -> str:
    """Publish a new signing key and return its id. It signs once every verifier knows it."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "rotate-signing-key"))
        keyring = Keyring(
            KeyStore(system),
            await _kms(settings, stack),
            access_token_seconds=settings.access_token_seconds,
        )
        key = await keyring.rotate()
        return key.kid


async def withdraw_signing_key(settings: Settings, kid: str) -> str:
    """Withdraw a signing key at once and return the id of the one that signs from now on.

    Raises:
        NotFound: There is no such key.
    """
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "withdraw-signing-key"))
        keyring = Keyring(
            KeyStore(system),
            await _kms(settings, stack),
            access_token_seconds=settings.access_token_seconds,
        )
        key = await keyring.withdraw(kid)
        return key.kid


async def rotate_audit_key(settings: Settings) -> str:
    """Have a new key sign checkpoints of the audit log, and return its id."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "rotate-audit-key"))
        return await AuditKeys(CheckpointStore(system), await _kms(settings, stack)).rotate()


async def rotate_data_keys(settings: Settings) -> str:
    """Enqueue the job that wraps data keys by the newest master key, and return its id."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "rotate-data-keys"))
        async with system.transaction() as connection:
            job_id = await enqueue(connection, kind=REWRAP, payload={})
    return ids.show(ids.JOB, job_id)


async def set_plan(settings: Settings, user_id: str, plan: str) -> str:
    """Give a user a plan whose payment is settled, and return the one that they have now."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "set-plan"))
        store = BillingStore(system)
        caller = await store.find(ids.parse(ids.USER, user_id, "user"))
        return (await store.settle(caller, plan, actor=audit.SYSTEM)).plan


async def erase_again(settings: Settings) -> int:
    """Begin anew every erasure that S3 knows of, and return how many those are."""
    async with AsyncExitStack() as stack:
        _, system = await stack.enter_async_context(_databases(settings, "erase-again"))
        audit_keys = AuditKeys(CheckpointStore(system), await _kms(settings, stack))
        archive = ErasureArchive(
            ErasureStore(system, _patience(settings)),
            _blobs(settings),
            audit_keys.signer,
            audit_keys.known,
        )
        return await archive.erase_again()


def _server(process: str, settings: Settings, application: Application) -> Server:
    verifier = TokenVerifier(
        application.keys,
        issuer=settings.token_issuer,
        audience=settings.token_audience,
        ended=application.ended,
    )
    layers = chain(
        verifier,
        worker_id=access.spiffe_id(settings.trust_domain, settings.namespace, access.WORKER),
        unary_seconds=settings.unary_seconds,
        stream_seconds=settings.stream_seconds,
        erased=application.erased,
        gate=application.toll,
    )
    server = Server(
        settings.listen_socket,
        layers,
        access.PROCESSES[process],
        telemetry.server_interceptors(process),
    )
    if access.REFLECTION in access.PROCESSES[process]:
        server.reflect(access.public_services())
    return server


async def _remote_keys(settings: Settings, stack: AsyncExitStack) -> RemoteKeys:
    channel = await stack.enter_async_context(channel_to_peers(settings.outbound_socket))
    return RemoteKeys(channel, refresh_seconds=settings.jwks_refresh_seconds)


async def _ended_grants(system: SystemDatabase) -> EndedGrants:
    ended = EndedGrants(system)
    # Before the first call: a restart must not make a token good again.
    await ended.refresh()
    return ended


def _breached(settings: Settings) -> Sequence[Breached]:
    file = settings.breached_passwords_file
    return (Commonplace(), HashFile(file)) if file else (Commonplace(),)


def _mailer(settings: Settings) -> Mailer | None:
    if settings.smtp_host:
        return Smtp(
            settings.smtp_host,
            settings.smtp_port,
            settings.mail_sender,
            settings.smtp_user,
            settings.smtp_password.get_secret_value(),
        )
    if settings.mail_directory:
        return Outbox(settings.mail_directory, settings.mail_sender)
    log.warning("mails wait: neither smtp_host nor mail_directory is set")
    return None


async def _kms(settings: Settings, stack: AsyncExitStack) -> Kms:
    if settings.kms == "vault":
        vault = Vault(
            address=settings.vault_address,
            token_file=settings.vault_token_file,
            key=settings.vault_key,
            mount=settings.vault_mount,
            namespace=settings.vault_namespace,
            ca_file=settings.vault_ca_file,
        )
        return await stack.enter_async_context(open_vault(vault))
    return LocalKms(settings.master_key_file)


def _blobs(settings: Settings) -> Blobs:
    return Blobs.open(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
        secure=settings.s3_secure,
        bucket=settings.s3_bucket,
    )


async def _forever(loop: Loop) -> None:
    await loop()


def _stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    stopped = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, stopped.set)
    return stopped
