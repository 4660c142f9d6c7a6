"""Reading refused calls."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from kimberly.client import reason_of


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a refused call says."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    message: str


async def refusal_of(call: Awaitable[Any]) -> Refusal:
    """Await a call that must be refused, and return what it says."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read(caught.value)


def read(error: grpc.aio.AioRpcError) -> Refusal:
    """Return what the error of a refused call says."""
    fields: list[str] = []
    for key, value in cast("Any", error.trailing_metadata() or ()):
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                request = error_details_pb2.BadRequest()
                if detail.Unpack(request):
                    fields += [violation.field for violation in request.field_violations]
    return Refusal(error.code(), reason_of(error), tuple(fields), error.details() or "")
