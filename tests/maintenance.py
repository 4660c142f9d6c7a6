"""The maintenance service over the stores of a test."""

from __future__ import annotations

from datetime import timedelta

from server.blobs import Blobs
from server.cache import Redis
from server.clock import Clock
from server.data_keys import DataKeys
from server.database import Database, SystemDatabase
from server.kms import Kms
from server.memory.key_rotation import KeyRotation
from server.memory.maintenance_service import MaintenanceService
from server.memory.promotion import Promotion
from server.memory.promotion_rounds import PromotionRounds
from server.memory.reindex_store import ReindexStore
from server.memory.retention_store import RetentionStore
from server.memory.short_term import ShortTermStore
from server.memory.sweeping import Sweep
from server.memory.tidying import Tidying


def maintenance_service(
    database: Database,
    system_database: SystemDatabase,
    kms: Kms,
    blobs: Blobs,
    redis: Redis,
    clock: Clock,
) -> MaintenanceService:
    """Return the service; what is doomed or orphaned it sweeps at once."""
    none = timedelta()
    short_term = ShortTermStore(redis, database, timedelta(days=1))
    return MaintenanceService(
        KeyRotation(system_database, kms),
        ReindexStore(database, DataKeys(database, kms)),
        Sweep(system_database, blobs, clock, url_lifetime=none, margin=none),
        RetentionStore(system_database),
        PromotionRounds(system_database, short_term, Promotion(database, short_term), clock),
        clock,
    )


def tidying_of(
    database: Database,
    system_database: SystemDatabase,
    redis: Redis,
    clock: Clock,
    *,
    most_a_day: int = 1000,
) -> Tidying:
    """Return what tidies up after a meditation."""
    short_term = ShortTermStore(redis, database, timedelta(days=1))
    promotion = Promotion(database, short_term)
    return Tidying(
        system_database,
        RetentionStore(system_database),
        promotion,
        PromotionRounds(system_database, short_term, promotion, clock),
        clock,
        most_a_day=most_a_day,
    )
