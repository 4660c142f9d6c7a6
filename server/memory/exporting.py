"""Exporting all memories over one stream."""

import hashlib
from collections.abc import AsyncGenerator
from contextlib import aclosing

from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.memory.change_store import Asked, ChangeStore
from server.memory.collection import Collection
from server.memory.messages import filter_from, memory_to
from server.memory.watching import cursor_to


class Exporter:
    """Sends memories one after the other, and says at the end what they were."""

    def __init__(self, collection: Collection, changes: ChangeStore) -> None:
        self._collection = collection
        self._changes = changes

    async def stream(
        self, caller: Caller, request: pb.ExportMemoriesRequest
    ) -> AsyncGenerator[pb.ExportMemoriesResponse, None]:
        """Send every memory that is there now, then the end.

        Raises:
            InvalidArgument: There is no such tier.
            StoreUnavailable: A store does not answer.
        """
        which = filter_from([request.tier], (), "", "tier")
        await self._collection.note_export(caller)
        (news,) = await self._changes.news([Asked(caller, after=None, limit=0)])
        count, digest = 0, hashlib.sha256()
        async with aclosing(self._collection.in_order(caller, which, ids.new_id())) as memories:
            async for memory in memories:
                message = memory_to(memory)
                count += 1
                digest.update(f"{message.id} {message.content_hash}\n".encode())
                yield pb.ExportMemoriesResponse(memory=message)
        end = pb.ExportEnd(
            count=count, sha256=digest.hexdigest(), cursor=cursor_to(news.horizon, caller)
        )
        yield pb.ExportMemoriesResponse(end=end)
