"""Agents and their tasks as values."""

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from server.access import Scope
from server.errors import InvalidArgument

MOST_AGENTS: Final = 20
MOST_TASKS: Final = 3
"""Of one user, that wait or run."""
MOST_SENTENCES: Final = 20
USUAL_SENTENCES: Final = 5

_LONGEST_SESSION_NAME: Final = 128
_GRANTABLE: Final = frozenset(scope.value for scope in Scope) - {Scope.USER.value}
"""No agent is good for everything: it could make itself others."""


class AgentKind(enum.Enum):
    """What an agent is."""

    EXTERNAL = "external"
    """It runs somewhere else and comes with its key."""
    SUMMARIZE_SESSION = "summarize_session"
    """Its tasks are done by workers of the mesh."""


JOBS: Final[Mapping[AgentKind, str]] = {AgentKind.SUMMARIZE_SESSION: "agents.summarize_session"}
"""The kind of job that a task of an agent is."""
NEEDED: Final[Mapping[AgentKind, Sequence[Scope]]] = {
    AgentKind.EXTERNAL: (),
    AgentKind.SUMMARIZE_SESSION: (Scope.MEMORY_READ, Scope.MEMORY_WRITE),
}
"""Scopes without which an agent of a kind can do no task."""


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent as its user sees it."""

    id: UUID
    name: str
    kind: AgentKind
    scopes: Sequence[str]
    created_at: datetime
    disabled_at: datetime | None = None
    deleted_at: datetime | None = None
    key_prefix: str = ""
    key_expires_at: datetime | None = None
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Summarizing:
    """What an agent is to do with a conversation."""

    session_id: str
    sentences: int


@dataclass(frozen=True, slots=True)
class Task:
    """Something that an agent was given to do: a job, as its user sees it."""

    id: UUID
    agent_id: UUID
    doing: Summarizing
    state: str
    """As jobs have it."""
    progress: float
    error: str
    result: Mapping[str, object] | None
    created_at: datetime
    finished_at: datetime | None


def check_scopes(scopes: Iterable[str], field: str) -> list[str]:
    """Return the scopes of a new agent, each once.

    Raises:
        InvalidArgument: There is none, or one that no agent can have.
    """
    wanted = sorted(set(scopes))
    if not wanted:
        raise InvalidArgument(field, "must name at least one scope")
    if not _GRANTABLE.issuperset(wanted):
        raise InvalidArgument(field, f"must be among {', '.join(sorted(_GRANTABLE))}")
    return wanted


def check_session(session_id: str, field: str) -> str:
    """Return the name of a conversation.

    Raises:
        InvalidArgument: It is none that a conversation can have.
    """
    if not 1 <= len(session_id) <= _LONGEST_SESSION_NAME or "\0" in session_id:
        raise InvalidArgument(field, f"must have 1 to {_LONGEST_SESSION_NAME} characters, no NUL")
    return session_id


def check_sentences(sentences: int, field: str) -> int:
    """Return how many sentences a summary is to have: 5 when nothing was asked for.

    Raises:
        InvalidArgument: It is negative or over 20.
    """
    if not 0 <= sentences <= MOST_SENTENCES:
        raise InvalidArgument(field, f"must be 0 to {MOST_SENTENCES}")
    return sentences or USUAL_SENTENCES
