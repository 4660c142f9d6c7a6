"""Serves kimberly.maintenance.v1.MaintenanceService: housekeeping that jobs ask for."""

from typing import Any, Final, TypeAlias

import grpc
from kimberly.maintenance.v1 import maintenance_pb2 as pb
from kimberly.maintenance.v1 import maintenance_pb2_grpc as rpc

from server import ids, paging
from server.caller import Caller
from server.clock import Clock
from server.memory.key_rotation import KeyRotation
from server.memory.promotion_handlers import PromotionHandlers
from server.memory.promotion_rounds import PromotionRounds
from server.memory.reindex_store import ReindexStore
from server.memory.retention_store import RetentionStore
from server.memory.sweep_handlers import SweepHandlers
from server.memory.sweeping import Sweep

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_KEY_LIST: Final = "data keys"
_REINDEX_LIST: Final = "memories to reindex"


class MaintenanceService(SweepHandlers, PromotionHandlers, rpc.MaintenanceServiceServicer):
    """Serves workers that keep house."""

    def __init__(
        self,
        rotation: KeyRotation,
        reindexing: ReindexStore,
        sweep: Sweep,
        retention: RetentionStore,
        promotion: PromotionRounds,
        clock: Clock,
    ) -> None:
        self._rotation = rotation
        self._reindexing = reindexing
        self._sweep = sweep
        self._retention = retention
        self._promotion = promotion
        self._clock = clock

    async def SweepMemories(
        self, request: pb.SweepMemoriesRequest, context: Context
    ) -> pb.SweepMemoriesResponse:
        size = paging.page_size(request.page_size)
        now = self._clock()
        await self._retention.forget_requests(now)
        return pb.SweepMemoriesResponse(
            archived=await self._retention.archive_unseen(now, size),
            deleted=await self._retention.delete_due(now, size),
        )

    async def RewrapDataKeys(
        self, request: pb.RewrapDataKeysRequest, context: Context
    ) -> pb.RewrapDataKeysResponse:
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, _KEY_LIST)
        page = await self._rotation.rewrap(after, size)
        return pb.RewrapDataKeysResponse(
            rewrapped=page.rewrapped,
            unreadable=page.unreadable,
            next_page_token=paging.encode(page.last, _KEY_LIST) if page.last else "",
        )

    async def ReindexMemories(
        self, request: pb.ReindexMemoriesRequest, context: Context
    ) -> pb.ReindexMemoriesResponse:
        caller = Caller(
            ids.parse(ids.TENANT, request.tenant_id, "tenant_id"),
            ids.parse(ids.USER, request.user_id, "user_id"),
        )
        size = paging.page_size(request.page_size)
        list_identity = _REINDEX_LIST, caller, request.settings_version
        after = paging.decode(request.page_token, *list_identity)
        page = await self._reindexing.reindex(caller, request.settings_version, after, size)
        return pb.ReindexMemoriesResponse(
            reindexed=page.count,
            next_page_token=paging.encode(page.last, *list_identity) if page.last else "",
        )
