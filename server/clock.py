"""The time, as an argument."""

from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time; tests hand in another one."""

    def __call__(self) -> datetime:
        """Return the present instant, with time zone."""


def utc_now() -> datetime:
    """Return the present instant."""
    return datetime.now(UTC)
