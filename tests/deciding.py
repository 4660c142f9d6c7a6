"""Users who agree and take it back, for tests that have no UserService at hand."""

from __future__ import annotations

from server.auth.endings import ConsentEndings
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.users.consent_store import ConsentStore


async def decide(system: SystemDatabase, caller: Caller, purpose: str, *, granted: bool) -> None:
    """Have a user decide on a purpose, with all that follows from it."""
    store = ConsentStore(system, ConsentEndings())
    await store.record(caller, purpose, granted=granted, session_id=caller.user_id)


async def write_decision(
    database: Database, caller: Caller, purpose: str, *, granted: bool
) -> None:
    """Write what a user decided on a purpose, and nothing that follows from it."""
    async with database.transaction(caller) as connection:
        await connection.execute(
            """
            INSERT INTO consents (tenant_id, user_id, purpose, version, granted)
            SELECT $1, $2, $3, coalesce(max(version), 0) + 1, $4
              FROM consents
             WHERE tenant_id = $1 AND user_id = $2 AND purpose = $3
            """,
            caller.tenant_id,
            caller.user_id,
            purpose,
            granted,
        )


async def withdraw(database: Database, caller: Caller) -> None:
    """Have a user no longer agree to anything being stored."""
    await write_decision(database, caller, "memory.store", granted=False)
