"""Serves kimberly.users.v1.AuditWorkService: what jobs ask for."""

from typing import Any, Final, TypeAlias

import grpc
from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc as rpc

from server import paging
from server.users.checkpointer import Checkpointer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_CHAIN_LIST: Final = "chains that grew"


class AuditWorkService(rpc.AuditWorkServiceServicer):
    """Serves workers that look after the audit log."""

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer

    async def SignCheckpoints(
        self, request: pb.SignCheckpointsRequest, context: Context
    ) -> pb.SignCheckpointsResponse:
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, _CHAIN_LIST)
        page = await self._checkpointer.sign(after, size)
        return pb.SignCheckpointsResponse(
            signed=page.signed,
            next_page_token=paging.encode(page.last, _CHAIN_LIST) if page.last else "",
        )
