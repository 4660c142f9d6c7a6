"""What MaintenanceService answers about the short term."""

from typing import Any, TypeAlias

import grpc
from kimberly.maintenance.v1 import maintenance_pb2 as pb

from server import paging
from server.errors import PageTokenInvalid
from server.memory.promotion_rounds import PromotionRounds

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_LIST = "short-term memories to promote"


class PromotionHandlers:
    """A part of MaintenanceService."""

    _promotion: PromotionRounds

    async def PromoteShortTerm(
        self, request: pb.PromoteShortTermRequest, context: Context
    ) -> pb.PromoteShortTermResponse:
        size = paging.page_size(request.page_size)
        page = await self._promotion.run(_cursor_from(request.page_token), size)
        token = paging.seal(str(page.cursor).encode(), _LIST) if page.cursor else ""
        return pb.PromoteShortTermResponse(
            promoted=sum(page.promoted.values()),
            users=page.users,
            withdrawn=page.withdrawn,
            next_page_token=token,
        )


def _cursor_from(token: str) -> int:
    """Return where the look through the short-term store goes on.

    Raises:
        PageTokenInvalid: The token is damaged.
    """
    if not token:
        return 0
    place = paging.unseal(token, _LIST)
    if place is None:
        raise PageTokenInvalid
    return int(place)
