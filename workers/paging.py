"""Asking for page after page."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, TypeVar

PAGE_SECONDS: Final = 15.0
"""How long a page may take."""


class Request(Protocol):
    """Asks for a page."""

    page_token: str


class Page(Protocol):
    """Says how to ask for the next one."""

    next_page_token: str
    """Empty: there is none."""


AnyPage = TypeVar("AnyPage", bound=Page)


async def pages(
    method: Callable[..., Awaitable[AnyPage]],
    request: Request,
    metadata: tuple[tuple[str, str], ...],
) -> AsyncIterator[AnyPage]:
    """Yield the pages that a method answers with, from the one on that `request` asks for.

    Args:
        method: Of a stub.
        request: Is sent again and again, each time with the token of the page before.
        metadata: Goes with every call.
    """
    while True:
        page = await method(request, timeout=PAGE_SECONDS, metadata=metadata)
        yield page
        request.page_token = page.next_page_token
        if not request.page_token:
            return
