"""Exports: has a copy of everything written for a user, and removed when its time is over."""

from collections.abc import Mapping
from typing import Any, Final

import grpc
import structlog
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from workers.stream import Task

log = structlog.get_logger()

EXPORT: Final = "user.export"
EXPIRE: Final = "exports.expire"

_WRITE_SECONDS = 890.0
"""A little less than a stream may last."""
_REMOVE_SECONDS = 15.0


class ExportNotDue(Exception):
    """The time of the export is not over yet; another attempt comes later."""


class Exporting:
    """Handlers of the jobs about exports."""

    def __init__(
        self, channel: grpc.aio.Channel, *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        """Prepare to ask PrivacyWorkService, which the channel leads to."""
        self._stub = rpc.PrivacyWorkServiceStub(channel)
        self._metadata = metadata

    async def export(self, task: Task) -> Mapping[str, Any]:
        """Write an export: the job "user.export".

        An attempt that follows an interrupted one begins again; what that one left is removed.
        """
        call = self._stub.ExportUser(
            pb.ExportUserRequest(**task.payload), timeout=_WRITE_SECONDS, metadata=self._metadata
        )
        written = 0
        try:
            async for answer in call:
                written = answer.written_bytes
        finally:
            call.cancel()
        log.info("user exported", job=task.job_id, bytes=written)
        return {"writtenBytes": written}

    async def expire(self, task: Task) -> Mapping[str, Any]:
        """Remove an export: the job "exports.expire".

        Raises:
            ExportNotDue: It came too early.
        """
        answer = await self._stub.ExpireExport(
            pb.ExpireExportRequest(**task.payload),
            timeout=_REMOVE_SECONDS,
            metadata=self._metadata,
        )
        if not answer.removed:
            raise ExportNotDue
        return {}
