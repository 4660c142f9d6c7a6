"""Serves kimberly.privacy.v1.PrivacyWorkService: what jobs ask for."""

from typing import Any, TypeAlias

import grpc
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server import ids, paging
from server.caller import Caller
from server.privacy.erasing import Eraser

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class PrivacyWorkService(rpc.PrivacyWorkServiceServicer):
    """Serves workers."""

    def __init__(self, eraser: Eraser) -> None:
        self._eraser = eraser

    async def EraseUser(
        self, request: pb.EraseUserRequest, context: Context
    ) -> pb.EraseUserResponse:
        """Remove some of what is left of a user."""
        caller = Caller(
            ids.parse(ids.TENANT, request.tenant_id, "tenant_id"),
            ids.parse(ids.USER, request.user_id, "user_id"),
        )
        progress = await self._eraser.erase(caller, paging.page_size(request.page_size))
        return pb.EraseUserResponse(
            done=progress.is_done, removed=progress.removed, rounds=progress.rounds
        )
