"""All memories of a user, in whichever store they are."""

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Final
from uuid import UUID

from server.caller import Caller
from server.memory.agent_reads import AgentReads
from server.memory.bulk_store import BulkStore
from server.memory.model import Filter, Memory, Tier
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore

_PAGE: Final = 100
"""With 64 KiB each, some megabytes wait for a slow reader."""

_LOWEST: Final = UUID(int=0)


class Collection:
    """Reads from Postgres and Redis as if they were one store, and opens what is sealed.

    What an agent reads is told to the audit log before the agent is given it.
    """

    def __init__(
        self, durable: BulkStore, short_term: ShortTermStore, opener: Opener, reads: AgentReads
    ) -> None:
        self._durable = durable
        self._short_term = short_term
        self._opener = opener
        self._reads = reads

    async def some(self, caller: Caller, memory_ids: Sequence[UUID]) -> Mapping[UUID, Memory]:
        """Return those of the memories that are there.

        Raises:
            ContentUnreadable: A sealed one does not open.
            StoreUnavailable: A store does not answer.
        """
        found = await self._kept(caller, memory_ids)
        missing = set(memory_ids) - found.keys()
        if missing:
            which = Filter(tiers=frozenset({Tier.SHORT_TERM}))
            short = await self._short_term.find(caller, which, before=None)
            found |= {memory.id: memory for memory in short if memory.id in missing}
            # They may have been promoted between the two looks.
            found |= await self._kept(caller, list(missing - found.keys()))
        await self._reads.note(caller, found)
        return found

    async def _kept(self, caller: Caller, memory_ids: Sequence[UUID]) -> dict[UUID, Memory]:
        kept = await self._durable.some(caller, memory_ids) if memory_ids else ()
        return {memory.id: memory for memory in await self._opener.opened(caller, kept)}

    async def note_export(self, caller: Caller) -> None:
        """Say in the audit log that everything is read.

        Raises:
            StoreUnavailable: A store does not answer.
        """
        await self._durable.note_export(caller)

    async def in_order(
        self, caller: Caller, which: Filter, until: UUID
    ) -> AsyncGenerator[Memory, None]:
        """Yield memories with ids up to `until`, lowest first, each once.

        No connection is held while the reader thinks.

        Raises:
            ContentUnreadable: A sealed one does not open.
            StoreUnavailable: A store does not answer.
        """
        tiers = which.tiers - {Tier.SHORT_TERM}
        short = {m.id: m for m in await self._short_term.find(caller, which, before=until)}
        after = _LOWEST
        while after < until:
            page = await self._durable.page(caller, tiers, after=after, until=until, limit=_PAGE)
            page = await self._opener.opened(caller, page)
            after = page[-1].id if len(page) == _PAGE else until
            # What was promoted meanwhile is in both: then the page has it as it is now.
            due = {
                memory_id: short.pop(memory_id) for memory_id in sorted(short) if memory_id <= after
            }
            shown = due | {memory.id: memory for memory in page}
            await self._reads.note(caller, shown)
            for _, memory in sorted(shown.items()):
                yield memory
