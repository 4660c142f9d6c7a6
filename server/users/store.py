"""A user's own rows in Postgres: profile, settings, consents, audit events."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg

from server import audit, ids
from server.caller import Caller
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding, wait_for_writes
from server.enqueue import enqueue
from server.errors import EtagMismatch, InvalidArgument, NotFound, StoreUnavailable
from server.preferences import Language, Preferences, ScoringPreset, ScoringWeights, preferences
from server.users.consent_store import Consent

REINDEX: Final = "memories.reindex"
"""Kind of the job that reads a user's memories anew."""

_REINDEX_ATTEMPTS: Final = 10


@dataclass(frozen=True, slots=True)
class User:
    """Who the caller is."""

    id: UUID
    tenant_id: UUID
    email: str
    display_name: str
    created_at: datetime
    version: int


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
    embedding_model: str | None
    expected_version: int | None
    """Change nothing unless the settings are at this version; None for any."""
    quotas: Mapping[str, int | None] = field(default_factory=dict)
    """New quotas, by name; None goes back to the plan's."""
    retention: Mapping[str, int | None] = field(default_factory=dict)
    """New times to keep memories, by name; None goes back to the default."""
    index_sensitive: bool | None = None

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
            current.embedding_model if self.embedding_model is None else self.embedding_model,
            current.version + 1,
            replace(current.quotas, **self.quotas),
            replace(current.retention, **self.retention),
            current.index_sensitive if self.index_sensitive is None else self.index_sensitive,
        )


@dataclass(frozen=True, slots=True)
class AuditEvent:
    """An event of the caller's audit log."""

    id: UUID
    event_time: datetime
    actor: str
    action: str
    resource: str
    user_id: UUID
    """Whose data was touched."""
    chain_position: int | None
    agent_name: str | None = None
    """What the agent is called that acted, if one did."""


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
                SELECT id, tenant_id, coalesce(users.email, own_home.email) AS email,
                       display_name, created_at, version
                  FROM users
                  LEFT JOIN own_home ON true
                 WHERE tenant_id = $1 AND id = $2
                """,
                caller.tenant_id,
                caller.user_id,
            )
        if row is None:
            raise NotFound("user")
        return User(**row)

    async def rename(self, caller: Caller, display_name: str, expected_version: int | None) -> User:
        """Call the caller something else, and tell the audit log.

        Args:
            caller: Who it is.
            display_name: What to call them.
            expected_version: Change nothing unless the profile is at this version; None for any.

        Raises:
            EtagMismatch: The profile is no longer at the expected version.
            NotFound: The account is gone, though its last token is still good.
        """
        async with self._database.transaction(caller) as connection:
            row = await connection.fetchrow(
                """
                UPDATE users
                   SET display_name = $3, version = version + 1
                 WHERE tenant_id = $1 AND id = $2 AND version = coalesce($4, version)
                RETURNING id, tenant_id,
                          coalesce(email, (SELECT email FROM own_home)) AS email,
                          display_name, created_at, version
                """,
                caller.tenant_id,
                caller.user_id,
                display_name,
                expected_version,
            )
            if row is not None:
                shown = ids.show(ids.USER, caller.user_id)
                await audit.record(connection, caller, "user.update", shown)
        if row is None:
            await self.get(caller)
            raise EtagMismatch
        return User(**row)

    async def settings(self, caller: Caller) -> Preferences:
        """Return what the caller chose, or the defaults."""
        async with self._database.transaction(caller) as connection:
            return await preferences(connection, caller)

    async def update_settings(self, caller: Caller, change: SettingsChange) -> Preferences:
        """Change settings, and tell the audit log.

        Raises:
            EtagMismatch: They are no longer at the expected version.
            InvalidArgument: A quota is above the plan's.
        """
        async with self._database.transaction(caller) as connection:
            # Two first changes have no row yet to wait for each other at.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
                f"settings/{caller.user_id}",
            )
            current = await preferences(connection, caller)
            changed = change.applied_to(current)
            await _check_quotas(connection, caller, change.quotas)
            is_read_anew = (changed.language, changed.index_sensitive) != (
                current.language,
                current.index_sensitive,
            )
            if is_read_anew:
                await _wait_for_writers(connection)
            if change.embedding_model is not None:
                await wait_for_writes(connection, caller)
            await _keep_settings(connection, caller, changed)
            if is_read_anew:
                await _ask_for_reindexing(connection, caller, changed.version)
            await audit.record(
                connection, caller, "settings.update", ids.show(ids.USER, caller.user_id)
            )
            if change.embedding_model is not None:
                await ask_for_embedding(connection, caller)
        return changed

    async def list_consents(
        self, caller: Caller, *, with_history: bool = False
    ) -> Sequence[Consent]:
        """Return the latest decision on each purpose, or every decision, the latest first."""
        async with self._database.transaction(caller) as connection:
            rows = await connection.fetch(
                """
                SELECT purpose, granted, version, recorded_at
                  FROM consents AS decision
                 WHERE tenant_id = $1 AND user_id = $2
                   AND ($3 OR version = (SELECT max(version)
                                           FROM consents AS last
                                          WHERE last.tenant_id = $1 AND last.user_id = $2
                                            AND last.purpose = decision.purpose))
                 ORDER BY purpose, version DESC
                """,
                caller.tenant_id,
                caller.user_id,
                with_history,
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
                       event.user_id, link.position AS chain_position, agent.name AS agent_name
                  FROM audit_events AS event
                  LEFT JOIN audit_links AS link ON link.event_id = event.id
                  LEFT JOIN agents AS agent ON agent.id = agent_of(event.actor)
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


async def _check_quotas(
    connection: Connection, caller: Caller, quotas: Mapping[str, int | None]
) -> None:
    """Refuse quotas above those of the caller's plan."""
    chosen = {name: quota for name, quota in quotas.items() if quota is not None}
    if not chosen:
        return
    plan = await connection.fetchrow(
        """
        SELECT short_term_bytes, long_term_bytes, permanent_bytes
          FROM plans
         WHERE name = coalesce((SELECT plan
                                  FROM subscriptions
                                 WHERE tenant_id = $1 AND user_id = $2), 'free')
        """,
        caller.tenant_id,
        caller.user_id,
    )
    for name, quota in chosen.items():
        if quota > plan[name]:
            raise InvalidArgument(
                f"settings.quotas.{name}", f"must be 0 to {plan[name]}, which the plan gives"
            )


async def _wait_for_writers(connection: Connection) -> None:
    """Wait until nobody writes memories by the choices of before; others wait for the commit."""
    try:
        await connection.execute("SELECT pg_advisory_xact_lock(language_lock())")
    except asyncpg.LockNotAvailableError as error:
        raise StoreUnavailable("a writer of memories") from error


async def _ask_for_reindexing(connection: Connection, caller: Caller, version: int) -> None:
    """Enqueue the job that reads all memories anew by the choices that this version brought.

    Each change has a job of its own: one of an earlier change may be past its last page, and is
    nothing but a look at the settings now.
    """
    await connection.execute(
        "UPDATE settings SET language_version = $3 WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
        version,
    )
    user_id = ids.show(ids.USER, caller.user_id)
    await enqueue(
        connection,
        kind=REINDEX,
        payload={
            "tenant_id": ids.show(ids.TENANT, caller.tenant_id),
            "user_id": user_id,
            "settings_version": version,
        },
        caller=caller,
        unique_key=f"{REINDEX}/{user_id}/{version}",
        max_attempts=_REINDEX_ATTEMPTS,
    )


async def _keep_settings(connection: Connection, caller: Caller, changed: Preferences) -> None:
    retrieval = changed.retrieval_weights
    await connection.execute(
        """
        INSERT INTO settings
               (tenant_id, user_id, language, scoring_preset, relevance_to_goals,
                emotional_weight, predictive_value, recency_frequency, semantic, speaker,
                memory_score, freshness, embedding_model, version, short_term_bytes,
                long_term_bytes, permanent_bytes, short_term_hours, long_term_days,
                archive_grace_days, index_sensitive, session)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18,
                $19, $20, $21, $22)
            ON CONFLICT (user_id, tenant_id) DO UPDATE
           SET language = excluded.language, scoring_preset = excluded.scoring_preset,
               relevance_to_goals = excluded.relevance_to_goals,
               emotional_weight = excluded.emotional_weight,
               predictive_value = excluded.predictive_value,
               recency_frequency = excluded.recency_frequency,
               semantic = excluded.semantic, speaker = excluded.speaker,
               memory_score = excluded.memory_score, freshness = excluded.freshness,
               embedding_model = excluded.embedding_model, version = excluded.version,
               short_term_bytes = excluded.short_term_bytes,
               long_term_bytes = excluded.long_term_bytes,
               permanent_bytes = excluded.permanent_bytes,
               short_term_hours = excluded.short_term_hours,
               long_term_days = excluded.long_term_days,
               archive_grace_days = excluded.archive_grace_days,
               index_sensitive = excluded.index_sensitive, session = excluded.session
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
        changed.embedding_model,
        changed.version,
        changed.quotas.short_term_bytes,
        changed.quotas.long_term_bytes,
        changed.quotas.permanent_bytes,
        changed.retention.short_term_hours,
        changed.retention.long_term_days,
        changed.retention.archive_grace_days,
        changed.index_sensitive,
        retrieval.session,
    )
