"""Telling the audit log what agents read, before they are given it."""

from collections.abc import Iterable
from typing import Final
from uuid import UUID

from server import audit, ids
from server.caller import Caller
from server.database import Database

MEMORY: Final = "memory.read"
ATTACHMENT: Final = "attachment.read"
TRANSCRIPT: Final = "transcript.read"


class AgentReads:
    """Stands between what was found and whoever asked: of users it notes nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def note(self, caller: Caller, memory_ids: Iterable[UUID]) -> None:
        """Note that memories are about to be shown to an agent.

        Raises:
            ConsentMissing: The user does not, or no longer, consent to memory.agent_access.
            AgentDisabled: The agent is disabled or gone.
            StoreUnavailable: The database does not answer: nothing may be shown.
        """
        if caller.agent:
            names = [ids.show(ids.MEMORY, memory_id) for memory_id in memory_ids]
            await self.note_names(caller, MEMORY, names)

    async def note_names(self, caller: Caller, action: str, names: Iterable[str]) -> None:
        """Note that things of some names are about to be shown to an agent; raises as `note`."""
        if caller.agent:
            async with self._database.transaction(caller) as connection:
                await audit.record_all(connection, caller, action, sorted(set(names)))
