"""How long a failed job waits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from server.jobs.retries import retry_seconds


@given(st.integers(1, 100), st.floats(0, 1))
def test_delay_doubles_up_to_five_minutes_and_half_of_it_is_chance(
    attempt: int, chance: float
) -> None:
    longest = min(2.0 ** (attempt - 1), 300)
    assert longest / 2 <= retry_seconds(attempt, chance) <= longest


def test_jobs_that_failed_together_do_not_return_together() -> None:
    assert retry_seconds(3, 0.1) < retry_seconds(3, 0.9)
