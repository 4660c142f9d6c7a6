"""Reindexing: has a user's memories read anew in the language that they chose."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from workers.paging import pages
from workers.stream import Task

REINDEX: Final = "memories.reindex"

PAGE_SIZE = 200


class Reindexing:
    """Handler of the job that follows a change of a user's language."""

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

    async def reindex(self, task: Task) -> Mapping[str, Any]:
        """Have all memories of a user read anew: the job "memories.reindex".

        An attempt that follows an interrupted one starts again: what is done twice stays right.
        """
        request = pb.ReindexMemoriesRequest(
            tenant_id=task.payload["tenant_id"],
            user_id=task.payload["user_id"],
            settings_version=task.payload["settings_version"],
            page_size=self._page_size,
        )
        reindexed = 0
        async for page in pages(self._stub.ReindexMemories, request, self._metadata):
            reindexed += page.reindexed
        return {"reindexed": reindexed}
