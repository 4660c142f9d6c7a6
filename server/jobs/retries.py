"""How long a failed job waits before it is tried again."""

from typing import Final

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 300.0
_SPREAD = 0.5

LADDER: Final = tuple(min(_FIRST_SECONDS * 2.0**step, _LONGEST_SECONDS) for step in range(10))
"""The longest delay after each attempt, in seconds; after later ones it is the last."""


def part_of_delay(chance: float) -> float:
    """Return which part of its longest delay a job waits.

    "Equal jitter": half of the delay is certain, so that a dependency gets air, and half is by
    chance, so that jobs that failed together do not return together
    (Brooker, "Exponential Backoff And Jitter", 2015).

    Args:
        chance: Drawn evenly from 0 to 1.
    """
    return 1 - _SPREAD + _SPREAD * chance
