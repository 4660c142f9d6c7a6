"""Where a memory is: an id does not tell its tier."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.errors import NotFound

T = TypeVar("T")


async def wherever_it_is(*places: Callable[[], Awaitable[T]]) -> T:
    """Act on a memory in the first of some places that has it.

    Raises:
        NotFound: None has it, or it is not the caller's.
    """
    for place in places:
        try:
            return await place()
        except NotFound:
            continue
    raise NotFound("memory")


async def in_either_store(
    durable: Callable[[], Awaitable[T]], short_term: Callable[[], Awaitable[T]]
) -> T:
    """Act on a memory in the store that has it.

    The durable one is asked once more: the memory may have been promoted between the two looks.

    Raises:
        NotFound: Neither has it, or it is not the caller's.
    """
    return await wherever_it_is(durable, short_term, durable)
