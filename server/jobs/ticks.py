"""When a schedule is due."""

import enum
from datetime import UTC, datetime, timedelta
from itertools import dropwhile, islice
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from server.errors import InvalidArgument

_FIELDS: Final = 5
_MINUTE: Final = 60
_HOUR: Final = 3600
_HOURS: Final = 24
_LATE: Final = timedelta(minutes=1)
"""A tick that is served later than this was missed."""


class Missed(enum.Enum):
    """What becomes of ticks at which the mesh did not run."""

    RUN_ONCE = "run_once"
    """Together they make one job."""
    SKIP = "skip"
    """They make none."""


def next_ticks(cron: str, time_zone: str, after: datetime, count: int = 1) -> list[datetime]:
    """Return the first ticks after an instant, in order, in UTC.

    Where clocks are put forward, a tick in the hour that is left out comes at its end; where they
    are put back, one in the hour that comes twice comes once, unless its hours are `*` (as
    Debian's cron has it).

    Args:
        cron: Five fields, as crontab(5) has them.
        time_zone: IANA name of the zone in which the expression is read.
        after: With time zone.
        count: How many ticks.

    Raises:
        cronsim.CronSimError: It is no cron expression.
    """
    ticks = CronSim(cron, after.astimezone(ZoneInfo(time_zone)))
    # In the second of two like hours it begins with the ticks of the first one.
    later = dropwhile(lambda tick: tick <= after, (tick.astimezone(UTC) for tick in ticks))
    return list(islice(later, count))


def at_least_every(seconds: float) -> str:
    """Return when something is due whose turns are no further apart than this, as cron.

    Args:
        seconds: How far, at most. Less than a second means every second, more than a day every
            day.

    Returns:
        A cron expression whose step divides nothing by need: the last turn before the next minute,
        hour or day may come early, and none comes late. Steps of seconds are a sixth field, ahead
        of the others.
    """
    if seconds < _MINUTE:
        return f"*/{max(int(seconds), 1)} * * * * *"
    if seconds < _HOUR:
        return f"*/{int(seconds // _MINUTE)} * * * *"
    return f"0 */{min(int(seconds // _HOUR), _HOURS)} * * *"


def check_schedule(cron: str, time_zone: str, now: datetime) -> None:
    """Refuse what never ticks.

    Raises:
        InvalidArgument: It is no cron expression of five fields or never ticks, or there is no
            such time zone.
    """
    try:
        ZoneInfo(time_zone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidArgument("time_zone", "must be an IANA name such as Europe/Berlin") from error
    if len(cron.split()) != _FIELDS:
        raise InvalidArgument("cron", f"must have {_FIELDS} fields")
    try:
        ticks = next_ticks(cron, time_zone, now)
    except CronSimError as error:
        raise InvalidArgument("cron", "must be as in crontab(5)") from error
    if not ticks:
        raise InvalidArgument("cron", "must tick some day")


def is_to_run(missed: Missed, due_at: datetime, now: datetime) -> bool:
    """Tell whether a tick that is served now makes a job."""
    return missed is Missed.RUN_ONCE or now - due_at <= _LATE
