"""What a meditation does when it has scored: archives what a quota has no room for, and more.

The order of effects: each page of memories is archived in one transaction with its audit events,
under the fence of the shard. A shard that is taken up again goes on from what is left: who is
within their quota has nothing more to lose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import structlog

from server.caller import Caller
from server.clock import Clock
from server.database import Connection, SystemDatabase
from server.errors import ConsentMissing, StoreUnavailable
from server.memory.lifecycle_store import USUAL_GRACE
from server.memory.model import Tier
from server.memory.promotion import Promotion
from server.memory.promotion_rounds import PromotionRounds
from server.memory.retention_store import RetentionStore, archive_all, tell_users
from server.memory.shards import Shard, hold
from server.memory.tallies import FOUND_COLUMNS, Tally
from server.preferences import Language

log = structlog.get_logger()

_DAY: Final = timedelta(days=1)
_PAGE: Final = 200
_USERS_AT_ONCE: Final = 100
_KEYS_AT_ONCE: Final = 500
_NOBODY: Final = UUID(int=0)
_ROTATED: Final = (Tier.LONG_TERM, Tier.PERMANENT)

_TABLE_OF_SCORES: Final = """
    CREATE TEMPORARY TABLE foretold (memory_id uuid NOT NULL, score real NOT NULL) ON COMMIT DROP
"""
_STORED: Final = "memory_scores"
# What a dry run did not look at again has the score that is stored.
_FORETOLD: Final = """
    (SELECT user_id, memory_id, coalesce(foretold.score, stored.score) AS score
       FROM memory_scores AS stored
       LEFT JOIN pg_temp.foretold USING (memory_id))
"""


@dataclass(frozen=True, slots=True)
class _Excess:
    """By how much a user is over their quotas, and what is to be known to put things away."""

    caller: Caller
    bytes_over: dict[Tier, int]
    archived_today: int
    language: Language
    grace: timedelta


class Tidying:
    """Tidies up after a shard is scored, or tells what that would do."""

    def __init__(
        self,
        database: SystemDatabase,
        retention: RetentionStore,
        promotion: Promotion,
        rounds: PromotionRounds,
        clock: Clock,
        *,
        most_a_day: int,
    ) -> None:
        """Tidy up; of a user, at most so many memories are archived in 24 hours."""
        self._database = database
        self._retention = retention
        self._promotion = promotion
        self._rounds = rounds
        self._clock = clock
        self._most_a_day = most_a_day

    async def tidy(self, shard: Shard) -> None:
        """Archive, promote and delete; what is of nobody in particular is done with shard 0.

        Raises:
            LeaseLost: A later lease has claimed the shard.
        """
        after = _NOBODY
        while users := await self._over_quota(shard, after):
            for caller in users:
                while await self._archive_page(shard, caller):
                    pass
            after = users[-1].user_id
        promoted = await self._promote(shard)
        deleted = await self._delete(shard)
        await self._note(shard, promoted, deleted)

    async def foretell(self, shard: Shard, tally: Tally) -> None:
        """Count into the tally of a user's dry run what tidying up would do."""
        if shard.tenant_id is None or shard.user_id is None:
            return
        caller, now = Caller(shard.tenant_id, shard.user_id), self._clock()
        async with self._database.transaction() as connection:
            excess = await _excess(connection, caller, now)
            if excess is not None:
                await _copy_in(connection, tally)
                left = self._most_a_day - excess.archived_today
                for tier in _ROTATED:
                    chosen = await _lowest(connection, excess, tier, left, _FORETOLD)
                    tally.archived += len(chosen)
                    left -= len(chosen)
        tally.promoted = await self._promotion.count_earned(caller)
        tally.deleted = await self._retention.count_due(now, caller)

    async def _over_quota(self, shard: Shard, after: UUID) -> Sequence[Caller]:
        """Return the next users of the shard who keep more than they may."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(
                """
                SELECT usage.tenant_id, usage.user_id
                  FROM memory_usage AS usage
                 CROSS JOIN LATERAL quotas_of(usage.tenant_id, usage.user_id) AS quota
                 WHERE usage.user_id > $1
                   AND ($3::uuid IS NULL OR (usage.tenant_id = $2 AND usage.user_id = $3))
                   AND (uuid_hash_extended(usage.user_id, 0) & 2147483647) % $4 = $5::bigint
                   AND (usage.long_term_bytes > quota.long_term_bytes
                        OR usage.permanent_bytes > quota.permanent_bytes)
                 ORDER BY usage.user_id
                 FETCH FIRST ($6::bigint) ROWS WITH TIES
                """,
                after,
                shard.tenant_id,
                shard.user_id,
                shard.shards,
                shard.number,
                _USERS_AT_ONCE,
            )
        return [Caller(row["tenant_id"], row["user_id"]) for row in rows]

    async def _archive_page(self, shard: Shard, caller: Caller) -> int:
        """Archive the least of a tier that is over its quota; return how many, 0 at the end."""
        now = self._clock()
        async with self._database.transaction() as connection:
            await hold(connection, shard)
            # Two runs at once would each put away what makes the user fit.
            await connection.execute(
                "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))",
                f"tidying/{caller.user_id}",
            )
            excess = await _excess(connection, caller, now)
            if excess is None:
                return 0
            left = min(self._most_a_day - excess.archived_today, _PAGE)
            for tier in _ROTATED:
                chosen = await _lowest(connection, excess, tier, left, _STORED)
                archived = await archive_all(
                    connection,
                    caller,
                    chosen,
                    excess.language,
                    now,
                    excess.grace,
                    meditation_id=shard.meditation_id,
                )
                if archived:
                    await _count(connection, shard, caller, len(archived))
                    return len(archived)
        return 0

    async def _promote(self, shard: Shard) -> int:
        """Promote what has earned it. Without Redis, another night: the scores are stored."""
        try:
            if shard.tenant_id and shard.user_id:
                caller = Caller(shard.tenant_id, shard.user_id)
                return await self._promotion.promote_earned(caller, self._clock())
            return await self._promote_everybodys(shard) if shard.number == 0 else 0
        except ConsentMissing:
            return 0
        except StoreUnavailable as error:
            log.warning("nothing promoted", error=error.message)
            return 0

    async def _promote_everybodys(self, shard: Shard) -> int:
        """Promote, then tell: a crash between the two leaves a page out of users' reports."""
        promoted, cursor = 0, 0
        while True:
            page = await self._rounds.run(cursor, _KEYS_AT_ONCE)
            promoted, cursor = promoted + sum(page.promoted.values()), page.cursor
            if page.promoted:
                async with self._database.transaction() as connection:
                    await hold(connection, shard)
                    await tell_users(connection, shard.meditation_id, promoted=page.promoted)
            if not cursor:
                return promoted

    async def _delete(self, shard: Shard) -> int:
        whose = (
            Caller(shard.tenant_id, shard.user_id) if shard.tenant_id and shard.user_id else None
        )
        if whose is None and shard.number > 0:
            return 0
        deleted, now = 0, self._clock()
        nightly = None if whose else shard.meditation_id
        while page := await self._retention.delete_due(now, _PAGE, whose, meditation_id=nightly):
            deleted += page
        return deleted

    async def _note(self, shard: Shard, promoted: int, deleted: int) -> None:
        async with self._database.transaction() as connection:
            await hold(connection, shard)
            await connection.execute(
                """
                UPDATE meditation_shards
                   SET promoted = promoted + $3, deleted = deleted + $4
                 WHERE meditation_id = $1 AND shard = $2
                """,
                shard.meditation_id,
                shard.number,
                promoted,
                deleted,
            )


async def _excess(connection: Connection, caller: Caller, now: datetime) -> _Excess | None:
    """Return how far a user is over their quotas; None: they have withdrawn their consent."""
    row = await connection.fetchrow(
        """
        SELECT usage.long_term_bytes - quota.long_term_bytes AS long_term,
               usage.permanent_bytes - quota.permanent_bytes AS permanent,
               (SELECT count(*)
                  FROM memories
                 WHERE tenant_id = $1 AND user_id = $2
                   AND archived_in IS NOT NULL AND archived_at > $3) AS archived_today,
               coalesce(chosen.language, 'english') AS language, chosen.archive_grace_days
          FROM memory_usage AS usage
         CROSS JOIN LATERAL quotas_of(usage.tenant_id, usage.user_id) AS quota
          LEFT JOIN settings AS chosen
            ON chosen.tenant_id = usage.tenant_id AND chosen.user_id = usage.user_id
         WHERE usage.tenant_id = $1 AND usage.user_id = $2
           AND (SELECT granted
                  FROM consents
                 WHERE tenant_id = $1 AND user_id = $2 AND purpose = 'memory.store'
                 ORDER BY version DESC
                 LIMIT 1)
        """,
        caller.tenant_id,
        caller.user_id,
        now - _DAY,
    )
    if row is None:
        return None
    days = row["archive_grace_days"]
    return _Excess(
        caller,
        {Tier.LONG_TERM: row["long_term"], Tier.PERMANENT: row["permanent"]},
        row["archived_today"],
        Language(row["language"]),
        USUAL_GRACE if days is None else timedelta(days=days),
    )


async def _copy_in(connection: Connection, tally: Tally) -> None:
    """Give a transaction the scores of a dry run: no object each, however many the user has."""
    await connection.execute(_TABLE_OF_SCORES)
    await connection.copy_to_table(
        "foretold",
        schema_name="pg_temp",
        source=tally.found(),
        columns=FOUND_COLUMNS,
        format="binary",
    )


async def _lowest(
    connection: Connection, excess: _Excess, tier: Tier, limit: int, scores: str
) -> list[UUID]:
    """Return the lowest memories by (score, created) without which a tier is within its quota.

    Protected ones are left out, those that the user restored, and those without a score.

    Args:
        connection: A transaction of the system role.
        excess: Whose they are, and by how much the tier is over.
        tier: Which tier.
        limit: How many at most.
        scores: Where the scores are: `_STORED` or `_FORETOLD`.
    """
    if excess.bytes_over[tier] <= 0 or limit <= 0:
        return []
    rows = await connection.fetch(
        f"""
        SELECT id
          FROM (
               SELECT id, sum(size_bytes) OVER lowest_first - size_bytes AS bytes_before,
                      row_number() OVER lowest_first AS place
                 FROM (
                      SELECT memory.id, memory.size_bytes, memory.created_at,
                             scores.score
                        FROM memories AS memory
                        JOIN {scores} AS scores
                          ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
                       WHERE memory.tenant_id = $1 AND memory.user_id = $2 AND memory.tier = $3
                         AND memory.archived_at IS NULL
                         AND NOT memory.protected AND NOT memory.restored
                      ) AS candidate
                WHERE score IS NOT NULL
               WINDOW lowest_first AS (ORDER BY score, created_at, id)
               ) AS candidate
         WHERE bytes_before < $4
         ORDER BY place
         LIMIT $5
        """,  # noqa: S608 - a constant
        excess.caller.tenant_id,
        excess.caller.user_id,
        tier,
        excess.bytes_over[tier],
        limit,
    )
    return [row["id"] for row in rows]


async def _count(connection: Connection, shard: Shard, caller: Caller, archived: int) -> None:
    """Note how many of a user's memories a run has archived."""
    await connection.execute(
        """
        UPDATE meditation_shards
           SET archived = archived + $3
         WHERE meditation_id = $1 AND shard = $2
        """,
        shard.meditation_id,
        shard.number,
        archived,
    )
    await tell_users(connection, shard.meditation_id, archived={caller: archived})
