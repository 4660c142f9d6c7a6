"""Killed or cut off at every pass of every crash point of a small story, one after the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from local.servers import Stores
from server.database import Database
from tests.conftest import Urls
from tests.crashes.stored import Reader, Verdict
from tests.crashes.trials import Trials, every_fault
from tests.crashes.victim import served
from tests.faults.figures import Figures


@pytest.mark.timeout(1800)
async def test_wherever_it_dies_or_is_cut_off_all_that_was_acknowledged_is_there_once(
    stores: Stores,
    urls: Urls,
    master_key: Path,
    database: Database,
    reader: Reader,
    figures: Figures,
) -> None:
    unsound: dict[str, Verdict] = {}
    async with served(stores, urls, master_key) as victim:
        trials = Trials(victim, reader, database)
        await trials.tell_undisturbed()
        for fault in every_fault(trials.passes):
            deaths = len(victim.recovery_seconds)
            verdict = await trials.survive(fault)
            recovered = victim.recovery_seconds[deaths:]
            figures.inject(
                f"{fault.kind} {fault.point}",
                service_seconds=recovered[0] if recovered else None,
            )
            figures.lost += len(verdict.lost)
            figures.duplicated += len(verdict.invented)
            if not verdict.is_sound:
                unsound[str(fault)] = verdict
    figures.operations += trials.calls
    assert unsound == {}
