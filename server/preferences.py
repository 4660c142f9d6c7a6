"""How a user wants memories to be read, scored and found: what they chose in their settings."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple
from uuid import UUID

from server.caller import Caller
from server.database import Connection


class Language(enum.Enum):
    """The language of a user's memories and queries."""

    SIMPLE = "simple"
    """Any language, or several: words count as they are written."""
    ENGLISH = "english"
    GERMAN = "german"
    FRENCH = "french"
    SPANISH = "spanish"
    ITALIAN = "italian"
    PORTUGUESE = "portuguese"


class ScoringPreset(enum.Enum):
    """A choice of scoring weights."""

    BALANCED = "balanced"
    FACTUAL = "factual"
    EMOTIONAL = "emotional"
    RECENT = "recent"
    CUSTOM = "custom"
    """The user's own."""


class ScoringWeights(NamedTuple):
    """What the components of a score count: each 0 to 1, 1 together, give or take 0.001."""

    relevance_to_goals: float
    emotional_weight: float
    predictive_value: float
    recency_frequency: float


PRESETS: Final[Mapping[ScoringPreset, ScoringWeights]] = {
    ScoringPreset.BALANCED: ScoringWeights(0.40, 0.30, 0.20, 0.10),
    ScoringPreset.FACTUAL: ScoringWeights(0.50, 0.10, 0.30, 0.10),
    ScoringPreset.EMOTIONAL: ScoringWeights(0.25, 0.50, 0.15, 0.10),
    ScoringPreset.RECENT: ScoringWeights(0.25, 0.15, 0.20, 0.40),
}
"""The weights of each preset but CUSTOM."""

USUAL_WEIGHTS: Final = PRESETS[ScoringPreset.BALANCED]


@dataclass(frozen=True, slots=True)
class RetrievalWeights:
    """What counts in a query's ranking besides the words, each 0 to 1; None: the usual."""

    semantic: float | None = None
    """Part of the vectors' similarity in the match; the words have the rest."""
    speaker: float | None = None
    """Bonus for what was said by somebody whom the query names."""
    memory_score: float | None = None
    """Bonus for the memory's score."""
    freshness: float | None = None
    """Bonus for what is new."""
    session: float | None = None
    """Bonus for what was said in a conversation in which something else answers well."""


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much a user may keep in each tier, in bytes; None: as much as the plan gives."""

    short_term_bytes: int | None = None
    long_term_bytes: int | None = None
    permanent_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Retention:
    """How long memories stay."""

    short_term_hours: int | None = None
    """None: as long as the mesh says."""
    long_term_days: int | None = None
    """How long they may be unseen; None: for ever."""
    archive_grace_days: int | None = None
    """How long archived ones can be restored; None: as usual."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """What a user chose. Without arguments: the defaults."""

    language: Language = Language.ENGLISH
    scoring_preset: ScoringPreset = ScoringPreset.BALANCED
    scoring_weights: ScoringWeights = USUAL_WEIGHTS
    retrieval_weights: RetrievalWeights = field(default_factory=RetrievalWeights)
    embedding_model: str = ""
    """The local model that makes vectors of the user's memories; empty: none does."""
    version: int = 0
    """How often the user changed something."""
    quotas: Quotas = field(default_factory=Quotas)
    retention: Retention = field(default_factory=Retention)
    index_sensitive: bool = False
    """Whether queries find sensitive memories by their words."""


async def preferences(connection: Connection, caller: Caller) -> Preferences:
    """Return what the caller chose, in one statement of the caller's transaction."""
    row = await connection.fetchrow(
        """
        SELECT language, scoring_preset, relevance_to_goals, emotional_weight, predictive_value,
               recency_frequency, semantic, speaker, memory_score, freshness, session,
               embedding_model, version, short_term_bytes, long_term_bytes, permanent_bytes,
               short_term_hours, long_term_days, archive_grace_days, index_sensitive
          FROM settings
         WHERE tenant_id = $1 AND user_id = $2
        """,
        caller.tenant_id,
        caller.user_id,
    )
    return preferences_of(row)


def preferences_of(row: Mapping[str, Any] | None) -> Preferences:
    """Read a row of the settings; without one, the user has the defaults."""
    if row is None:
        return Preferences()
    return Preferences(
        Language(row["language"]),
        ScoringPreset(row["scoring_preset"]),
        ScoringWeights(*(row[name] for name in ScoringWeights._fields)),
        RetrievalWeights(*(row[name] for name in RetrievalWeights.__slots__)),
        row["embedding_model"],
        row["version"],
        Quotas(*(row[name] for name in Quotas.__slots__)),
        Retention(*(row[name] for name in Retention.__slots__)),
        row["index_sensitive"],
    )


async def weights_of_users(
    connection: Connection, users: Sequence[tuple[UUID, UUID]]
) -> dict[UUID, ScoringWeights]:
    """Return the scoring weights of those of some users whose weights are not the usual ones.

    Args:
        connection: A transaction of the system role.
        users: Tenant and user of each.
    """
    # IS TRUE keeps the planner from a join of the tenants that would read the whole table.
    rows = await connection.fetch(
        """
        SELECT user_id, relevance_to_goals, emotional_weight, predictive_value, recency_frequency
          FROM settings
         WHERE user_id = ANY ($2::uuid[]) AND scoring_preset <> 'balanced'
           AND ((tenant_id, user_id) IN (SELECT tenant_id, user_id
                                           FROM unnest($1::uuid[], $2::uuid[])
                                                AS asked (tenant_id, user_id))) IS TRUE
        """,
        [tenant_id for tenant_id, _ in users],
        [user_id for _, user_id in users],
    )
    return {row["user_id"]: ScoringWeights(*row[1:]) for row in rows}
