"""No user has all connections: those whose calls take long leave some to everybody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server import database as pools
from server.caller import Caller
from server.database import Database, open_pool
from server.errors import RateLimited
from tests.conftest import Urls, new_caller

SIZE = 4
SHARE = SIZE // 2


class Holders:
    """Transactions of a user that end when they are let go."""

    def __init__(self, database: Database, caller: Caller) -> None:
        self._database = database
        self._caller = caller
        self._go = asyncio.Event()
        self.begun = asyncio.Semaphore(0)
        """Released by each that has a connection."""

    async def hold(self) -> None:
        async with self._database.transaction(self._caller):
            self.begun.release()
            await self._go.wait()

    def let_go(self) -> None:
        self._go.set()


@pytest.fixture
async def small(urls: Urls) -> AsyncIterator[Database]:
    async with await open_pool(urls.application, size=SIZE, name="small") as pool:
        yield Database(pool)


async def answered(database: Database, caller: Caller) -> bool:
    return bool(await database.fetch(caller, "SELECT 1 AS one"))


async def test_calls_of_others_are_answered_while_those_of_a_user_hold_connections(
    small: Database,
) -> None:
    greedy, other = await new_caller(small), await new_caller(small)
    holders = Holders(small, greedy)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        for _ in range(3 * SIZE):
            tasks.create_task(holders.hold())
        for _ in range(SHARE):
            await holders.begun.acquire()
        for _ in range(SIZE):
            assert await answered(small, other)
        assert holders.begun.locked(), "no third has a connection"
        holders.let_go()
    assert await answered(small, greedy)


async def test_a_user_whose_calls_hold_each_other_up_is_told_that_there_are_too_many(
    small: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    greedy = await new_caller(small)
    holders = Holders(small, greedy)
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(30):
        for _ in range(SHARE):
            tasks.create_task(holders.hold())
        for _ in range(SHARE):
            await holders.begun.acquire()
        with monkeypatch.context() as patch:
            patch.setattr(pools, "ACQUIRE_SECONDS", 0.05)
            with pytest.raises(RateLimited):
                await answered(small, greedy)
        holders.let_go()
    assert await answered(small, greedy)
