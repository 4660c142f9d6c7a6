"""How log-ins are slowed down without locking anybody out.

Failures are counted twice: for an email from one place, and for an email from everywhere. After a
few failures from one place, that place waits for 1 s, 2 s, 4 s … up to a quarter of an hour.
Whoever changes places waits as well once there were a hundred failures in all, save at places from
which the user has logged in before: a stranger who guesses on can hold up strangers, not the user.
And a mailed token resets the password at any time.

An attempt counts as failed before its password is looked at, and is struck off the count if it
succeeds: a thousand attempts at once are a thousand attempts.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

FREE_HERE: Final = 10
"""Failures from one place before it waits. Also how many log-ins at once do not fail each other."""
FREE_EVERYWHERE: Final = 100
LONGEST_DELAY: Final = timedelta(minutes=15)
KNOWN_FOR: Final = timedelta(days=30)
FORGOTTEN_AFTER: Final = timedelta(days=1)
"""After a day without a failure the count begins anew."""


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of an email, from one place or from everywhere."""

    failures: int
    tried_at: datetime
    blocked_until: datetime
    known_until: datetime

    @classmethod
    def blank(cls, now: datetime) -> "Record":
        """Return what is remembered of whom nobody knows."""
        return cls(0, now, now, now)

    def is_blocked(self, now: datetime) -> bool:
        """Tell whether attempts are refused unseen."""
        return self.blocked_until > now

    def is_known(self, now: datetime) -> bool:
        """Tell whether the user has logged in from here lately."""
        return self.known_until > now

    def with_failure(self, free: int, now: datetime) -> "Record":
        """Return what is remembered after one more failure."""
        past = 0 if now - self.tried_at > FORGOTTEN_AFTER else self.failures
        failures = past + 1
        return Record(failures, now, now + _delay(failures, free), self.known_until)


@dataclass(frozen=True, slots=True)
class Standing:
    """What is remembered of an email, from the place of an attempt and from everywhere."""

    here: Record
    everywhere: Record

    def is_allowed(self, now: datetime) -> bool:
        """Tell whether the password of an attempt is looked at."""
        if self.here.is_blocked(now):
            return False
        return self.here.is_known(now) or not self.everywhere.is_blocked(now)

    def begun(self, now: datetime) -> "Standing":
        """Return what is remembered once an attempt has begun.

        One that is not allowed counts for nothing: who waits is not made to wait longer.
        """
        if not self.is_allowed(now):
            return self
        everywhere = self.everywhere
        if not self.here.is_known(now):
            everywhere = everywhere.with_failure(FREE_EVERYWHERE, now)
        return Standing(self.here.with_failure(FREE_HERE, now), everywhere)

    def succeeded(self, now: datetime) -> "Standing":
        """Return what is remembered once an attempt has succeeded: the place is known."""
        everywhere = self.everywhere
        if not self.here.is_known(now):
            everywhere = replace(everywhere, failures=max(everywhere.failures - 1, 0))
        return Standing(Record(0, now, now, now + KNOWN_FOR), everywhere)


def subject_of(email: str, place: str | None = None) -> bytes:
    """Return what stands for an email: from one place, or from everywhere."""
    named = email if place is None else f"{email}\n{place}"
    return hashlib.sha256(named.encode()).digest()


def _delay(failures: int, free: int) -> timedelta:
    if failures < free:
        return timedelta(0)
    # The exponent is bounded: a million failures must not make a number of a million digits.
    return min(timedelta(seconds=1 << min(failures - free, 20)), LONGEST_DELAY)
