"""What users keep and show each other, and what a query may and must find of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import combinations
from typing import TypeVar

from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller

REACH = 2
"""So many places away a turn still leads to another."""
T = TypeVar("T")


@dataclass(frozen=True)
class Kept:
    """A memory as it should be."""

    memory: pb.Memory
    is_archived: bool = False
    has_vector: bool = False

    @property
    def id(self) -> str:
        return self.memory.id

    @property
    def words(self) -> set[str]:
        return set(self.memory.content.split())

    @property
    def is_short(self) -> bool:
        return self.memory.tier == pb.TIER_SHORT_TERM

    @property
    def is_shown(self) -> bool:
        """Whether others of the tenant see it."""
        return self.memory.scope in (pb.SCOPE_SHARED, pb.SCOPE_PUBLIC) and not self.is_short

    @property
    def is_found(self) -> bool:
        """Whether a query may find it at all."""
        return not self.is_archived and not self.memory.sensitive

    def lasts(self, now: datetime) -> bool:
        return not self.is_short or self.memory.expire_time.ToDatetime(UTC) > now

    def is_beside(self, other: Kept) -> bool:
        """Tell whether it is a turn that leads to another one, or the same."""
        one, two = self.memory, other.memory
        if not (one.HasField("session_position") and two.HasField("session_position")):
            return self.id == other.id
        return abs(one.session_position - two.session_position) <= REACH


@dataclass(frozen=True)
class Person:
    """What a user has, in one talk at most, and agrees to."""

    caller: Caller
    consents: Mapping[str, bool]
    kept: Mapping[str, Kept] = field(default_factory=dict)

    def agrees(self, purposes: Iterable[str]) -> bool:
        return all(self.consents[purpose] for purpose in purposes)

    def having(self, *kept: Kept) -> Person:
        return replace(self, kept={**self.kept, **{one.id: one for one in kept}})

    def without(self, memory_id: str) -> Person:
        left = {key: one for key, one in self.kept.items() if key != memory_id}
        return replace(self, kept=left)

    def deciding(self, purpose: str, *, granted: bool) -> Person:
        return replace(self, consents={**self.consents, purpose: granted})

    def matches(self, words: Iterable[str], now: datetime) -> list[Kept]:
        """Return what shares words with a query, or stands next to a turn that does."""
        there = [one for one in self.kept.values() if one.is_found and one.lasts(now)]
        return [
            one
            for one in there
            if any(other.words & set(words) for other in there if one.is_beside(other))
        ]


@dataclass(frozen=True)
class Question:
    """A query of one of the people."""

    who: int
    words: tuple[str, ...]
    by_meaning: bool
    with_shared: bool

    @property
    def purposes(self) -> list[str]:
        """What who asks must agree to."""
        return ["memory.store", "memory.embed"] if self.by_meaning else ["memory.store"]

    def answer(self, people: Sequence[Person], now: datetime) -> dict[str, str] | None:
        """Return text by id of what is to be found; None: the query is to be refused."""
        asker = people[self.who]
        if not asker.agrees(self.purposes):
            return None
        found = asker.matches(self.words, now)
        if self.by_meaning:
            found += [one for one in asker.kept.values() if one.is_found and one.has_vector]
        if self.with_shared:
            for other in people:
                if other is not asker and other.caller.tenant_id == asker.caller.tenant_id:
                    found += _shown(other, self.words, now)
        return {one.id: one.memory.content for one in found}


def _shown(other: Person, words: Iterable[str], now: datetime) -> list[Kept]:
    if not other.agrees(["memory.store"]):
        return []
    return [one for one in other.matches(words, now) if one.is_shown]


def is_explained(
    found: Mapping[str, str] | None,
    answers: Sequence[Mapping[str, str] | None],
    touched: Iterable[str],
) -> bool:
    """Tell whether what a query found may be so, if others wrote while it looked.

    It is wrong if it holds what was not to be found before, nor after any of the writes; or lacks
    what was to be found all the time and was not written to.

    Args:
        found: Text by id; None: it was refused.
        answers: What each state would have been answered with that there may have been meanwhile.
        touched: Ids of what was written to.
    """
    given = [answer for answer in answers if answer is not None]
    if found is None:
        return len(given) < len(answers)
    if not given:
        return False
    lasting = set.intersection(*(set(answer) for answer in given)) - set(touched)
    return lasting <= found.keys() and all(
        any(answer.get(key) == text for answer in given) for key, text in found.items()
    )


def subsets(things: Sequence[T]) -> Iterator[tuple[T, ...]]:
    """Return every choice of things, in their order."""
    for size in range(len(things) + 1):
        yield from combinations(things, size)
