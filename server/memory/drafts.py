"""What callers may ask to keep: every rule on the fields of a memory."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from server.errors import InvalidArgument
from server.memory.model import Scope, Tier

CONTENT_BYTES: Final = 64 * 1024
TAGS: Final = 32
CHANNELS: Final = 16
LABEL_CHARACTERS: Final = 64
NAME_CHARACTERS: Final = 128
_EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)


def check_content(content: str, field: str) -> str:
    """Return the content if it can be kept.

    Raises:
        InvalidArgument: It is empty or only white space, over 64 KiB, or holds a NUL.
    """
    if not content.strip():
        raise InvalidArgument(field, "must not be empty")
    size = len(content.encode())
    if size > CONTENT_BYTES:
        raise InvalidArgument(field, f"has {size} bytes; at most {CONTENT_BYTES} are kept")
    return _without_nul(content, field)


def check_tags(tags: Iterable[str], field: str) -> tuple[str, ...]:
    """Return the tags as a sorted set.

    Raises:
        InvalidArgument: There are too many, or one is empty, too long or holds a NUL.
    """
    return _check_labels(tags, TAGS, field)


def check_channels(channels: Iterable[str], field: str) -> tuple[str, ...]:
    """Return the channels as a sorted set.

    Raises:
        InvalidArgument: There are too many, or one is empty, too long or holds a NUL.
    """
    return _check_labels(channels, CHANNELS, field)


def check_name(name: str, field: str) -> str:
    """Return a short text, such as a speaker, that may be empty.

    Raises:
        InvalidArgument: It is over 128 characters or holds a NUL.
    """
    if len(name) > NAME_CHARACTERS:
        raise InvalidArgument(field, f"must have at most {NAME_CHARACTERS} characters")
    return _without_nul(name, field)


def check_position(position: int, session_id: str, field: str) -> int:
    """Return a place in a conversation.

    Raises:
        InvalidArgument: It is negative, or there is no conversation.
    """
    if position < 0:
        raise InvalidArgument(field, "must not be negative")
    if not session_id:
        raise InvalidArgument(field, "needs a session_id")
    return position


def check_sensitive(tier: Tier, scope: Scope, path: str) -> None:
    """Refuse a sensitive memory that would be kept in the clear or shown to others.

    Raises:
        InvalidArgument: It is short-term, or not private.
    """
    if tier is Tier.SHORT_TERM:
        raise InvalidArgument(
            f"{path}.sensitive", "a short-term memory is not encrypted; keep it long-term"
        )
    if scope is not Scope.PRIVATE:
        raise InvalidArgument(f"{path}.scope", "must be private: the memory is sensitive")


def check_instant(instant: datetime, field: str) -> datetime:
    """Return an instant that every store can hold.

    Raises:
        InvalidArgument: It is before 1900 or after 9000.
    """
    if not _EARLIEST <= instant < _LATEST:
        raise InvalidArgument(field, "must be between the years 1900 and 9000")
    return instant


def _check_labels(labels: Iterable[str], most: int, field: str) -> tuple[str, ...]:
    kept = sorted(set(labels))
    if len(kept) > most:
        raise InvalidArgument(field, f"has {len(kept)} entries; at most {most} are kept")
    for label in kept:
        if not 1 <= len(label) <= LABEL_CHARACTERS:
            raise InvalidArgument(field, f"each must have 1 to {LABEL_CHARACTERS} characters")
        _without_nul(label, field)
    return tuple(kept)


def _without_nul(text: str, field: str) -> str:
    if "\0" in text:
        raise InvalidArgument(field, "must not hold the character NUL")
    return text
