"""What more than one process opens, and what each hands to the server."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import grpc

from server.auth.keyring import Keyring
from server.billing.store import BillingStore
from server.billing.toll import Toll
from server.blobs import Blobs
from server.cache import Redis, open_cache
from server.database import Database, SystemDatabase, open_pool
from server.erased import ErasedUsers
from server.grants import EndedGrants
from server.kms import Kms
from server.kms.local import LocalKms
from server.kms.vault import Vault, open_vault
from server.metrics import Reading, watch_pool
from server.privacy.erasure_store import Patience
from server.rpc.serving import channel_to_peers
from server.settings import BackupBucketSettings, BackupSettings, KmsSettings, Settings
from server.tokens import RemoteKeys
from server.turnstile import Turnstile

_SESSION_PART = 0.8
"""Part of the longest time of a stream after which a worker is asked to connect anew."""

Loop = Callable[[], Awaitable[Any]]


def _nothing() -> None:
    """Announce nothing: this process has no streams that live long."""


@dataclass(frozen=True, slots=True)
class Application:
    """What one process serves."""

    register: Callable[[grpc.aio.Server], None]
    keys: Keyring | RemoteKeys
    """Where access tokens are verified with."""
    ended: EndedGrants
    """The sessions and API keys whose access tokens are refused."""
    erased: ErasedUsers
    """Whose access tokens are refused all the same."""
    toll: Toll | None
    """How fast users may call; None: as fast as they like."""
    loops: Sequence[Loop] = field(default_factory=list)
    """What runs beside the server until it stops, but for what keeps the above up to date."""
    readings: Sequence[Reading] = field(default_factory=list)
    """What reads gauges out of the stores, every half minute or so."""
    turnstile: Turnstile | None = None
    """How fast callers without a token may call; None: as fast as they like."""
    announce_drain: Callable[[], None] = _nothing
    """Tells streams that live long to end."""

    def every_loop(self) -> list[Loop]:
        """Return what runs beside the server until it stops."""
        tolls = [self.toll.run] if self.toll else []
        return [self.keys.run, self.ended.run, self.erased.run, *tolls, *self.loops]


@asynccontextmanager
async def open_databases(
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
        watch_pool("application", pool)
        watch_pool("system", system_pool)
        yield Database(pool), SystemDatabase(system_pool)


async def open_remote_keys(settings: Settings, stack: AsyncExitStack) -> RemoteKeys:
    """Return the keys of access tokens, asked of the auth process."""
    channel = await stack.enter_async_context(channel_to_peers(settings.outbound_socket))
    return RemoteKeys(channel, refresh_seconds=settings.jwks_refresh_seconds)


async def known_ended_grants(system: SystemDatabase) -> EndedGrants:
    """Return the grants that have ended, read before the first call.

    A restart must not make a token good again.
    """
    ended = EndedGrants(system)
    await ended.refresh()
    return ended


async def open_kms(settings: KmsSettings, stack: AsyncExitStack) -> Kms:
    """Return what wraps data keys: a file's keys, or Vault's."""
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


def open_blobs(settings: Settings | BackupSettings) -> Blobs:
    """Return the bucket of attachments, transcripts and archives."""
    return Blobs.open(
        endpoint=settings.s3_endpoint,
        access_key=settings.s3_access_key.get_secret_value(),
        secret_key=settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
        secure=settings.s3_secure,
        bucket=settings.s3_bucket,
    )


def open_copies(settings: Settings) -> list[Blobs]:
    """Return the bucket of backups, if services are to tell it who is erased and what withdrawn."""
    if not settings.backup_s3_endpoint:
        return []
    return [open_backup_bucket(settings)]


def open_backup_bucket(settings: Settings | BackupBucketSettings) -> Blobs:
    """Return the bucket of backups."""
    return Blobs.open(
        endpoint=settings.backup_s3_endpoint,
        access_key=settings.backup_s3_access_key.get_secret_value(),
        secret_key=settings.backup_s3_secret_key.get_secret_value(),
        region=settings.backup_s3_region,
        secure=settings.backup_s3_secure,
        bucket=settings.backup_s3_bucket,
    )


def open_redis(settings: Settings, stack: AsyncExitStack) -> Redis:
    """Return Valkey; it is closed with the stack."""
    redis = open_cache(settings.redis_url.get_secret_value())
    stack.push_async_callback(redis.aclose)
    return redis


def open_toll(settings: Settings, stack: AsyncExitStack, system: SystemDatabase) -> Toll | None:
    """Return how fast users may call; None where settings set no limit."""
    if not settings.rate_limit_scale:
        return None
    return Toll(open_redis(settings, stack), BillingStore(system), scale=settings.rate_limit_scale)


def open_turnstile(settings: Settings, stack: AsyncExitStack) -> Turnstile | None:
    """Return how fast callers without a token may call; None where settings set no limit."""
    if not settings.rate_limit_scale:
        return None
    return Turnstile(open_redis(settings, stack), scale=settings.rate_limit_scale)


def patience(settings: Settings) -> Patience:
    """Return how long an erasure waits: for calls under way, and for URLs that are out."""
    return Patience(
        settle=timedelta(seconds=settings.erasure_settle_seconds),
        confirm=timedelta(seconds=settings.upload_url_seconds + settings.sweep_margin_seconds),
    )


def worker_session_seconds(settings: Settings) -> float:
    """Return after how long a worker is asked to connect anew: before its stream is cut."""
    return settings.stream_seconds * _SESSION_PART


def watch_seconds(settings: Settings) -> float:
    """Return how long one may watch: little longer than a token lives, and less than a stream."""
    return min(worker_session_seconds(settings), settings.access_token_seconds)
