"""What nothing asks for any more is deleted, whatever else goes wrong."""

import asyncio
from datetime import datetime

from server.auth.housekeeping import Housekeeping
from server.errors import StoreUnavailable
from tests.conftest import FakeClock


async def test_a_store_that_is_away_keeps_no_other_from_forgetting(clock: FakeClock) -> None:
    forgotten: asyncio.Queue[datetime] = asyncio.Queue()

    async def away(_now: datetime) -> None:
        raise StoreUnavailable("the database")

    running = asyncio.create_task(Housekeeping([away, forgotten.put], clock=clock).run())
    # The next time would be ten minutes later.
    assert await asyncio.wait_for(forgotten.get(), 30) == clock.now
    running.cancel()
    await asyncio.wait([running])
