"""Users who agree and take it back, for tests that have no UserService at hand."""

from __future__ import annotations

from server.auth.endings import ConsentEndings
from server.caller import Caller
from server.database import SystemDatabase
from server.users.consent_store import ConsentStore


async def decide(system: SystemDatabase, caller: Caller, purpose: str, *, granted: bool) -> None:
    """Have a user decide on a purpose."""
    store = ConsentStore(system, ConsentEndings())
    await store.record(caller, purpose, granted=granted, session_id=caller.user_id)
