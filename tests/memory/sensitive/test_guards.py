"""What the code and the database refuse by themselves."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import asyncpg
import pytest

from server import ids
from server.caller import Caller
from server.database import Database
from server.memory import insertion, messages
from server.memory.conversation import NO_TERMS, Surroundings
from server.memory.model import Draft, Source, Tier
from server.preferences import Language
from tests.memory.calls import Stub, change, create
from tests.memory.sensitive.secret import AGAIN, SECRET, keep


def draft() -> Draft:
    return Draft(Tier.LONG_TERM, SECRET, (), Source.CHAT, "", None, "", None, is_sensitive=True)


def test_plain_hash_of_a_sensitive_draft_is_not_to_be_had() -> None:
    with pytest.raises(RuntimeError):
        draft().content_hash  # noqa: B018 - looking is what fails
    assert replace(draft(), keyed_hash=b"keyed").content_hash == b"keyed"


async def test_drafts_have_no_terms_of_a_sensitive_one_unless_asked_for_by_name() -> None:
    drafts = [replace(draft(), session_id="visit", session_position=place) for place in (0, 1)]
    around = Surroundings((), Language.ENGLISH, drafts)
    assert {terms.to_binary() for terms in await around.terms_of(drafts)} == {NO_TERMS.to_binary()}


def test_sealed_memory_is_not_shown() -> None:
    memory = insertion.new_memory(
        Caller(ids.new_id(), ids.new_id()),
        ids.new_id(),
        replace(draft(), keyed_hash=b""),
        1,
        datetime(2026, 5, 4, tzinfo=UTC),
    )
    assert messages.memory_to(memory).content == SECRET
    with pytest.raises(RuntimeError):
        messages.memory_to(replace(memory, content="", sealed=b"sealed"))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE memories SET sealed = NULL, content = 'plain'",
        "UPDATE memories SET content = 'plain'",
        "UPDATE memories SET sensitive = false",
        "UPDATE memories SET scope = 'shared'",
        "UPDATE memory_versions SET sealed = NULL",
        "UPDATE memory_versions SET content = 'plain'",
        "UPDATE memory_versions SET sensitive = false",
    ],
)
async def test_database_refuses_to_keep_it_in_the_clear(
    memories: Stub, caller: Caller, owner: asyncpg.Connection, statement: str
) -> None:
    await change(memories, caller, await keep(memories, caller), content=AGAIN)
    with pytest.raises(asyncpg.CheckViolationError):
        await owner.execute(statement)


async def test_history_can_be_sealed_and_not_be_rewritten(
    memories: Stub, caller: Caller, database: Database, owner: asyncpg.Connection
) -> None:
    await change(memories, caller, await keep(memories, caller), content=AGAIN)
    await change(memories, caller, await create(memories, caller, "tea"), content="coffee")
    before = await owner.fetch("SELECT * FROM memory_versions ORDER BY memory_id")
    async with database.transaction(caller) as connection:
        status = await connection.execute(
            "UPDATE memory_versions SET sealed = 'other' WHERE sealed IS NOT NULL"
        )
    assert status == "UPDATE 0"
    for statement in (
        "UPDATE memory_versions SET content = 'rum' WHERE sealed IS NULL",
        "UPDATE memory_versions SET speaker = 'Ann'",
        "DELETE FROM memory_versions",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with database.transaction(caller) as connection:
                await connection.execute(statement)
    assert await owner.fetch("SELECT * FROM memory_versions ORDER BY memory_id") == before
