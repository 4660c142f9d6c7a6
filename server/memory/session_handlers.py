"""What MemoryService answers about conversations."""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import current_caller
from server.clock import Clock
from server.errors import InvalidArgument
from server.memory import drafts, messages
from server.memory.model import Draft
from server.memory.query_handlers import Queries
from server.memory.sessions import MOST_TURNS, Keep, Sessions
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_KEEPS: Final[Mapping[int, Keep]] = {
    pb.SESSION_KEEP_UNSPECIFIED: Keep.EARNED,
    pb.SESSION_KEEP_EARNED: Keep.EARNED,
    pb.SESSION_KEEP_ALL: Keep.ALL,
    pb.SESSION_KEEP_NONE: Keep.NONE,
}


class SessionHandlers:
    """A part of MemoryService."""

    _sessions: Sessions
    _queries: Queries
    _clock: Clock

    async def AppendToSession(
        self, request: pb.AppendToSessionRequest, context: Context
    ) -> pb.AppendToSessionResponse:
        check_request_id(request.request_id)
        session_id = _session_from(request.session_id)
        turns = _turns_from(request, session_id)
        memories = await self._sessions.append(
            current_caller(), session_id, turns, request.request_id, self._clock()
        )
        return pb.AppendToSessionResponse(memories=map(messages.memory_to, memories))

    async def EndSession(
        self, request: pb.EndSessionRequest, context: Context
    ) -> pb.EndSessionResponse:
        session_id = _session_from(request.session_id)
        if request.keep not in _KEEPS:
            raise InvalidArgument("keep", f"there is no choice {request.keep}")
        caller = current_caller()
        ended = await self._sessions.end(
            caller,
            session_id,
            _KEEPS[request.keep],
            self._clock(),
            write_transcript=request.write_transcript,
        )
        await self._queries.answers.forget(caller)
        return pb.EndSessionResponse(
            promoted=ended.promoted,
            dropped=ended.dropped,
            end_time=messages.timestamp(ended.ended_at),
        )


def _session_from(session_id: str) -> str:
    if not session_id:
        raise InvalidArgument("session_id", "must name a conversation")
    return drafts.check_name(session_id, "session_id")


def _turns_from(request: pb.AppendToSessionRequest, session_id: str) -> list[Draft]:
    """Read turns, of which each is a memory whose place is still to be found."""
    if not 1 <= len(request.turns) <= MOST_TURNS:
        raise InvalidArgument("turns", f"must be 1 to {MOST_TURNS}")
    return [
        messages.draft_from(_memory_of(turn, session_id), f"turns[{place}]")
        for place, turn in enumerate(request.turns)
    ]


def _memory_of(turn: pb.SessionTurn, session_id: str) -> pb.Memory:
    return pb.Memory(
        tier=pb.TIER_SHORT_TERM,
        session_id=session_id,
        content=turn.content,
        speaker=turn.speaker,
        occur_time=turn.occur_time if turn.HasField("occur_time") else None,
        tags=turn.tags,
        channels=turn.channels,
        source=turn.source,
        scope=turn.scope,
    )
