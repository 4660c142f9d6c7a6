"""What MemoryService answers in streams: import, export, watching."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import current_caller
from server.memory.exporting import Exporter
from server.memory.importing import Importer
from server.memory.retrieval import Retrieval
from server.memory.watching import Watcher

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(frozen=True, slots=True)
class Streams:
    """What does the work of a stream."""

    importer: Importer
    exporter: Exporter
    watcher: Watcher


class StreamHandlers:
    """A part of MemoryService."""

    _streams: Streams
    _retrieval: Retrieval

    async def ImportMemories(
        self, request_iterator: AsyncIterator[pb.ImportMemoriesRequest], context: Context
    ) -> pb.ImportMemoriesResponse:
        caller = current_caller()
        try:
            return await self._streams.importer.run(caller, request_iterator)
        finally:
            self._retrieval.forget(caller)

    async def GetImport(
        self, request: pb.GetImportRequest, context: Context
    ) -> pb.GetImportResponse:
        progress = await self._streams.importer.progress(current_caller(), request.request_id)
        return pb.GetImportResponse(progress=progress)

    def ExportMemories(
        self, request: pb.ExportMemoriesRequest, context: Context
    ) -> AsyncIterator[pb.ExportMemoriesResponse]:
        return self._streams.exporter.stream(current_caller(), request)

    def WatchMemories(
        self, request: pb.WatchMemoriesRequest, context: Context
    ) -> AsyncIterator[pb.WatchMemoriesResponse]:
        return self._streams.watcher.stream(current_caller(), request)
