"""A memory is read while it moves from one store to the other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.cache import Redis
from server.caller import Caller
from server.database import Database
from server.memory.agent_reads import AgentReads
from server.memory.bulk_store import BulkStore
from server.memory.collection import Collection
from server.memory.model import Change, Memory, Tier
from server.memory.promotion import Promotion
from server.memory.sensitive import Opener
from server.memory.short_term import ShortTermStore
from tests.conftest import FakeClock, data_keys_of
from tests.memory.calls import Stub, create

LIFETIME = timedelta(days=1)


class Moving(ShortTermStore):
    """Short-term memories of which one becomes durable just before they are looked at."""

    def __init__(self, redis: Redis, database: Database, clock: FakeClock, leaving: UUID) -> None:
        super().__init__(redis, database, LIFETIME)
        self.clock = clock
        self.promotion = Promotion(database, ShortTermStore(redis, database, LIFETIME))
        self.leaving = leaving

    async def find(self, caller: Caller, *arguments: Any, **named: Any) -> list[Memory]:
        change = Change(tier=Tier.LONG_TERM)
        await self.promotion.promote(caller, self.leaving, change, self.clock())
        return await super().find(caller, *arguments, **named)


async def test_what_becomes_durable_between_two_looks_is_read(
    memories: Stub, caller: Caller, database: Database, redis: Redis, clock: FakeClock
) -> None:
    leaving = await create(memories, caller, "tea", tier=pb.TIER_SHORT_TERM)
    staying = await create(memories, caller, "milk", tier=pb.TIER_SHORT_TERM)
    wanted = [ids.parse(ids.MEMORY, memory.id, "id") for memory in (leaving, staying)]
    short = Moving(redis, database, clock, wanted[0])
    collection = Collection(
        BulkStore(database), short, Opener(data_keys_of(database)), AgentReads(database)
    )
    read = await collection.some(caller, wanted)
    assert [(read[one].content, read[one].tier) for one in wanted] == [
        ("tea", Tier.LONG_TERM),
        ("milk", Tier.SHORT_TERM),
    ]
