"""How much a user keeps, and how much there is room for."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.caller import Caller
from server.database import Database
from server.memory.model import Tier


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What is kept in a tier."""

    used_bytes: int
    limit_bytes: int
    count: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What is kept, by tier."""

    plan: str
    tiers: Mapping[Tier, TierUsage]
    archived_bytes: int
    archived_count: int


class UsageStore:
    """Looks up the usage of one user at a time."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def get(self, caller: Caller, short_term_bytes: int, short_term_count: int) -> Usage:
        """Return what a user keeps.

        Args:
            caller: The user.
            short_term_bytes: What the short-term tier holds, as Redis counts it.
            short_term_count: How many memories that is.
        """
        (row,) = await self._database.fetch(
            caller,
            """
            SELECT coalesce((SELECT plan
                               FROM subscriptions
                              WHERE tenant_id = caller.tenant_id
                                AND user_id = caller.user_id), 'free') AS plan,
                   quota.short_term_bytes AS short_term_limit,
                   quota.long_term_bytes AS long_term_limit,
                   quota.permanent_bytes AS permanent_limit,
                   coalesce(usage.long_term_bytes, 0) AS long_term_bytes,
                   coalesce(usage.long_term_count, 0) AS long_term_count,
                   coalesce(usage.permanent_bytes, 0) AS permanent_bytes,
                   coalesce(usage.permanent_count, 0) AS permanent_count,
                   coalesce(usage.archived_bytes, 0) AS archived_bytes,
                   coalesce(usage.archived_count, 0) AS archived_count
              FROM quotas_of(caller.tenant_id, caller.user_id) AS quota
              LEFT JOIN memory_usage AS usage
                ON usage.tenant_id = caller.tenant_id AND usage.user_id = caller.user_id
            """,
        )
        return Usage(
            row["plan"],
            {
                Tier.SHORT_TERM: TierUsage(
                    short_term_bytes, row["short_term_limit"], short_term_count
                ),
                Tier.LONG_TERM: TierUsage(
                    row["long_term_bytes"], row["long_term_limit"], row["long_term_count"]
                ),
                Tier.PERMANENT: TierUsage(
                    row["permanent_bytes"], row["permanent_limit"], row["permanent_count"]
                ),
            },
            row["archived_bytes"],
            row["archived_count"],
        )
