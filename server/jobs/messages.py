"""Jobs and schedules as the contract has them."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Final

from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids
from server.errors import InvalidArgument
from server.jobs.model import Job, JobState, UserSchedule
from server.jobs.ticks import Missed, next_ticks

_STATES: Final[Mapping[JobState, pb.JobState.ValueType]] = {
    JobState.WAITING: pb.JOB_STATE_WAITING,
    JobState.RUNNING: pb.JOB_STATE_RUNNING,
    JobState.SUCCEEDED: pb.JOB_STATE_SUCCEEDED,
    JobState.DEAD: pb.JOB_STATE_DEAD,
    JobState.CANCELLED: pb.JOB_STATE_CANCELLED,
}
_MISSED: Final[Mapping[Missed, pb.MissedTicks.ValueType]] = {
    Missed.RUN_ONCE: pb.MISSED_TICKS_RUN_ONCE,
    Missed.SKIP: pb.MISSED_TICKS_SKIP,
}
_SHOWN_TICKS: Final = 3
_FROM_PROTO: Final = {shown: state for state, shown in _STATES.items()}


def job_to(job: Job) -> pb.Job:
    """Return a job."""
    return pb.Job(
        id=ids.show(ids.JOB, job.id),
        kind=job.kind,
        state=_STATES[job.state],
        attempts=job.attempt,
        max_attempts=job.max_attempts,
        progress=job.progress,
        error=job.error,
        result_json=job.result or "",
        create_time=_timestamp(job.created_at),
        run_time=_timestamp(job.run_at),
        cancel_time=_if_any(job.cancelled_at),
        finish_time=_if_any(job.finished_at),
    )


def state_from(state: pb.JobState.ValueType) -> JobState | None:
    """Return the state to look for, or None for all.

    Raises:
        InvalidArgument: There is no such state.
    """
    if state == pb.JOB_STATE_UNSPECIFIED:
        return None
    if state not in _FROM_PROTO:
        raise InvalidArgument("state", "is none that jobs have")
    return _FROM_PROTO[state]


def schedule_to(schedule: UserSchedule) -> pb.Schedule:
    """Return a schedule that is kept."""
    return pb.Schedule(
        id=ids.show(ids.SCHEDULE, schedule.id),
        kind=schedule.kind,
        cron=schedule.cron,
        time_zone=schedule.time_zone,
        missed_ticks=_MISSED[schedule.missed],
        paused=schedule.next_run_at is None,
        next_run_times=map(_timestamp, _upcoming(schedule)),
        last_run_time=_if_any(schedule.last_run_at),
        last_job_id=ids.show(ids.JOB, schedule.last_job_id) if schedule.last_job_id else "",
        create_time=_if_any(schedule.created_at),
        payload_json=json.dumps(schedule.payload, ensure_ascii=False) if schedule.payload else "",
    )


def _upcoming(schedule: UserSchedule) -> list[datetime]:
    if schedule.next_run_at is None:
        return []
    later = next_ticks(
        schedule.cron, schedule.time_zone, schedule.next_run_at, count=_SHOWN_TICKS - 1
    )
    return [schedule.next_run_at, *later]


def missed_from(missed: pb.MissedTicks.ValueType) -> Missed:
    """Return what becomes of missed ticks: one job, unless something else is said.

    Raises:
        InvalidArgument: It is nothing that can become of them.
    """
    if missed == pb.MISSED_TICKS_UNSPECIFIED:
        return Missed.RUN_ONCE
    for known, shown in _MISSED.items():
        if shown == missed:
            return known
    raise InvalidArgument("missed_ticks", "is nothing that can become of them")


def _timestamp(instant: datetime) -> Timestamp:
    shown = Timestamp()
    shown.FromDatetime(instant)
    return shown


def _if_any(instant: datetime | None) -> Timestamp | None:
    return None if instant is None else _timestamp(instant)
