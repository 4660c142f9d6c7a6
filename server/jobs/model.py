"""Jobs and leases as values."""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from server.jobs.ticks import Missed


class JobState(enum.Enum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    DEAD = "dead"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self not in {JobState.WAITING, JobState.RUNNING}


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
    result: str | None
    """A JSON object."""
    created_at: datetime
    run_at: datetime
    cancelled_at: datetime | None
    """When somebody asked for its end."""
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class UserSchedule:
    """When a user's jobs are made of their own accord."""

    id: UUID
    kind: str
    cron: str
    time_zone: str
    missed: Missed
    payload: Mapping[str, Any] = field(default_factory=dict)
    """What the jobs are told."""
    next_run_at: datetime | None = None
    """None while it is paused."""
    last_run_at: datetime | None = None
    last_job_id: UUID | None = None
    created_at: datetime | None = None
    """None until it is kept."""


class Held(NamedTuple):
    """One lease of one job: the right to write about it.

    A tuple, as what follows from it is: many thousands a second are made, hashed and compared.
    """

    job_id: UUID
    token: int


class Lease(NamedTuple):
    """The right to do one job until the lease ends."""

    held: Held
    kind: str
    payload_json: str
    attempt: int
    traceparent: str = ""
    """Of the call that asked for the job; empty: it is not traced."""


@dataclass(frozen=True, slots=True)
class Beat:
    """A lease that its worker still holds, and how far the job is, 0 to 1."""

    held: Held
    progress: float


class Completed(NamedTuple):
    """The job is done, with a JSON object or without a result."""

    held: Held
    result_json: str | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The attempt failed."""

    held: Held
    error: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """The work was stopped because its end was asked for."""

    held: Held


Outcome = Completed | Failed | Stopped


@dataclass(frozen=True, slots=True)
class Extended:
    """What became of leases that were to be kept alive."""

    lost: frozenset[Held]
    cancelled: frozenset[Held]
    """Alive, but the work is not wanted any more."""
