"""Jobs and leases as values."""

import enum
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID


class JobState(enum.Enum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work as its user sees it."""

    id: UUID
    kind: str
    state: JobState
    attempt: int
    max_attempts: int
    progress: float
    error: str
    created_at: datetime
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class Held:
    """One lease of one job: the right to write about it."""

    job_id: UUID
    token: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to do one job until the lease ends."""

    held: Held
    kind: str
    payload_json: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Beat:
    """A lease that its worker still holds, and how far the job is, 0 to 1."""

    held: Held
    progress: float


@dataclass(frozen=True, slots=True)
class Completed:
    """The job is done, with a JSON object or without a result."""

    held: Held
    result_json: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed."""

    held: Held
    error: str


Outcome = Completed | Failed
