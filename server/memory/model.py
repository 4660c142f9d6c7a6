"""What a memory is."""

import enum
import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple
from uuid import UUID


class Tier(enum.StrEnum):
    """How long a memory is meant to last."""

    SHORT_TERM = "short_term"
    LONG_TERM = "long_term"
    PERMANENT = "permanent"


class Source(enum.StrEnum):
    """Where a memory came from."""

    CHAT = "chat"
    AGENT = "agent"
    IMPORT = "import"
    UPLOAD = "upload"


class Scope(enum.StrEnum):
    """Who may read a memory."""

    PRIVATE = "private"
    SHARED = "shared"
    """The people of its user's tenant."""
    PUBLIC = "public"
    """Their agents too."""


class Author(enum.StrEnum):
    """Who made a memory."""

    USER = "user"
    AGENT = "agent"
    SYSTEM = "system"


@dataclass(frozen=True, slots=True)
class Draft:
    """A memory that a caller asks to keep, checked and complete."""

    tier: Tier
    content: str
    tags: tuple[str, ...]
    """A set, sorted."""
    source: Source
    session_id: str
    session_position: int | None
    speaker: str
    occurred_at: datetime | None
    """None: when it is created."""
    channels: tuple[str, ...] = ()
    """A set, sorted."""
    scope: Scope = Scope.PRIVATE
    is_protected: bool = False
    is_sensitive: bool = False
    keyed_hash: bytes | None = None
    """Of a sensitive draft, once the key of its user is at hand."""

    @property
    def size_bytes(self) -> int:
        """UTF-8 bytes of content and tags."""
        return size_of(self.content, self.tags)

    @property
    def content_hash(self) -> bytes:
        """What identical content is recognised by: its SHA-256, or a keyed hash if sensitive."""
        if not self.is_sensitive:
            return hash_of(self.content)
        if self.keyed_hash is None:
            raise RuntimeError("a sensitive draft has no hash before its user's key is at hand")
        return self.keyed_hash


@dataclass(frozen=True, slots=True)
class Change:
    """New values of some fields of a memory; None leaves a field as it is."""

    content: str | None = None
    tags: tuple[str, ...] | None = None
    speaker: str | None = None
    occurred_at: datetime | None = None
    channels: tuple[str, ...] | None = None
    scope: Scope | None = None
    tier: Tier | None = None
    is_sensitive: bool | None = None
    expected_version: int | None = None
    """Refuse if the memory is no longer at this version; None changes it whatever happened."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a meditation made of a memory; every number is in 0..1."""

    value: float
    relevance_to_goals: float
    emotional_weight: float
    predictive_value: float
    recency_frequency: float
    scorer_version: int
    scored_at: datetime


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory as it is kept."""

    id: UUID
    tier: Tier
    content: str
    tags: tuple[str, ...]
    source: Source
    session_id: str
    session_position: int | None
    speaker: str
    occurred_at: datetime
    size_bytes: int
    content_hash: bytes
    version: int
    created_at: datetime
    updated_at: datetime
    last_seen_at: datetime
    use_count: int
    channels: tuple[str, ...] = ()
    scope: Scope = Scope.PRIVATE
    is_protected: bool = False
    created_by: Author = Author.USER
    consent_version: int | None = None
    archived_at: datetime | None = None
    delete_after: datetime | None = None
    """When an archived memory is deleted for good."""
    is_sensitive: bool = False
    sealed: bytes | None = None
    """What the content of a sensitive memory is until it is opened; the content is empty then."""
    expires_at: datetime | None = None
    owner_id: UUID | None = None
    """Who shows it to the caller; None: it is the caller's own."""
    feedback: float | None = None
    """What the user thinks of it, 0 to 1."""
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which memories a list or a query is about; an empty field lets all pass.

    A query is about active memories only, whatever `archived` says.
    """

    tiers: frozenset[Tier] = frozenset(Tier)
    tags: tuple[str, ...] = ()
    session_id: str = ""
    occurred_after: datetime | None = None
    """The earliest instant that passes."""
    occurred_before: datetime | None = None
    """The earliest instant that no longer passes."""
    archived: bool = False
    """Archived memories instead of active ones."""

    @property
    def durable_tiers(self) -> list[str]:
        """The tiers that Postgres keeps, as it names them."""
        return sorted(self.tiers - {Tier.SHORT_TERM})


@dataclass(frozen=True, slots=True)
class Found:
    """A memory that answers a query, and how much the words of the query weigh in it."""

    memory: Memory
    lexical: float


class Candidate(NamedTuple):
    """A memory that may be in an answer: all that its place there depends on, without its text."""

    id: UUID
    amount: float
    """How well it answers, as the leg of the query measures it that found it."""
    speaker: str
    session_id: str
    occurred_at: float
    """Seconds since 1970."""
    score: float | None
    """What a meditation made of it; None before the first."""
    text_bytes: int


def size_of(content: str, tags: tuple[str, ...]) -> int:
    """Return what a memory counts against a quota: UTF-8 bytes of content and tags."""
    return len(content.encode()) + sum(len(tag.encode()) for tag in tags)


def hash_of(content: str) -> bytes:
    """Return the SHA-256 that identical content is recognised by."""
    return hashlib.sha256(content.encode()).digest()
