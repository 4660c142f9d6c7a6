"""What users remember, for tests that have no MemoryService at hand."""

from __future__ import annotations

from server.caller import Caller
from server.database import Database
from server.memory.import_store import Chunk, ImportStore
from server.memory.model import Draft, Source, Tier
from tests.conftest import FakeClock, data_keys_of


def draft(text: str) -> Draft:
    """Return what is said of a memory of the long term of which nothing but its text matters."""
    return Draft(Tier.LONG_TERM, text, (), Source.CHAT, "", None, "", None)


async def remember(database: Database, caller: Caller, *texts: str) -> None:
    """Store texts as memories of a user, in one import."""
    drafts = [draft(text) for text in texts]
    await ImportStore(database, data_keys_of(database)).store(caller, Chunk(drafts), FakeClock()())
