"""Key rotation: has users' data keys wrapped by the newest master key."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from workers.paging import pages
from workers.stream import Task

log = structlog.get_logger()

REWRAP: Final = "keys.rewrap"

PAGE_SIZE = 50


class DataKeysUnreadable(Exception):
    """Some keys could not be unwrapped, although all others are done."""


class Rewrapping:
    """Handler of the job that follows a rotation of the master key."""

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

    async def rewrap(self, task: Task) -> Mapping[str, Any]:
        """Have all data keys wrapped anew: the job "keys.rewrap".

        An attempt that is interrupted leaves less to the next one: keys that are done stay so.

        Raises:
            DataKeysUnreadable: Some keys stay wrapped as they were. The old master key, if it
                still exists, must not be destroyed before their cause is known.
        """
        request = pb.RewrapDataKeysRequest(page_size=self._page_size)
        rewrapped = unreadable = 0
        async for page in pages(self._stub.RewrapDataKeys, request, self._metadata):
            rewrapped += page.rewrapped
            unreadable += page.unreadable
        if unreadable:
            log.error("data keys unreadable", job=task.job_id, keys=unreadable)
            raise DataKeysUnreadable
        return {"rewrapped": rewrapped}
