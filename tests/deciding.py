"""What users agree to, take back and choose, for tests that have no UserService at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import asyncpg

from server.auth.endings import ConsentEndings
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.preferences import USUAL_WEIGHTS, ScoringWeights
from server.users.consent_store import ConsentStore

_USUAL: Final[Mapping[str, object]] = {
    "language": "english",
    "scoring_preset": "balanced",
    "version": 1,
    **USUAL_WEIGHTS._asdict(),
}


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


async def write_settings(owner: asyncpg.Connection, caller: Caller, **chosen: object) -> None:
    """Write what a user chose, by columns; all else is as it was, and at first as usual."""
    settings = {**_USUAL, **chosen}
    values = ", ".join(f"${number}" for number in range(3, 3 + len(settings)))
    changes = ", ".join(f"{name} = EXCLUDED.{name}" for name in chosen)
    await owner.execute(
        f"""
        INSERT INTO settings (tenant_id, user_id, {", ".join(settings)})
        VALUES ($1, $2, {values})
            ON CONFLICT (user_id, tenant_id) DO UPDATE SET {changes}
        """,
        caller.tenant_id,
        caller.user_id,
        *settings.values(),
    )


async def write_weights(
    owner: asyncpg.Connection, caller: Caller, weights: Sequence[float], preset: str = "custom"
) -> None:
    """Write that a user chose scoring weights, in the order of a preset's."""
    named = ScoringWeights(*weights)._asdict()
    await write_settings(owner, caller, scoring_preset=preset, **named)
