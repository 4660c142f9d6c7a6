"""Promotion in rounds: what earned it moves to the long term, of all users."""

from collections.abc import Mapping
from dataclasses import dataclass

from server.caller import Caller
from server.clock import Clock
from server.database import SystemDatabase
from server.errors import ConsentMissing
from server.memory.promotion import Promotion
from server.memory.short_term import ShortTermStore
from server.memory.short_term_exits import LONGEST_LIFE


@dataclass(frozen=True, slots=True)
class Page:
    """What became of the memories of some users."""

    promoted: Mapping[Caller, int]
    """How many of whom; without those of whom none was."""
    users: int
    withdrawn: int
    """How many of the users were passed over for want of consent."""
    cursor: int
    """Where the next page starts; 0: there is none."""


class PromotionRounds:
    """Goes through the users that Redis has short-term memories of.

    A page may be repeated, and a run that is interrupted leaves less to the next one.
    """

    def __init__(
        self,
        database: SystemDatabase,
        short_term: ShortTermStore,
        promotion: Promotion,
        clock: Clock,
    ) -> None:
        self._database = database
        self._short_term = short_term
        self._promotion = promotion
        self._clock = clock

    async def run(self, cursor: int, limit: int) -> Page:
        """Promote what earned it, of the next users; at the end forget exits that are old.

        Args:
            cursor: Where to go on; 0 at the start.
            limit: How many keys of Redis to look at, more or less.

        Raises:
            StoreUnavailable: A store does not answer; the page is to be repeated.
        """
        cursor, users = await self._short_term.owners(cursor, limit)
        promoted: dict[Caller, int] = {}
        withdrawn = 0
        for caller in users:
            try:
                if moved := await self._promotion.promote_earned(caller, self._clock()):
                    promoted[caller] = promoted.get(caller, 0) + moved
            except ConsentMissing:
                withdrawn += 1
        if not cursor:
            await self._forget_exits()
        return Page(promoted, len(users), withdrawn, cursor)

    async def _forget_exits(self) -> None:
        """Forget which memories left the short term so long ago that no copy can be there."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "DELETE FROM short_term_exits WHERE left_at < now() - $1::interval", LONGEST_LIFE
            )
            # By then no turn of theirs is in the short term, and Postgres knows those it keeps.
            await connection.execute(
                "DELETE FROM ended_sessions WHERE ended_at < now() - $1::interval", LONGEST_LIFE
            )
