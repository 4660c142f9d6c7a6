"""How fast the machine itself is while something is measured.

What a virtual machine gives differs by more than two from one minute to the next, and two of its
processors may be one: a figure can be held against another only if their paces are alike.
"""

import time
from concurrent.futures import ProcessPoolExecutor

from bench.table import Row

_TURNS = 2_000_000


def pace() -> Row:
    """Return how long a loop takes alone, and beside another one, the slower of two."""
    with ProcessPoolExecutor(2) as processes:
        list(processes.map(_loop, [1, 1]))
        alone = processes.submit(_loop, _TURNS).result()
        both = max(processes.map(_loop, [_TURNS, _TURNS]))
    return Row(
        "pace of the machine: a loop alone / beside another",
        f"{alone * 1000:.0f} / {both * 1000:.0f} ms",
    )


def _loop(turns: int) -> float:
    started = time.perf_counter()
    for _ in range(turns):
        pass
    return time.perf_counter() - started
