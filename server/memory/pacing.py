"""Work on long texts that others do not wait for.

Finding the terms of a text takes the processor 10 to 20 ms where it is as long as may be, and all
calls of a process are served by one event loop. A stream of such texts, or many that come in the
same instant, would be a second in which nobody is answered: then Envoy takes the process for dead.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final, Protocol, TypeVar

_LONG: Final = 4 * 1024
"""Characters; whatever is shorter waits for nobody."""
_AT_ONCE: Final = 16 * 1024


class _Text(Protocol):
    @property
    def content(self) -> str: ...


T = TypeVar("T", bound=_Text)


async def paced(texts: Iterable[T]) -> AsyncIterator[tuple[int, T]]:
    """Yield texts with their places; others are served after each 16 KiB of them."""
    done = 0
    for place, text in enumerate(texts):
        yield place, text
        done += len(text.content)
        if done >= _AT_ONCE:
            done = 0
            await asyncio.sleep(0)


class Turns:
    """Has one long text read with each turn of the event loop."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def next(self, text: str) -> None:
        """Wait until a text may be read: a long one after all that came before it."""
        if len(text) >= _LONG:
            async with self._lock:
                await asyncio.sleep(0)
