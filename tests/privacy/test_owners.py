"""Who runs a tenant once its last owner is erased."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import asyncpg
import pytest

from server import audit, ids
from server.caller import Caller
from server.privacy.erasure_store import ErasureStore

ROUNDS = 10


async def tenant_of(owner: asyncpg.Connection, *roles: str) -> list[Caller]:
    """Return who is at home in a new tenant, in the order in which they came, each with a role."""
    tenant_id = ids.new_id()
    callers = [Caller(tenant_id, ids.new_id()) for _ in roles]
    await owner.execute("INSERT INTO tenants VALUES ($1, now())", tenant_id)
    await owner.executemany(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at, role)
        VALUES ($1, $2, $3, 'somebody', now() + make_interval(secs => $4), $5)
        """,
        [
            (tenant_id, caller.user_id, f"{caller.user_id}@example.com", place, role)
            for place, (caller, role) in enumerate(zip(callers, roles, strict=True))
        ],
    )
    return callers


async def live_elsewhere(owner: asyncpg.Connection, away: Caller, home: Caller) -> None:
    """Have one user be what the account of another is in a tenant."""
    await owner.execute(
        "UPDATE users SET home_id = $2, email = NULL WHERE id = $1", away.user_id, home.user_id
    )


async def owners_of(owner: asyncpg.Connection, tenant_id: UUID) -> Sequence[UUID]:
    rows = await owner.fetch(
        """
        SELECT id FROM users
         WHERE tenant_id = $1 AND role = 'owner'
           AND NOT EXISTS (SELECT FROM erasures WHERE user_id = users.id)
        """,
        tenant_id,
    )
    return [row["id"] for row in rows]


@pytest.mark.parametrize(
    ("others", "heir"),
    [
        (("member", "admin", "admin", "auditor"), 2),
        (("auditor", "member", "member"), 2),
        (("auditor", "auditor"), 1),
        (("admin", "owner"), 2),
    ],
)
async def test_whoever_is_next_owns_what_the_last_owner_leaves_by_being_erased(
    erasures: ErasureStore, owner: asyncpg.Connection, others: Sequence[str], heir: int
) -> None:
    callers = await tenant_of(owner, "owner", *others)
    await erasures.begin(callers[0])
    assert await owners_of(owner, callers[0].tenant_id) == [callers[heir].user_id]
    told = await owner.fetch(
        "SELECT actor, user_id FROM audit_events WHERE action = 'member.assign_owner'"
    )
    made = [] if "owner" in others else [(audit.SYSTEM, callers[heir].user_id)]
    assert [tuple(row) for row in told] == made


async def test_nobody_who_is_out_owns_a_tenant(
    erasures: ErasureStore, owner: asyncpg.Connection
) -> None:
    first, disabled, out, member = await tenant_of(owner, "owner", "admin", "admin", "member")
    (elsewhere,) = await tenant_of(owner, "owner")
    await owner.execute(
        "UPDATE users SET disabled_at = now() WHERE id = ANY ($1)",
        [disabled.user_id, elsewhere.user_id],
    )
    await live_elsewhere(owner, out, elsewhere)
    await erasures.begin(first)
    assert await owners_of(owner, first.tenant_id) == [member.user_id]


async def test_with_nobody_left_there_is_nobody_to_own_it(
    erasures: ErasureStore, owner: asyncpg.Connection
) -> None:
    (alone,) = await tenant_of(owner, "owner")
    await erasures.begin(alone)
    assert await owners_of(owner, alone.tenant_id) == []


async def test_with_an_account_every_tenant_that_it_owned_gets_another_owner(
    erasures: ErasureStore, owner: asyncpg.Connection
) -> None:
    home, colleague = await tenant_of(owner, "owner", "member")
    away, admin = await tenant_of(owner, "owner", "admin")
    await live_elsewhere(owner, away, home)
    await erasures.begin(home)
    assert await owners_of(owner, home.tenant_id) == [colleague.user_id]
    assert await owners_of(owner, away.tenant_id) == [admin.user_id]


async def test_of_owners_and_heirs_who_are_erased_at_once_whoever_is_left_owns_it(
    erasures: ErasureStore, owner: asyncpg.Connection
) -> None:
    for _ in range(ROUNDS):
        *gone, last = await tenant_of(owner, "owner", "owner", "admin", "member")
        await asyncio.gather(*(erasures.begin(each) for each in gone))
        assert await owners_of(owner, last.tenant_id) == [last.user_id]


async def test_a_restored_backup_has_another_owner_too(
    erasures: ErasureStore, owner: asyncpg.Connection
) -> None:
    first, admin = await tenant_of(owner, "owner", "admin")
    erasure = await erasures.begin(first)
    await owner.execute("UPDATE users SET role = 'admin' WHERE id = $1", admin.user_id)
    await owner.execute("DELETE FROM erasures WHERE user_id = $1", first.user_id)
    await erasures.begin_again(replace(erasure, membership_receipt_ids=()))
    assert await owners_of(owner, first.tenant_id) == [admin.user_id]
