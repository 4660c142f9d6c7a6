"""Housekeeping: has removed what nobody names any more."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from workers.paging import PAGE_SECONDS, pages
from workers.stream import Task

log = structlog.get_logger()

SWEEP_ATTACHMENTS: Final = "attachments.sweep"
SWEEP_MEMORIES: Final = "memories.sweep"

PAGE_SIZE = 200
# What expires is doomed, and what is doomed is removed, in one sweep.
_STAGES: Final = {
    "expired": pb.SWEEP_STAGE_EXPIRED,
    "doomed": pb.SWEEP_STAGE_DOOMED,
    "orphans": pb.SWEEP_STAGE_ORPHANS,
    "uploads": pb.SWEEP_STAGE_UPLOADS,
}


class Housekeeping:
    """Handlers of the jobs that keep house."""

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

    async def sweep_attachments(self, task: Task) -> Mapping[str, Any]:
        """Sweep the object store: the job "attachments.sweep".

        An attempt that is interrupted leaves less to the next one: what is removed stays so.
        """
        removed = {name: await self._sweep(stage) for name, stage in _STAGES.items()}
        log.info("object store swept", job=task.job_id, **removed)
        return removed

    async def sweep_memories(self, task: Task) -> Mapping[str, Any]:
        """Archive and delete memories whose time has come: the job "memories.sweep"."""
        archived = deleted = 0
        while True:
            page = await self._stub.SweepMemories(
                pb.SweepMemoriesRequest(page_size=self._page_size),
                timeout=PAGE_SECONDS,
                metadata=self._metadata,
            )
            archived, deleted = archived + page.archived, deleted + page.deleted
            if not page.archived and not page.deleted:
                log.info("memories swept", job=task.job_id, archived=archived, deleted=deleted)
                return {"archived": archived, "deleted": deleted}

    async def _sweep(self, stage: "pb.SweepStage.ValueType") -> int:
        """Go through the pages of a stage and return how many things were removed."""
        request = pb.SweepAttachmentsRequest(stage=stage, page_size=self._page_size)
        return sum(
            [
                page.removed
                async for page in pages(self._stub.SweepAttachments, request, self._metadata)
            ]
        )
