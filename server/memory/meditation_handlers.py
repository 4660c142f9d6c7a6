"""What MemoryService answers about meditations."""

from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids, paging
from server.caller import current_caller
from server.clock import Clock
from server.memory import messages
from server.memory.meditation_store import MeditationStore
from server.memory.undoing import Undoing

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MeditationHandlers:
    """A part of MemoryService."""

    _meditations: MeditationStore
    _undoing: Undoing
    _clock: Clock

    async def Meditate(self, request: pb.MeditateRequest, context: Context) -> pb.MeditateResponse:
        run = await self._meditations.start(
            current_caller(), request.request_id, full_run=request.full, dry_run=request.dry_run
        )
        return pb.MeditateResponse(meditation=messages.meditation_to(run))

    async def GetMeditation(
        self, request: pb.GetMeditationRequest, context: Context
    ) -> pb.GetMeditationResponse:
        run = await self._meditations.get(
            current_caller(), ids.parse(ids.MEDITATION, request.id, "id")
        )
        return pb.GetMeditationResponse(meditation=messages.meditation_to(run))

    async def ListMeditations(
        self, request: pb.ListMeditationsRequest, context: Context
    ) -> pb.ListMeditationsResponse:
        caller = current_caller()
        size = paging.page_size(request.page_size)
        identity = ("ListMeditations", caller)
        before = paging.decode(request.page_token, *identity)
        found = await self._meditations.page(caller, before=before, limit=size + 1)
        page, more = found[:size], len(found) > size
        return pb.ListMeditationsResponse(
            meditations=map(messages.meditation_to, page),
            next_page_token=paging.encode(page[-1].id, *identity) if more else "",
        )

    async def UndoMeditation(
        self, request: pb.UndoMeditationRequest, context: Context
    ) -> pb.UndoMeditationResponse:
        meditation_id = ids.parse(ids.MEDITATION, request.id, "id")
        undone = await self._undoing.undo(current_caller(), meditation_id, self._clock())
        return pb.UndoMeditationResponse(
            meditation=messages.meditation_to(undone.meditation),
            restored=undone.restored,
            kept_archived=undone.kept_archived,
        )
