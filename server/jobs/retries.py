"""How long a failed job waits before it is tried again."""

_FIRST_SECONDS = 1.0
_LONGEST_SECONDS = 300.0
_SPREAD = 0.5


def retry_seconds(attempt: int, chance: float) -> float:
    """Return how long to wait after a failed attempt.

    Exponential with "equal jitter": half of the delay is certain, so that a dependency gets
    air, and half is by chance, so that jobs that failed together do not return together
    (Brooker, "Exponential Backoff And Jitter", 2015).

    Args:
        attempt: Which attempt failed, from 1.
        chance: Drawn evenly from 0 to 1.
    """
    longest = min(_FIRST_SECONDS * 2.0 ** min(attempt - 1, 32), _LONGEST_SECONDS)
    return longest * (1 - _SPREAD + _SPREAD * chance)
