"""The maintenance service over the stores of a test."""

from __future__ import annotations

from datetime import timedelta

from server.blobs import Blobs
from server.clock import Clock
from server.database import Database, SystemDatabase
from server.kms import Kms
from server.memory.key_rotation import KeyRotation
from server.memory.maintenance_service import MaintenanceService
from server.memory.reindex_store import ReindexStore
from server.memory.retention_store import RetentionStore
from server.memory.sweeping import Sweep


def maintenance_service(
    database: Database, system_database: SystemDatabase, kms: Kms, blobs: Blobs, clock: Clock
) -> MaintenanceService:
    """Return the service; what is doomed or orphaned it sweeps at once."""
    none = timedelta()
    return MaintenanceService(
        KeyRotation(system_database, kms),
        ReindexStore(database),
        Sweep(system_database, blobs, clock, url_lifetime=none, margin=none),
        RetentionStore(system_database),
        clock,
    )
