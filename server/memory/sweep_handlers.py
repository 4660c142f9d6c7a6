"""What MaintenanceService answers about the object store."""

from typing import Any, TypeAlias

import grpc
from kimberly.maintenance.v1 import maintenance_pb2 as pb

from server import paging
from server.errors import InvalidArgument, PageTokenInvalid
from server.memory.sweeping import Sweep, Swept

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class SweepHandlers:
    """A part of MaintenanceService."""

    _sweep: Sweep

    async def SweepAttachments(
        self, request: pb.SweepAttachmentsRequest, context: Context
    ) -> pb.SweepAttachmentsResponse:
        size = paging.page_size(request.page_size)
        identity = "SweepAttachments", request.stage
        swept = await self._swept(request.stage, _place(request.page_token, identity), size)
        token = paging.seal(swept.next_token.encode(), *identity) if swept.next_token else ""
        return pb.SweepAttachmentsResponse(removed=swept.removed, next_page_token=token)

    async def _swept(self, stage: int, place: str, size: int) -> Swept:
        match stage:
            case pb.SWEEP_STAGE_EXPIRED:
                return await self._sweep.expired(size)
            case pb.SWEEP_STAGE_DOOMED:
                return await self._sweep.doomed(place, size)
            case pb.SWEEP_STAGE_ORPHANS:
                return await self._sweep.orphans(place, size)
            case pb.SWEEP_STAGE_UPLOADS:
                return await self._sweep.uploads()
            case _:
                raise InvalidArgument("stage", "must name a stage")


def _place(token: str, identity: tuple[object, ...]) -> str:
    """Return where a stage goes on.

    Raises:
        PageTokenInvalid: The token is damaged, or of another stage.
    """
    if not token:
        return ""
    place = paging.unseal(token, *identity)
    if place is None:
        raise PageTokenInvalid
    return place.decode()
