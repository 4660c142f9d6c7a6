"""When the garbage collector looks for cycles."""

import gc
from typing import Final

_COLLECTIONS: Final = (50_000, 20, 20)
"""New objects before the young are looked at, and how much rarer the old ones are."""


def collect_rarely() -> None:
    """Keep the collector from looking at everything again after every few hundred objects.

    A call or a job makes few cycles and many objects: looking for the former took a fifth of the
    time of bulk calls, and a quarter of a worker's. What is there at the start stays for good.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECTIONS)
