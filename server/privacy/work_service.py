"""Serves kimberly.privacy.v1.PrivacyWorkService: what jobs ask for."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, Final, TypeAlias

import grpc
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server import ids, paging
from server.caller import Caller
from server.privacy.erasing import Eraser
from server.privacy.exporting import UserExporter

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


_TOLD_BYTES: Final = 1024 * 1024
"""How much is written between two messages."""


class PrivacyWorkService(rpc.PrivacyWorkServiceServicer):
    """Serves workers."""

    def __init__(self, eraser: Eraser, exporter: UserExporter) -> None:
        self._eraser = eraser
        self._exporter = exporter

    async def ExportUser(
        self, request: pb.ExportUserRequest, context: Context
    ) -> AsyncIterator[pb.ExportUserResponse]:
        """Write an export."""
        export_id = ids.parse(ids.EXPORT, request.export_id, "export_id")
        told = written = 0
        async with aclosing(self._exporter.write(_caller(request), export_id)) as writing:
            async for written in writing:
                if written - told >= _TOLD_BYTES:
                    told = written
                    yield pb.ExportUserResponse(written_bytes=written)
        yield pb.ExportUserResponse(written_bytes=written, done=True)

    async def ExpireExport(
        self, request: pb.ExpireExportRequest, context: Context
    ) -> pb.ExpireExportResponse:
        """Remove an export whose time is over."""
        export_id = ids.parse(ids.EXPORT, request.export_id, "export_id")
        removed = await self._exporter.expire(_caller(request), export_id)
        return pb.ExpireExportResponse(removed=removed)

    async def EraseUser(
        self, request: pb.EraseUserRequest, context: Context
    ) -> pb.EraseUserResponse:
        """Remove some of what is left of a user."""
        size = paging.page_size(request.page_size)
        progress = await self._eraser.erase(_caller(request), size)
        return pb.EraseUserResponse(
            done=progress.is_done, removed=progress.removed, rounds=progress.rounds
        )


def _caller(request: pb.EraseUserRequest | pb.ExportUserRequest | pb.ExpireExportRequest) -> Caller:
    return Caller(
        ids.parse(ids.TENANT, request.tenant_id, "tenant_id"),
        ids.parse(ids.USER, request.user_id, "user_id"),
    )
