"""SIGKILL of every part, one after the other, while memories are written and read."""

import asyncio
import os
import random

import pytest

from local.mesh import Mesh
from server import ids
from tests.faults.chaos import KINDS, Chaos
from tests.faults.checker import Verdict, judge, read_stored
from tests.faults.driver import Driver, User
from tests.faults.figures import Figures
from tests.faults.history import History
from tests.faults.reach import as_superuser, assert_audit_is_intact, signed_up

KILLS = int(os.environ.get("KILLS", 2 * len(KINDS)))


def plan(chance: random.Random) -> list[str]:
    """Return what is killed: every kind as often as the others, in an order by chance."""
    kinds = [KINDS[number % len(KINDS)] for number in range(KILLS)]
    chance.shuffle(kinds)
    return kinds


async def judged(mesh: Mesh, history: History, users: list[User], figures: Figures) -> Verdict:
    """Judge a history and count what comes of it."""
    async with as_superuser(mesh) as superuser:
        whose = [ids.parse(ids.USER, user.user_id, "user") for user in users]
        verdict = judge(history, await read_stored(superuser, whose))
    figures.operations += verdict.operations
    figures.memories += verdict.memories
    figures.lost += len(verdict.lost)
    figures.duplicated += len(verdict.duplicated)
    figures.unresolved += len(verdict.unresolved)
    figures.overdue += len(verdict.overdue)
    return verdict


@pytest.mark.timeout(60 + 30 * KILLS)
async def test_nothing_acknowledged_is_lost_or_doubled_whatever_is_killed(
    mesh: Mesh, figures: Figures
) -> None:
    chance = random.Random(figures.seed)
    history = History()
    async with (
        signed_up(mesh, "anna") as anna,
        signed_up(mesh, "boris") as boris,
        signed_up(mesh, "probe") as probe,
        signed_up(mesh, "other") as other,
    ):
        driver = Driver([anna, boris], history, chance)
        chaos = Chaos(mesh, driver, probe, other, chance)
        try:
            async with driver.driving():
                for kind in plan(chance):
                    # Load between two kills, so that the next one hits another moment of it.
                    await asyncio.sleep(chance.uniform(0.1, 0.6))
                    recovery = await chaos.kill(kind)
                    figures.inject(
                        f"SIGKILL {kind}",
                        service_seconds=recovery.service_seconds,
                        whole_seconds=recovery.whole_seconds,
                    )
        finally:
            history.save(mesh.layout.state / "history.jsonl")
        verdict = await judged(mesh, history, [anna, boris, probe], figures)
        assert verdict.problems == {}
        assert verdict.memories > 10 * KILLS, "there was hardly any load"
        for user in (anna, boris, probe):
            await assert_audit_is_intact(mesh, user.client, user.user_id)
