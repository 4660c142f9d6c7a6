"""What a caller asks for: every rule on a query and the bounds of its answer."""

import math
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from server.errors import InvalidArgument
from server.memory.embeddings import Embedding
from server.memory.model import Filter

TEXT_BYTES: Final = 256 * 1024
"""10 000 words of any language, and some: German and Cyrillic ones have 13 bytes and more."""
MOST_MATCHES: Final = 100
USUAL_MATCHES: Final = 10
MOST_TOKENS: Final = 1_000_000
HIGHEST_MIN_SCORE: Final = 2.0


@dataclass(frozen=True, slots=True)
class Question:
    """A query, and what its answer may hold."""

    text: str
    which: Filter
    as_of: datetime
    """When freshness and expiry are measured."""
    embedding: Embedding | None = None
    limit: int = USUAL_MATCHES
    min_score: float = 0.0
    max_tokens: int | None = None
    max_per_session: int | None = None
    include_shared: bool = False
    """Whether what others of the tenant share is looked at too, by its words."""


def check_text(text: str) -> str:
    """Return a query; any text is legal that is not too long.

    Raises:
        InvalidArgument: It has more than 256 KiB.
    """
    if len(text.encode()) > TEXT_BYTES:
        raise InvalidArgument("query", f"must have at most {TEXT_BYTES} bytes")
    return text


def check_limit(top_k: int, max_tokens: int | None) -> int:
    """Return how many memories may be found.

    Raises:
        InvalidArgument: top_k is not 0 to 100, or max_tokens is no bound.
    """
    if not 0 <= top_k <= MOST_MATCHES:
        raise InvalidArgument("top_k", f"must be 0 to {MOST_MATCHES}")
    if max_tokens is None:
        return top_k or USUAL_MATCHES
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise InvalidArgument("max_tokens", f"must be 1 to {MOST_TOKENS}")
    return top_k or MOST_MATCHES


def check_max_per_session(number: int) -> int:
    """Return how many turns of one conversation may be found.

    Raises:
        InvalidArgument: It is not 1 to 100.
    """
    if not 1 <= number <= MOST_MATCHES:
        raise InvalidArgument("max_per_session", f"must be 1 to {MOST_MATCHES}")
    return number


def check_min_score(score: float) -> float:
    """Return the least score of a match.

    Raises:
        InvalidArgument: It is not 0 to 2.
    """
    if math.isnan(score) or not 0 <= score <= HIGHEST_MIN_SCORE:
        raise InvalidArgument("min_score", f"must be 0 to {HIGHEST_MIN_SCORE:g}")
    return score


def check_window(after: datetime | None, before: datetime | None) -> None:
    """Refuse a window that nothing fits into.

    Raises:
        InvalidArgument: It ends before it starts, or as it starts.
    """
    if after is not None and before is not None and before <= after:
        raise InvalidArgument("occurred_before", "must be later than occurred_after")
