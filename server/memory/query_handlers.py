"""What MemoryService answers to questions."""

import asyncio
import hashlib
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller, current_caller
from server.clock import Clock
from server.errors import ConsentMissing
from server.memory import messages
from server.memory.agent_reads import MEMORY, AgentReads
from server.memory.answers import Answers, Look
from server.memory.legs import patience_ends
from server.memory.metrics import CACHE
from server.memory.questions import Question
from server.memory.retrieval import Retrieval
from server.memory.retrieval_counts import RetrievalCounts

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class Queries:
    """What a question is answered with."""

    retrieval: Retrieval
    answers: Answers
    counts: RetrievalCounts


class QueryHandlers:
    """A part of MemoryService."""

    _queries: Queries
    _reads: AgentReads
    _clock: Clock

    async def QueryMemories(
        self, request: pb.QueryMemoriesRequest, context: Context
    ) -> pb.QueryMemoriesResponse:
        caller, now = current_caller(), self._clock()
        until = patience_ends(asyncio.get_running_loop().time(), context.time_remaining())
        question = messages.question_from(request, now)
        look = await self._look(caller, request, until)
        response = await self._known(caller, question, look, now)
        if response is None:
            response = await self._found(caller, question, look, now, until)
        names = (match.memory.id for match in response.matches)
        await self._reads.note_names(caller, MEMORY, names)
        self._count(caller, response)
        return response

    def _count(self, caller: Caller, response: pb.QueryMemoriesResponse) -> None:
        durable, short_term = list[str](), list[str]()
        for match in response.matches:
            memory = match.memory
            if not memory.user_id:  # what others share is theirs to count
                is_short_term = memory.tier == pb.TIER_SHORT_TERM
                (short_term if is_short_term else durable).append(memory.id)
        self._queries.counts.note(caller, durable, short_term)

    async def _look(
        self, caller: Caller, request: pb.QueryMemoriesRequest, until: float
    ) -> Look | None:
        if request.include_shared:  # what others write leaves no trace in the caller's versions
            return None
        if caller.agent:  # it may see less than its user, who would be given its answer
            return None
        answers = self._queries.answers
        question = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        if not answers.comes_again(caller, question):
            return None
        return await answers.look(caller, question, until)

    async def _known(
        self, caller: Caller, question: Question, look: Look | None, now: datetime
    ) -> pb.QueryMemoriesResponse | None:
        """Return the answer that is kept, if it is still what would be found."""
        kept = look and look.standing(now)
        if kept:
            response = pb.QueryMemoriesResponse.FromString(kept.body)
            with_vectors = question.embedding is not None or bool(response.semantic_model)
            # Whether what is missing is needed, whoever finds the answer anew says.
            with suppress(ConsentMissing):
                retrieval = self._queries.retrieval
                if await retrieval.versions(caller, with_vectors=with_vectors) == kept.versions:
                    CACHE.labels("hit").inc()
                    return response
        CACHE.labels("miss").inc()
        return None

    async def _found(
        self,
        caller: Caller,
        question: Question,
        look: Look | None,
        now: datetime,
        until: float,
    ) -> pb.QueryMemoriesResponse:
        answer = await self._queries.retrieval.query(caller, question, until)
        response = messages.answer_to(answer)
        # Sensitive text is in no store but the one that keeps it encrypted.
        if look and answer.is_whole and not answer.is_sensitive:
            self._queries.answers.keep(
                look, response.SerializeToString(), answer.versions, now, answer.expires_at
            )
        return response
