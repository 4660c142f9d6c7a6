"""Serves kimberly.privacy.v1.PrivacyService: parse, act, answer."""

import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server import ids
from server.caller import current_caller
from server.errors import NotFound, ProofInvalid
from server.privacy import words
from server.privacy.erasure_archive import Signer
from server.privacy.erasure_store import ErasureStore
from server.privacy.erasures import Erasure, ErasureState

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

Match = Callable[[str | None, str], Awaitable[bool]]
"""Tells whether a password made a stored hash; None matches nothing."""

_STATES: Final = {
    ErasureState.ERASING: pb.ERASURE_STATE_ERASING,
    ErasureState.ERASED: pb.ERASURE_STATE_ERASED,
    ErasureState.CONFIRMED: pb.ERASURE_STATE_CONFIRMED,
}


class PrivacyService(rpc.PrivacyServiceServicer):
    """Serves users who leave."""

    def __init__(self, erasures: ErasureStore, match: Match, signer: Signer) -> None:
        self._erasures = erasures
        self._match = match
        self._signer = signer

    async def CreateErasure(
        self, request: pb.CreateErasureRequest, context: Context
    ) -> pb.CreateErasureResponse:
        """Begin to erase the signed-in user, if it is they who ask."""
        caller = current_caller()
        # Asked again nothing is done that needs a proof; the account that gives it is gone.
        erasure = await self._erasures.find_of(caller)
        if erasure is None:
            stored = await self._erasures.password_hash(caller)
            if not await self._match(stored, request.password):
                # Asked twice at once, the other may have begun it meanwhile.
                erasure = await self._erasures.find_of(caller)
                if erasure is None:
                    raise ProofInvalid
            else:
                erasure = await self._erasures.begin(caller)
        return pb.CreateErasureResponse(erasure=await self._shown(erasure))

    async def GetErasure(
        self, request: pb.GetErasureRequest, context: Context
    ) -> pb.GetErasureResponse:
        """Return the caller's erasure."""
        erasure_id = ids.parse(ids.ERASURE, request.id, "id")
        erasure = await self._erasures.find_of(current_caller())
        if erasure is None or erasure.id != erasure_id:
            raise NotFound("erasure")
        return pb.GetErasureResponse(erasure=await self._shown(erasure))

    async def GetErasureReceipt(
        self, request: pb.GetErasureReceiptRequest, context: Context
    ) -> pb.GetErasureReceiptResponse:
        """Return an erasure to whoever knows the id of its receipt."""
        receipt_id = ids.parse(ids.RECEIPT, request.receipt_id, "receipt_id")
        erasure = await self._erasures.with_receipt(receipt_id)
        return pb.GetErasureReceiptResponse(erasure=await self._shown(erasure))

    async def _shown(self, erasure: Erasure) -> pb.Erasure:
        shown = pb.Erasure(
            id=ids.show(ids.ERASURE, erasure.id),
            tenant_id=ids.show(ids.TENANT, erasure.caller.tenant_id),
            user_id=ids.show(ids.USER, erasure.caller.user_id),
            state=_STATES[erasure.state],
            create_time=_timestamp(erasure.requested_at),
            erase_time=_timestamp(erasure.erased_at),
            confirm_time=_timestamp(erasure.confirmed_at),
            removed=(
                pb.Removed(place=place, count=count)
                for place, count in sorted(erasure.removed.items())
            ),
            rounds=erasure.rounds,
            receipt_id=ids.show(ids.RECEIPT, erasure.receipt_id),
        )
        if erasure.state is not ErasureState.ERASING:
            key = await self._signer()
            shown.receipt = words.sign_receipt(erasure, key)
            shown.receipt_key = json.dumps(key.as_dict(private=False), sort_keys=True)
        return shown


def _timestamp(instant: datetime | None) -> Timestamp | None:
    if instant is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp
