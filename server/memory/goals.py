"""Goals: what a user is after, and how much a memory has to do with it."""

import hashlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from server.errors import InvalidArgument
from server.memory import words
from server.preferences import Language

MOST: Final = 100
"""How many goals a user may have."""
NO_GOALS: Final = 0
"""The key of users who are after nothing."""

_CONTENT_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class Goal:
    """What a user is after."""

    id: UUID
    content: str
    is_active: bool
    version: int
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class GoalChange:
    """What to change about a goal; None leaves it as it is."""

    content: str | None
    is_active: bool | None
    expected_version: int | None
    """Change nothing unless the goal is at this version; None for any."""


@dataclass(frozen=True, slots=True)
class Goals:
    """A user's active goals, as memories are matched with them."""

    key: int
    """Of the goals and the language that they are read in; never NO_GOALS."""
    terms: Sequence[Set[int]]
    """What each goal's words are, without those that say nothing."""
    language: Language

    @classmethod
    def read(cls, contents: Iterable[str], language: Language) -> "Goals":
        """Read goals in the language of their user."""
        wanted = sorted(contents)
        named = "\0".join((language.value, *wanted)).encode()
        digest = hashlib.blake2b(named, digest_size=8).digest()
        key = int.from_bytes(digest, signed=True) or 1
        return cls(key, [frozenset(words.terms(one, language)) for one in wanted], language)

    def match(self, content: str, tags: Iterable[str]) -> float:
        """Return how much a memory has to do with the goal that it matches best, 0 to 1.

        That is the part of the goal's words that are among the memory's words and tags.
        """
        said = set(words.terms(" ".join((content, *tags)), self.language))
        return max((len(goal & said) / len(goal) for goal in self.terms if goal), default=0.0)


def check_goal(content: str, field: str) -> str:
    """Return the text of a goal if it can be kept.

    Raises:
        InvalidArgument: It is empty or only white space, over 1024 bytes, or holds a NUL.
    """
    if not content.strip():
        raise InvalidArgument(field, "must not be empty")
    if len(content.encode()) > _CONTENT_BYTES:
        raise InvalidArgument(field, f"must have at most {_CONTENT_BYTES} bytes")
    if "\0" in content:
        raise InvalidArgument(field, "must not hold the character NUL")
    return content
