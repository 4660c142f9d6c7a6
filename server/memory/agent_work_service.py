"""Serves kimberly.agents.v1.AgentWorkService: what workers do for agents, as these agents."""

import struct
from typing import Any, Final, TypeAlias
from uuid import UUID

import grpc
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.agents.v1 import agents_pb2_grpc as rpc

from server import ids, paging
from server.access import Scope
from server.clock import Clock
from server.errors import PageTokenInvalid, RequestIdReused
from server.memory import drafts
from server.memory.agent_jobs import AgentJob, AgentJobs, Place
from server.memory.agent_reads import AgentReads
from server.memory.model import Draft, Filter, Memory, Source, Tier
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_TAG: Final = "summary"
_PLACE: Final = struct.Struct(">i16s")


class AgentWorkService(rpc.AgentWorkServiceServicer):
    """Serves workers. Consent is asked for in every transaction: they begin as the agent's."""

    def __init__(
        self,
        jobs: AgentJobs,
        store: MemoryStore,
        short_term: ShortTermStore,
        opener: Opener,
        reads: AgentReads,
        clock: Clock,
    ) -> None:
        self._jobs = jobs
        self._store = store
        self._short_term = short_term
        self._opener = opener
        self._reads = reads
        self._clock = clock

    async def ReadSession(
        self, request: pb.ReadSessionRequest, context: Context
    ) -> pb.ReadSessionResponse:
        """Return the next turns."""
        job = await self._open(request)
        job.check(Scope.MEMORY_READ)
        after = _place_from(request.page_token, job)
        total = 0 if request.page_token else await self._total(job)
        turns, is_last = await self._next(job, after)
        await self._reads.note(job.caller, [turn.id for turn in turns])
        return pb.ReadSessionResponse(
            turns=map(_turn_to, await self._opener.opened(job.caller, turns)),
            total_turns=total,
            sentences=job.sentences,
            next_page_token="" if is_last else _token_of(turns[-1], job),
        )

    async def KeepSummary(
        self, request: pb.KeepSummaryRequest, context: Context
    ) -> pb.KeepSummaryResponse:
        """Store the summary, or return the one that an earlier attempt of the job stored."""
        job = await self._open(request)
        job.check(Scope.MEMORY_WRITE)
        draft = Draft(
            tier=Tier.LONG_TERM,
            content=drafts.check_content(request.content, "content"),
            tags=(_TAG,),
            source=Source.AGENT,
            session_id=job.session_id,
            session_position=None,
            speaker="",
            occurred_at=None,
            is_sensitive=request.sensitive,
        )
        request_id = ids.show(ids.JOB, job.id)
        try:
            kept, _ = await self._store.create(job.caller, draft, request_id, self._clock())
        except RequestIdReused:  # the conversation went on between two attempts
            kept = await self._store.made(job.caller, request_id)
        return pb.KeepSummaryResponse(memory_id=ids.show(ids.MEMORY, kept.id))

    async def _open(self, request: pb.ReadSessionRequest | pb.KeepSummaryRequest) -> AgentJob:
        job_id = ids.parse(ids.JOB, request.job_id, "job_id")
        return await self._jobs.open(job_id, request.lease_token)

    async def _next(self, job: AgentJob, after: Place) -> tuple[list[Memory], bool]:
        """Return the next turns of both stores in their order, and whether they are the last."""
        # In this order what is promoted meanwhile is in both, and in neither never.
        short = await self._short(job)
        durable = await self._jobs.durable(job, after)
        until = _place_of(durable[-1]) if durable else None
        turns = {turn.id: turn for turn in short if _is_between(after, _place_of(turn), until)}
        turns |= {turn.id: turn for turn in durable}
        return sorted(turns.values(), key=_place_of), not durable

    async def _total(self, job: AgentJob) -> int:
        return await self._jobs.count_durable(job) + len(await self._short(job))

    async def _short(self, job: AgentJob) -> list[Memory]:
        which = Filter(tiers=frozenset({Tier.SHORT_TERM}), session_id=job.session_id)
        found = await self._short_term.find(job.caller, which, before=None)
        return [turn for turn in found if turn.session_position is not None]


def _is_between(after: Place, place: Place, until: Place | None) -> bool:
    return after < place and (until is None or place < until)


def _place_of(turn: Memory) -> Place:
    return Place(turn.session_position or 0, turn.id)


def _token_of(turn: Memory, job: AgentJob) -> str:
    place = _place_of(turn)
    return paging.seal(_PLACE.pack(place.position, place.memory_id.bytes), "ReadSession", job.id)


def _place_from(token: str, job: AgentJob) -> Place:
    if not token:
        return Place()
    packed = paging.unseal(token, "ReadSession", job.id)
    if packed is None:
        raise PageTokenInvalid
    position, memory_id = _PLACE.unpack(packed)
    return Place(position, UUID(bytes=memory_id))


def _turn_to(turn: Memory) -> pb.ReadTurn:
    return pb.ReadTurn(speaker=turn.speaker, content=turn.content, sensitive=turn.is_sensitive)
