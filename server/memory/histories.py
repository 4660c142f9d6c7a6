"""All memories of a user with all that they were, as messages: for a copy of everything."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.errors import NotFound
from server.memory.exporting import Exporter
from server.memory.lifecycle_store import LifecycleStore
from server.memory.messages import memory_to
from server.memory.model import Memory
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore

_PAGE = 100


class Histories:
    """Reads memories of all tiers, and their earlier versions."""

    def __init__(
        self,
        exporter: Exporter,
        lifecycle: LifecycleStore,
        short_term: ShortTermStore,
        opener: Opener,
    ) -> None:
        self._exporter = exporter
        self._lifecycle = lifecycle
        self._short_term = short_term
        self._opener = opener

    async def memories(self, caller: Caller) -> AsyncGenerator[pb.Memory, None]:
        """Yield every memory that is there now, archived ones too, and tell the audit log.

        Raises:
            ContentUnreadable: A sealed one does not open.
            StoreUnavailable: A store does not answer.
        """
        stream = self._exporter.stream(caller, pb.ExportMemoriesRequest())
        async with aclosing(stream) as parts:
            async for part in parts:
                if part.HasField("memory"):
                    yield part.memory

    async def past(self, caller: Caller, memory: pb.Memory) -> AsyncIterator[pb.Memory]:
        """Yield what a memory was before, the newest version first.

        Raises:
            ContentUnreadable: A sealed version does not open.
            StoreUnavailable: A store does not answer.
        """
        below = memory.version
        while below > 1:
            page = await self._page(caller, memory, below)
            for was in await self._opener.opened(caller, page):
                yield memory_to(was)
            below = page[-1].version if len(page) == _PAGE else 0

    async def _page(self, caller: Caller, memory: pb.Memory, below: int) -> list[Memory]:
        store = self._short_term if memory.tier == pb.TIER_SHORT_TERM else self._lifecycle
        memory_id = ids.parse(ids.MEMORY, memory.id, "id")
        try:
            return list(await store.versions(caller, memory_id, before=below, limit=_PAGE))
        except NotFound:  # it is gone since
            return []
