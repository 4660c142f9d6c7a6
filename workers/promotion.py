"""Promotion: has short-term memories moved to the long term that have earned it."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from workers.paging import pages
from workers.stream import Task

log = structlog.get_logger()

PROMOTE: Final = "short_term.promote"

PAGE_SIZE = 200


class Promoting:
    """Handler of the job that promotes from the short term."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        metadata: tuple[tuple[str, str], ...] = (),
        page_size: int = PAGE_SIZE,
    ) -> None:
        """Prepare to ask MaintenanceService, which the channel leads to."""
        self._stub = rpc.MaintenanceServiceStub(channel)
        self._metadata = metadata
        self._page_size = page_size

    async def promote(self, task: Task) -> Mapping[str, Any]:
        """Have the memories of all users looked through: the job "short_term.promote".

        An attempt that is interrupted leaves less to the next one: what is promoted stays so.
        """
        request = pb.PromoteShortTermRequest(page_size=self._page_size)
        promoted = withdrawn = 0
        async for page in pages(self._stub.PromoteShortTerm, request, self._metadata):
            promoted += page.promoted
            withdrawn += page.withdrawn
        log.info("short term promoted", job=task.job_id, promoted=promoted)
        return {"promoted": promoted, "withdrawn": withdrawn}
