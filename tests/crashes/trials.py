"""The same story, again and again, each time with another fault in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc
import httpx

from server.caller import Caller
from server.database import Database
from tests.conftest import new_caller
from tests.crashes.faults import Fault, Kind
from tests.crashes.stored import Reader, Stored, Verdict, judge
from tests.crashes.story import Story
from tests.crashes.victim import Victim
from tests.deciding import write_decision

ASKED_BY_DRIVER: Final = 3
"""How often the client of S3 asks before it gives up."""

_DOUBTFUL: Final = (Kind.KILLED_BEFORE, Kind.KILLED_AFTER, Kind.UNANSWERED)


@dataclass(slots=True)
class Trials:
    """Stories of users who are all new, over one service."""

    victim: Victim
    reader: Reader
    database: Database
    undisturbed: Stored = field(init=False)
    passes: Counter[str] = field(init=False)
    """How often a story passes each crash point."""
    calls: int = 0
    """How many were made."""

    async def tell_undisturbed(self) -> None:
        """Tell the story without a fault: what is there then is what must always be there."""
        # For the first time, scripts are loaded and connections made.
        await self._tell(None)
        self.undisturbed, self.passes, _ = await self._tell(None)
        assert not self.undisturbed.broken, self.undisturbed

    async def survive(self, fault: Fault) -> Verdict:
        """Tell the story with a fault in it, and judge what is there."""
        deaths = len(self.victim.recovery_seconds)
        try:
            stored, _, happened = await self._tell(fault)
        except (grpc.aio.AioRpcError, httpx.HTTPError) as error:
            return Verdict([], [], [f"the story comes to no end: {error}"])
        died = len(self.victim.recovery_seconds) - deaths
        is_fatal = fault.kind in {Kind.KILLED_BEFORE, Kind.KILLED_AFTER}
        assert died == is_fatal, f"{fault}: died {died} times"
        assert is_fatal or happened, f"{fault} did not happen"
        return judge(stored, self.undisturbed)

    async def _tell(self, fault: Fault | None) -> tuple[Stored, Counter[str], int]:
        caller = await self._consenting()
        story = Story(self.victim, caller)
        await self.victim.arm(fault)
        await story.tell()
        self.calls += story.calls
        await self.victim.revive()
        passed = await self.victim.arm(None)
        return await self.reader.read(self.victim, story, caller), passed.passes, passed.happened

    async def _consenting(self) -> Caller:
        """Return somebody new who consents to everything that is stored."""
        caller = await new_caller(self.database)
        await write_decision(self.database, caller, "memory.sensitive", granted=True)
        return caller


def every_fault(passes: Counter[str]) -> Iterator[Fault]:
    """Yield each kind of fault at each pass of each point."""
    for point, count in passes.items():
        for kind, times in kinds_at(point):
            for number in range(1, count + 1):
                yield Fault(kind, point, number, times)


def some_faults(passes: Counter[str]) -> Iterator[Fault]:
    """Yield what leaves most in doubt at each point, at passes that are spread over the story."""
    for point, count in passes.items():
        for place, kind in enumerate(_DOUBTFUL):
            yield Fault(kind, point, 1 + place * count // len(_DOUBTFUL))


def kinds_at(point: str) -> Sequence[tuple[Kind, int]]:
    """Return what can happen at a point, and at how many passes in a row."""
    kinds = [(kind, 1) for kind in Kind]
    # Once, and the client of S3 asks again by itself; more often, and it gives up.
    return [*kinds, (Kind.UNANSWERED, ASKED_BY_DRIVER)] if point.startswith("s3") else kinds
