"""Erasing users: has what is left of them removed until nothing is found any more."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from workers.paging import PAGE_SECONDS
from workers.stream import Task

log = structlog.get_logger()

ERASE: Final = "user.erase"

PAGE_SIZE = 500
_MOST_ROUNDS: Final = 20


class NeverEmpty(Exception):
    """Something is found in every round: somebody writes what the erasure removes."""


class Erasing:
    """Handler of the job that a user's wish to be erased asks for."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Prepare to ask PrivacyWorkService, which the channel leads to."""
        self._stub = rpc.PrivacyWorkServiceStub(channel)
        self._metadata = metadata
        self._page_size = page_size

    async def erase(self, task: Task) -> Mapping[str, Any]:
        """Erase a user: the job "user.erase".

        An attempt that follows an interrupted one goes on where that one stopped.

        Raises:
            NeverEmpty: There is no end to it; another attempt comes later.
        """
        request = pb.EraseUserRequest(
            tenant_id=task.payload["tenant_id"],
            user_id=task.payload["user_id"],
            page_size=self._page_size,
        )
        removed, first = 0, None
        while True:
            answer = await self._stub.EraseUser(
                request, timeout=PAGE_SECONDS, metadata=self._metadata
            )
            removed += answer.removed
            if answer.done:
                log.info("user erased", job=task.job_id, removed=removed)
                return {"removed": removed}
            first = answer.rounds if first is None else first
            if answer.rounds - first > _MOST_ROUNDS:
                raise NeverEmpty
