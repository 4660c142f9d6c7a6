"""What tells two samples apart, and what is chance."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from bench.distributions import chance

SIZE = 500


def normal(centre: float, spread: float, chances: random.Random) -> list[float]:
    return [chances.gauss(centre, spread) for _ in range(SIZE)]


@pytest.mark.parametrize("centre_and_spread", [(0.4, 1.0), (0.0, 2.0)], ids=["shift", "spread"])
def test_samples_of_two_distributions_are_told_apart(
    centre_and_spread: tuple[float, float],
) -> None:
    chances = random.Random(0)
    assert chance(normal(0, 1, chances), normal(*centre_and_spread, chances)) < 0.001


def test_samples_of_one_are_taken_for_two_as_often_as_the_level_says() -> None:
    chances = random.Random(0)
    found = [chance(normal(0, 1, chances), normal(0, 1, chances)) for _ in range(400)]
    for level in (0.05, 0.2, 0.5):
        part = sum(each < level for each in found) / len(found)
        assert abs(part - level) < 0.06, (level, part)


@pytest.mark.parametrize(
    ("distance", "expected"),
    # Two samples of 500 that are `distance` apart: K(1.3581) = 0.05, K(1.6276) = 0.01 in
    # Kolmogorov's table, and 15.94 is what Stephens multiplies with.
    [(1.3581 / 15.94, 0.05), (1.6276 / 15.94, 0.01)],
)
def test_the_formula_is_kolmogorovs(distance: float, expected: float) -> None:
    one = [float(value) for value in range(SIZE)]
    steps = round(distance * SIZE)
    other = [value + steps for value in one]
    assert chance(one, other) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("make", [lambda: [1.0] * 20, lambda: list(range(20))])
def test_equal_samples_are_not_told_apart(make: Callable[[], list[float]]) -> None:
    assert chance(make(), make()) == 1.0
