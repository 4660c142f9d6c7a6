"""Where a memory is: an id does not tell its tier."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from server.errors import NotFound

T = TypeVar("T")


async def wherever_it_is(
    durable: Callable[[], Awaitable[T]], short_term: Callable[[], Awaitable[T]]
) -> T:
    """Act on a memory where it is.

    Raises:
        NotFound: It is nowhere, or not the caller's.
    """
    try:
        return await durable()
    except NotFound:
        return await short_term()
