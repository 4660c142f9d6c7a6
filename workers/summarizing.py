"""Agents that summarise conversations: reads one, and has its most telling sentences kept."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.agents.v1 import agents_pb2_grpc as rpc

from workers.digest import Digest
from workers.stream import Task

log = structlog.get_logger()

SUMMARIZE: Final = "agents.summarize_session"

_CALL_SECONDS = 15.0
_READING = 0.9
"""Part of the work that is done when everything is read."""


class NothingSaid(Exception):
    """The conversation has no turns that the agent sees."""


class Summarizing:
    """Handler of the tasks of agents that summarise.

    What the agent may see is the server's to say: a worker knows the job and its lease, no more.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Prepare to ask AgentWorkService, which the channel leads to."""
        self._stub = rpc.AgentWorkServiceStub(channel)
        self._metadata = metadata

    async def summarize(self, task: Task) -> Mapping[str, Any]:
        """Summarise a conversation: the job "agents.summarize_session".

        An attempt that follows an interrupted one begins again; one job keeps one summary.

        Raises:
            NothingSaid: There is nothing to summarise.
        """
        request = pb.ReadSessionRequest(job_id=task.job_id, lease_token=task.lease_token)
        digest, read, total, wanted = Digest(), 0, 0, 0
        while True:
            page = await self._stub.ReadSession(
                request, timeout=_CALL_SECONDS, metadata=self._metadata
            )
            total, wanted = total or page.total_turns, page.sentences
            # Not on the event loop, whose heartbeats keep the lease.
            await asyncio.to_thread(_take_in, digest, page.turns)
            read += len(page.turns)
            task.report(_READING * min(1.0, read / total) if total else _READING)
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return await self._keep(task, digest, read, wanted)

    async def _keep(self, task: Task, digest: Digest, read: int, wanted: int) -> dict[str, Any]:
        chosen = await asyncio.to_thread(digest.choose, wanted)
        if not chosen:
            raise NothingSaid
        kept = await self._stub.KeepSummary(
            pb.KeepSummaryRequest(
                job_id=task.job_id,
                lease_token=task.lease_token,
                content="\n".join(sentence.text for sentence in chosen),
                sensitive=any(sentence.is_sensitive for sentence in chosen),
            ),
            timeout=_CALL_SECONDS,
            metadata=self._metadata,
        )
        log.info("conversation summarised", job=task.job_id, turns=read, sentences=len(chosen))
        return {"memory_id": kept.memory_id, "turns": read, "sentences": len(chosen)}


def _take_in(digest: Digest, turns: Iterable[pb.ReadTurn]) -> None:
    for turn in turns:
        digest.add(turn.content, is_sensitive=turn.sensitive)
