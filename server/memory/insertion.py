"""Inserting one memory: in a transaction, or as a transaction of one statement.

The second saves the round trips of BEGIN, consent, audit and COMMIT, and holds the user's usage
row no longer than the commit itself. It serves what is new and stands alone; whatever else a
create may meet, it stores nothing and leaves the rest to the transaction.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

import asyncpg
from pgvector import SparseVector

from server import ids
from server.caller import Caller
from server.database import Connection, Database
from server.memory.conversation import Surroundings
from server.memory.model import Author, Draft, Memory
from server.memory.pacing import Turns
from server.memory.writing import within_quota
from server.metering import ledger
from server.metrics import count_changes
from server.preferences import Language
from server.requests import fingerprint_of

_CREATED: Final = """
    created AS (
        INSERT INTO memories (tenant_id, user_id, id, tier, content, tags, source, session_id,
                              session_position, speaker, occurred_at, size_bytes, content_hash,
                              created_at, updated_at, terms, channels, scope, protected,
                              consent_version, sensitive, sealed)
        SELECT $1::uuid, $2::uuid, $3::uuid, $4::text, $5::text, $6::text[], $7::text, $8::text,
               $9::integer, $10::text, $11::timestamptz, $12::integer, $13::bytea,
               $14::timestamptz, $14, $15::sparsevec, $16::text[], $17::text, $18::boolean,
               {consent_version}, $20::boolean, $21::bytea
        {source}
            ON CONFLICT DO NOTHING
        RETURNING id
    ), scored AS (
        INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
        SELECT $1, $2, id, $14 FROM created
    )
"""
_IN_TRANSACTION: Final = f"""
    WITH {_CREATED.format(consent_version="$19::bigint", source="")}
    SELECT id FROM created
"""  # noqa: S608 - constants
# Each part reads from the one before it, so that nothing runs ahead of `enter`; row-level security
# would refuse it.
_AT_ONCE: Final = f"""
    WITH caller AS MATERIALIZED (
        SELECT tenant_id FROM enter($1, $2)
    ), allowed AS MATERIALIZED (
        SELECT consent_version('memory.store') AS consent_version
          FROM caller
         WHERE language_to_write_in() = $22::text AND NOT wants_embedding()
    ), {
    _CREATED.format(
        consent_version="coalesce($19::bigint, consent_version)",
        source="FROM allowed WHERE consent_version IS NOT NULL",
    )
}, requested AS (
        INSERT INTO requests (tenant_id, user_id, method, request_id, fingerprint, resource_id)
        SELECT $1, $2, 'CreateMemory', $23::text, $24::bytea, id FROM created WHERE $23 <> ''
    ), recorded AS (
        INSERT INTO audit_events (id, tenant_id, user_id, actor, action, resource)
        SELECT $25::uuid, $1, $2, $26::text, 'memory.create', $27::text FROM created
    )
    SELECT consent_version FROM allowed, created
"""  # noqa: S608 - constants

_LANGUAGES_KNOWN: Final = 10_000


@dataclass(frozen=True, slots=True)
class Insertion:
    """A memory that is about to be a row."""

    memory_id: UUID
    draft: Draft
    terms: SparseVector
    now: datetime
    consent_version: int | None = None
    """None: the one that stands."""
    sealed: bytes | None = None
    """The content, if it is sensitive."""

    def values(self, caller: Caller) -> Sequence[object]:
        """Return the values of $1 to $21."""
        draft = self.draft
        return (
            caller.tenant_id,
            caller.user_id,
            self.memory_id,
            draft.tier,
            "" if draft.is_sensitive else draft.content,
            list(draft.tags),
            draft.source,
            draft.session_id,
            draft.session_position,
            draft.speaker,
            draft.occurred_at or self.now,
            draft.size_bytes,
            draft.content_hash,
            self.now,
            self.terms,
            list(draft.channels),
            draft.scope,
            draft.is_protected,
            self.consent_version,
            draft.is_sensitive,
            self.sealed,
        )


async def insert(connection: Connection, caller: Caller, insertion: Insertion) -> bool:
    """Insert a memory in a transaction; False if its text is there already.

    Raises:
        QuotaExceeded: It does not fit into its tier.
    """
    with within_quota():
        row = await connection.fetchrow(_IN_TRANSACTION, *insertion.values(caller))
    return row is not None


class AtOnce:
    """Creates memories of one user at a time, each by one statement that commits by itself."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._languages: OrderedDict[Caller, Language] = OrderedDict()
        self._turns = Turns()

    async def create(
        self, caller: Caller, draft: Draft, request_id: str, now: datetime
    ) -> Memory | None:
        """Store a memory that is new and stands alone; None: nothing was stored, nor refused.

        That is so for turns of conversations and for sensitive memories, for text that is there
        already, for a request id that was used before, without consent, for users who want
        vectors made, for agents, and when the user's language is not the one that was taken for
        granted.

        Raises:
            QuotaExceeded: It does not fit into its tier.
            StoreUnavailable: Postgres does not answer; what became of it is not known.
        """
        if draft.is_sensitive or draft.session_position is not None or caller.agent:
            return None
        language = self._languages.get(caller, Language.ENGLISH)
        memory_id = ids.new_id()
        await self._turns.next(draft.content)
        terms = Surroundings((), language).terms(draft.content, None)
        insertion = Insertion(memory_id, draft, terms, now)
        try:
            with within_quota():
                rows = await self._database.fetch_alone(
                    caller,
                    _AT_ONCE,
                    *insertion.values(caller),
                    language.value,
                    request_id,
                    fingerprint_of(repr(draft).encode()),
                    ids.new_id(),
                    caller.actor,
                    ids.show(ids.MEMORY, memory_id),
                )
        except asyncpg.UniqueViolationError:  # the request id was used before
            return None
        if not rows:
            return None
        count_changes("memory.create", 1)
        if noted := ledger():
            noted.committed(1)
        return new_memory(caller, memory_id, draft, rows[0]["consent_version"], now)

    def learn(self, caller: Caller, language: Language) -> None:
        """Take a language for granted from now on: it is the one that a transaction found."""
        if self._languages.get(caller, Language.ENGLISH) is not language:
            self._languages[caller] = language
            if len(self._languages) > _LANGUAGES_KNOWN:
                self._languages.popitem(last=False)


def new_memory(
    caller: Caller, memory_id: UUID, draft: Draft, consent_version: int, now: datetime
) -> Memory:
    """Return the memory that a draft of a user's, or of their agent's, becomes."""
    return Memory(
        id=memory_id,
        tier=draft.tier,
        content=draft.content,
        tags=draft.tags,
        source=draft.source,
        session_id=draft.session_id,
        session_position=draft.session_position,
        speaker=draft.speaker,
        occurred_at=draft.occurred_at or now,
        size_bytes=draft.size_bytes,
        content_hash=draft.content_hash,
        version=1,
        created_at=now,
        updated_at=now,
        last_seen_at=now,
        use_count=0,
        channels=draft.channels,
        scope=draft.scope,
        is_protected=draft.is_protected,
        created_by=Author.AGENT if caller.agent else Author.USER,
        consent_version=consent_version,
        is_sensitive=draft.is_sensitive,
    )
