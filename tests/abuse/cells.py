"""Which methods let a caller in: the cells of one column of the matrix."""

from __future__ import annotations

import grpc

from server.access import METHODS, Access
from tests.refusals import Refusal, refusal_of
from tests.transports import Metadata

NO_TOKEN = (Access.ANYONE, Access.WORKLOAD)
DENIED = {
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    # Nobody serves it there.
    grpc.StatusCode.UNIMPLEMENTED,
}
_MALFORMED = b"\xff\xff\xff"


def rows(*kinds: Access) -> set[str]:
    """Return the methods that ask for one of these."""
    return {method for method, access in METHODS.items() if access in kinds}


async def answer_to(
    channel: grpc.aio.Channel, method: str, data: bytes, metadata: Metadata = ()
) -> Refusal:
    """Return how a call with one message is refused. On the wire all kinds of call begin alike."""
    call = channel.unary_unary(method, bytes, bytes)
    return await refusal_of(call(data, metadata=metadata, timeout=30))


async def open_methods(channel: grpc.aio.Channel, metadata: Metadata = ()) -> set[str]:
    """Return the methods that let the caller in.

    Bytes that are no message tell: who is let in hears that they are malformed, and nothing is
    changed; all others hear that they may not.
    """
    answers = {method: await answer_to(channel, method, _MALFORMED, metadata) for method in METHODS}
    inside = {name for name, answer in answers.items() if answer.reason == "MESSAGE_MALFORMED"}
    for method in METHODS.keys() - inside:
        assert answers[method].code in DENIED, (method, answers[method])
        assert answers[method].reason in {
            "",
            "METHOD_NOT_ALLOWED",
            "SCOPE_MISSING",
            "TOKEN_INVALID",
        }
    return inside
