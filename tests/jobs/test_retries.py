"""How long a failed job waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.jobs.retries import LADDER, part_of_delay


def test_delay_doubles_up_to_five_minutes() -> None:
    assert LADDER == (1, 2, 4, 8, 16, 32, 64, 128, 256, 300)


@given(st.floats(0, 1))
def test_half_of_a_delay_is_chance(chance: float) -> None:
    assert 0.5 <= part_of_delay(chance) <= 1


def test_jobs_that_failed_together_do_not_return_together() -> None:
    assert part_of_delay(0.1) < part_of_delay(0.9)
