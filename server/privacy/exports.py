"""An export as a value."""

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from server.caller import Caller

KIND = "exports"
"""What the keys of archives in S3 begin with."""


class ExportState(enum.Enum):
    """How far an export is."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that was written."""

    version_id: str | None
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Export:
    """What its user is told."""

    id: UUID
    job_id: UUID
    state: ExportState
    created_at: datetime
    finished_at: datetime | None
    expires_at: datetime | None
    archive: Archive | None
    """None until it is ready."""


def object_key(caller: Caller, export_id: UUID) -> str:
    """Return where in S3 the archive is: nothing in it is the client's."""
    return f"{KIND}/{caller.tenant_id.hex}/{caller.user_id.hex}/{export_id.hex}"
