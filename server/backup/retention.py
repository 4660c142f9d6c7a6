"""Which backups are kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta


@dataclass(frozen=True, slots=True)
class Retention:
    """For how long backups are kept."""

    all_days: int
    """Every backup is, for that long."""
    weekly_days: int
    """One of each week is, for that long."""
    at_least: int = 2
    """The newest are kept whatever their age: nobody wants to have none."""


def outdated(marks: Mapping[str, datetime], retention: Retention, now: datetime) -> set[str]:
    """Return which backups are kept no longer.

    Of each week, Monday to Sunday in UTC, it is the first backup that is kept longer: which one
    that is does not change as others are removed.

    Args:
        marks: When each backup was made.
        retention: The policy.
        now: The present instant.
    """
    oldest_first = sorted(marks, key=lambda name: marks[name])
    first_of_week: dict[tuple[int, int], str] = {}
    for name in oldest_first:
        year, week, _ = marks[name].astimezone(UTC).isocalendar()
        first_of_week.setdefault((year, week), name)
    weekly = set(first_of_week.values())
    kept = set(oldest_first[-retention.at_least :])
    for name in oldest_first:
        days = retention.weekly_days if name in weekly else retention.all_days
        if now - marks[name] <= timedelta(days=days):
            kept.add(name)
    return set(marks) - kept
