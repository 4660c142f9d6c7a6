"""Plans and usage as values, and when the audit log is told of usage."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from datetime import date, datetime
from typing import Final

from server.buckets import Rate

METERED: Final = ("writes", "queries", "bytes", "jobs")
SHARES: Final = (80, 100)
"""Percentages of what is meant for a month that the audit log is told of."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What was used, or may be used, in a month."""

    writes: int = 0
    queries: int = 0
    bytes: int = 0
    jobs: int = 0
    embeddings: int = 0
    """Vectors that a local model made: counted where they are kept."""

    def __add__(self, other: "Usage") -> "Usage":
        """Return both together."""
        return Usage(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a user gets."""

    name: str
    short_term_bytes: int
    long_term_bytes: int
    permanent_bytes: int
    vectors: int
    price_cents: int
    rate: Rate
    tenant_rate: Rate
    """Of all users of a tenant together, in which somebody has this plan."""
    monthly: Usage


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast a user may call, and all users of their tenant together."""

    own: Rate
    tenant: Rate


@dataclass(frozen=True, slots=True)
class Subscription:
    """Which plan a user has, and which they asked for."""

    plan: str
    requested_plan: str | None
    requested_at: datetime | None


@dataclass(frozen=True, slots=True)
class UsedInMonth:
    """What was used in a month, named by its first day."""

    month: date
    used: Usage


def crossed(before: Usage, now: Usage, limits: Usage) -> Iterator[str]:
    """Yield what the audit log is told of: each share of a limit that usage has now reached."""
    for name in METERED:
        limit, was, is_now = (getattr(each, name) for each in (limits, before, now))
        for share in SHARES:
            if was * 100 < limit * share <= is_now * 100:
                yield f"usage/{name}/{share}"


METERS: Final[Mapping[str, str]] = {
    f"/kimberly.memory.v1.MemoryService/{method}": "writes"
    for method in (
        "CreateMemory",
        "UpdateMemory",
        "DeleteMemory",
        "BatchCreateMemories",
        "ArchiveMemory",
        "RestoreMemory",
        "ProtectMemory",
        "GiveFeedback",
        "ImportMemories",
        "UploadEmbeddings",
        "DeleteEmbeddings",
        "CreateAttachment",
        "CompleteAttachment",
        "DeleteAttachment",
        "AppendToSession",
        "EndSession",
        "DeleteTranscript",
        "UndoMeditation",
        "CreateGoal",
        "UpdateGoal",
        "DeleteGoal",
    )
} | {
    "/kimberly.memory.v1.MemoryService/QueryMemories": "queries",
    "/kimberly.memory.v1.MemoryService/Meditate": "jobs",
    "/kimberly.jobs.v1.JobService/CreateJob": "jobs",
    "/kimberly.jobs.v1.JobService/RetryJob": "jobs",
    "/kimberly.privacy.v1.PrivacyService/CreateExport": "jobs",
    "/kimberly.agents.v1.AgentService/RunAgentTask": "jobs",
}
"""What is counted of a call, by method. What is not here counts as nothing.

Of a call that writes, each thing that it changed; of one that asks for a job, the job; and queries
that were answered.
"""

QUERY: Final = Usage(queries=1)
JOB: Final = Usage(jobs=1)

_CHANGES_PER_CALL: Final = 100


def calls_beside(changes: int) -> int:
    """Return how many further calls a transaction costs its user for what it changed.

    The call itself pays for the first hundred changes: a batch of a thousand is no one call.
    """
    return max(changes - 1, 0) // _CHANGES_PER_CALL
