"""Killed or cut off around every commit and every write: nothing is lost, and nothing is twice.

Here what leaves most in doubt happens once at each point; in tests/faults everything, everywhere.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from local.servers import Stores
from server.database import Database
from tests.conftest import Urls
from tests.crashes.faults import COMMIT, Fault, Kind
from tests.crashes.stored import Reader
from tests.crashes.trials import Trials, some_faults
from tests.crashes.victim import served


@pytest.mark.alone
@pytest.mark.timeout(300)
async def test_whatever_dies_or_is_cut_off_all_that_was_acknowledged_is_there_once(
    stores: Stores, urls: Urls, master_key: Path, database: Database, reader: Reader
) -> None:
    async with served(stores, urls, master_key) as victim:
        trials = Trials(victim, reader, database)
        await trials.tell_undisturbed()
        assert {"commit", "script", "s3 delete"} <= trials.passes.keys()
        verdicts = {str(each): await trials.survive(each) for each in some_faults(trials.passes)}
        assert {each: found for each, found in verdicts.items() if not found.is_sound} == {}
        assert median(victim.recovery_seconds) < 2


@pytest.mark.timeout(300)
async def test_without_request_ids_what_was_committed_and_not_answered_is_there_twice(
    stores: Stores, urls: Urls, master_key: Path, database: Database, reader: Reader
) -> None:
    async with served(stores, urls, master_key) as victim:
        trials = Trials(victim, reader, database)
        await trials.tell_undisturbed()
    fault = Fault(Kind.KILLED_AFTER, COMMIT, 1)
    async with served(stores, urls, master_key, without=("request ids",)) as victim:
        trials.victim = victim
        verdict = await trials.survive(fault)
        assert "audit: memory.see tide" in verdict.invented
        assert [each for each in verdict.invented if each.startswith("tide") and "used=1" in each]
