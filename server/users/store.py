"""A user's own rows in Postgres: profile, settings, consents, audit events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import UUID

from server import audit, ids
from server.caller import Caller
from server.database import Connection, Database
from server.errors import EtagMismatch, NotFound
from server.preferences import Language, Preferences, ScoringPreset, ScoringWeights, preferences


@dataclass(frozen=True, slots=True)
class User:
    """Who the caller is."""

    id: UUID
    tenant_id: UUID
    email: str
    display_name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scoring weights, and the preset that they are of."""

    preset: ScoringPreset
    weights: ScoringWeights


@dataclass(frozen=True, slots=True)
class SettingsChange:
    """What to change about the settings; None leaves a choice as it is."""

    language: Language | None
    scoring: Scoring | None
    retrieval: Mapping[str, float | None]
    """New retrieval weights, by name; None goes back to the default."""
    expected_version: int | None
    """Change nothing unless the settings are at this version; None for any."""

    def applied_to(self, current: Preferences) -> Preferences:
        """Return the next version of the settings.

        Raises:
            EtagMismatch: They are not at the expected version.
        """
        if self.expected_version not in (None, current.version):
            raise EtagMismatch
        scoring = self.scoring or Scoring(current.scoring_preset, current.scoring_weights)
        return Preferences(
            self.language or current.language,
            scoring.preset,
            scoring.weights,
            replace(current.retrieval_weights, **self.retrieval),
            current.version + 1,
        )


@dataclass(frozen=True, slots=True)
class Consent:
    """A decision on one purpose."""

    purpose: str
    granted: bool
    version: int
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An event of the caller's audit log."""

    id: UUID
    event_time: datetime
    actor: str
    action: str
    resource: str
    chain_position: int | None


class UserStore:
    """The caller's own account."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, caller: Caller) -> User:
        """Return the caller.

        Raises:
            NotFound: The account is gone, though its last token is still good.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                SELECT id, tenant_id, email, display_name, created_at
                  FROM users
                 WHERE tenant_id = $1 AND id = $2
                """,
                caller.tenant_id,
                caller.user_id,
            )
        if row is None:
            raise NotFound("user")
        return User(**row)

    async def settings(self, caller: Caller) -> Preferences:
        """Return what the caller chose, or the defaults."""
        async with self._database.transaction(caller) as connection:
            return await preferences(connection, caller)

    async def update_settings(self, caller: Caller, change: SettingsChange) -> Preferences:
        """Change settings, and tell the audit log.

        Raises:
            EtagMismatch: They are no longer at the expected version.
        """
        async with self._database.transaction(caller) as connection:
            # Two first changes have no row yet to wait for each other at.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
                f"settings/{caller.user_id}",
            )
            changed = change.applied_to(await preferences(connection, caller))
            await _keep_settings(connection, caller, changed)
            await audit.record(
                connection, caller, "settings.update", ids.show(ids.USER, caller.user_id)
            )
        return changed

    async def record_consent(self, caller: Caller, purpose: str, *, granted: bool) -> Consent:
        """Add a decision to the history, and to the audit log."""
        action = "consent.grant" if granted else "consent.withdraw"
        async with self._database.transaction(caller) as connection:
            consent = None
            while consent is None:
                consent = await _insert_next(connection, caller, purpose, granted=granted)
            await audit.record(connection, caller, action, purpose)
        return consent

    async def list_consents(self, caller: Caller) -> Sequence[Consent]:
        """Return the latest decision on each purpose."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT DISTINCT ON (purpose) purpose, granted, version, recorded_at
                  FROM consents
                 WHERE tenant_id = $1 AND user_id = $2
                 ORDER BY purpose, version DESC
                """,
                caller.tenant_id,
                caller.user_id,
            )
        return [Consent(**row) for row in rows]

    async def list_audit_events(
        self, caller: Caller, *, before: UUID | None, limit: int
    ) -> Sequence[AuditEvent]:
        """Return the newest events of the caller, or the newest before one of them."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT event.id, event.event_time, event.actor, event.action, event.resource,
                       link.position AS chain_position
                  FROM audit_events AS event
                  LEFT JOIN audit_links AS link ON link.event_id = event.id
                 WHERE event.tenant_id = $1 AND event.user_id = $2
                   AND event.id < coalesce($3::uuid, 'ffffffff-ffff-ffff-ffff-ffffffffffff')
                 ORDER BY event.id DESC
                 LIMIT $4
                """,
                caller.tenant_id,
                caller.user_id,
                before,
                limit,
            )
        return [AuditEvent(**row) for row in rows]


async def _insert_next(
    connection: Connection, caller: Caller, purpose: str, *, granted: bool
) -> Consent | None:
    """Insert under the next version; None if a decision made at the same time took it.

    The statement then waited for that decision, and the next attempt counts from it.
    """
    row = await connection.fetchrow(
        """
        INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
        SELECT $1, $2, $3, 1 + coalesce(max(version), 0), $4
          FROM consents
         WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3
            ON CONFLICT DO NOTHING
        RETURNING purpose, granted, version, recorded_at
        """,
        caller.tenant_id,
        caller.user_id,
        purpose,
        granted,
    )
    return Consent(**row) if row else None


async def _keep_settings(connection: Connection, caller: Caller, changed: Preferences) -> None:
    retrieval = changed.retrieval_weights
    await connection.execute(
        """
        INSERT INTO settings
               (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                emotional_weight, predictive_value, recency_frequency, semantic, speaker,
                memory_score, freshness, version)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
            ON CONFLICT (user_id, tenant_id) DO UPDATE
           SET language = excluded.language, scoring_preset = excluded.scoring_preset,
               relevance_to_goals = excluded.relevance_to_goals,
               emotional_weight = excluded.emotional_weight,
               predictive_value = excluded.predictive_value,
               recency_frequency = excluded.recency_frequency,
               semantic = excluded.semantic, speaker = excluded.speaker,
               memory_score = excluded.memory_score, freshness = excluded.freshness,
               version = excluded.version
        """,
        caller.tenant_id,
        caller.user_id,
        changed.language.value,
        changed.scoring_preset.value,
        *changed.scoring_weights,
        retrieval.semantic,
        retrieval.speaker,
        retrieval.memory_score,
        retrieval.freshness,
        changed.version,
    )
