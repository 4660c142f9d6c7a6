"""Agents and tasks as the contract has them."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2 as jobs

from server import ids
from server.agents.model import (
    Agent,
    AgentKind,
    Summarizing,
    Task,
    check_sentences,
    check_session,
)
from server.errors import InvalidArgument

_KINDS: Final[Mapping[pb.AgentKind.ValueType, AgentKind]] = {
    pb.AGENT_KIND_EXTERNAL: AgentKind.EXTERNAL,
    pb.AGENT_KIND_SUMMARIZE_SESSION: AgentKind.SUMMARIZE_SESSION,
}
_KINDS_TO_PROTO: Final = {kind: value for value, kind in _KINDS.items()}
_STATES: Final[Mapping[str, jobs.JobState.ValueType]] = {
    "waiting": jobs.JOB_STATE_WAITING,
    "running": jobs.JOB_STATE_RUNNING,
    "succeeded": jobs.JOB_STATE_SUCCEEDED,
    "dead": jobs.JOB_STATE_DEAD,
    "cancelled": jobs.JOB_STATE_CANCELLED,
}


def kind_from(kind: pb.AgentKind.ValueType) -> AgentKind:
    """Return what a new agent is.

    Raises:
        InvalidArgument: It is none of the named kinds.
    """
    if kind not in _KINDS:
        raise InvalidArgument("kind", "must be one of the named kinds")
    return _KINDS[kind]


def doing_from(request: pb.RunAgentTaskRequest) -> Summarizing:
    """Return what an agent is to do.

    Raises:
        InvalidArgument: It is nothing, or nothing that can be done.
    """
    if request.WhichOneof("task") is None:
        raise InvalidArgument("task", "must say what the agent is to do")
    asked = request.summarize_session
    return Summarizing(
        check_session(asked.session_id, "summarize_session.session_id"),
        check_sentences(asked.sentences, "summarize_session.sentences"),
    )


def instant_from(timestamp: Timestamp, field: str) -> datetime:
    """Return an instant.

    Raises:
        InvalidArgument: It is none that exists.
    """
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(field, "is no instant that exists") from error


def overlap_from(overlap: Duration) -> timedelta:
    """Return for how long an old key is to stay good.

    Raises:
        InvalidArgument: It is no duration that exists.
    """
    try:
        return overlap.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InvalidArgument("overlap", "is no duration that exists") from error


def agent_to(agent: Agent) -> pb.Agent:
    """Return an agent."""
    return pb.Agent(
        id=ids.show(ids.AGENT, agent.id),
        name=agent.name,
        kind=_KINDS_TO_PROTO[agent.kind],
        scopes=agent.scopes,
        state=_state_of(agent),
        create_time=_timestamp(agent.created_at),
        key_prefix=agent.key_prefix,
        key_expire_time=_timestamp(agent.key_expires_at),
        last_use_time=_timestamp(agent.last_used_at),
    )


def _state_of(agent: Agent) -> pb.AgentState.ValueType:
    if agent.deleted_at:
        return pb.AGENT_STATE_DELETED
    return pb.AGENT_STATE_DISABLED if agent.disabled_at else pb.AGENT_STATE_ENABLED


def task_to(task: Task) -> pb.AgentTask:
    """Return a task."""
    return pb.AgentTask(
        id=ids.show(ids.JOB, task.id),
        agent_id=ids.show(ids.AGENT, task.agent_id),
        summarize_session=pb.SummarizeSession(
            session_id=task.doing.session_id, sentences=task.doing.sentences
        ),
        state=_STATES[task.state],
        progress=task.progress,
        error=task.error,
        create_time=_timestamp(task.created_at),
        finish_time=_timestamp(task.finished_at),
        summary=_summary(task.result) if task.result else None,
    )


def _summary(result: Mapping[str, object]) -> pb.Summary:
    return pb.Summary(
        memory_id=str(result["memory_id"]),
        turns=int(str(result["turns"])),
        sentences=int(str(result["sentences"])),
    )


def _timestamp(instant: datetime | None) -> Timestamp | None:
    if instant is None:
        return None
    shown = Timestamp()
    shown.FromDatetime(instant)
    return shown
