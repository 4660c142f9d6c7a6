"""Auditing: has the audit log signed, so that nobody rewrites it unnoticed."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc

from workers.paging import pages
from workers.stream import Task

log = structlog.get_logger()

CHECKPOINT: Final = "audit.checkpoint"

PAGE_SIZE = 100


class Auditing:
    """Handler of the job that has checkpoints signed."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Prepare to ask AuditWorkService, which the channel leads to."""
        self._stub = rpc.AuditWorkServiceStub(channel)
        self._metadata = metadata
        self._page_size = page_size

    async def sign_checkpoints(self, task: Task) -> Mapping[str, Any]:
        """Have every chain signed that grew: the job "audit.checkpoint".

        An attempt that is interrupted leaves less to the next one: what is signed stays so.
        """
        request = pb.SignCheckpointsRequest(page_size=self._page_size)
        signed = 0
        async for page in pages(self._stub.SignCheckpoints, request, self._metadata):
            signed += page.signed
        log.info("audit checkpoints signed", job=task.job_id, checkpoints=signed)
        return {"signed": signed}
