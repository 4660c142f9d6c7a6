"""Serves kimberly.privacy.v1.PrivacyService: parse, act, answer."""

import json
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.privacy.v1 import privacy_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2_grpc as rpc

from server import ids, requests
from server.blobs import Blobs
from server.caller import current_caller
from server.clock import Clock, utc_now
from server.errors import NotFound, ProofInvalid
from server.privacy import words
from server.privacy.erasure_store import ErasureStore
from server.privacy.erasures import Erasure, ErasureState
from server.privacy.export_store import ExportStore
from server.privacy.exports import Export, ExportState, object_key
from server.signed_words import Signer

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

Match = Callable[[str | None, str], Awaitable[bool]]
"""Tells whether a password made a stored hash; None matches nothing."""

_STATES: Final = {
    ErasureState.ERASING: pb.ERASURE_STATE_ERASING,
    ErasureState.ERASED: pb.ERASURE_STATE_ERASED,
    ErasureState.CONFIRMED: pb.ERASURE_STATE_CONFIRMED,
}


_EXPORT_STATES: Final = {
    ExportState.PENDING: pb.EXPORT_STATE_PENDING,
    ExportState.READY: pb.EXPORT_STATE_READY,
    ExportState.FAILED: pb.EXPORT_STATE_FAILED,
}


class PrivacyService(rpc.PrivacyServiceServicer):
    """Serves users who take along what is theirs, and users who leave."""

    def __init__(
        self,
        erasures: ErasureStore,
        exports: ExportStore,
        match: Match,
        signer: Signer,
        blobs: Blobs,
        *,
        url_lifetime: timedelta,
        clock: Clock = utc_now,
    ) -> None:
        self._erasures = erasures
        self._exports = exports
        self._match = match
        self._signer = signer
        self._blobs = blobs
        self._url_lifetime = url_lifetime
        self._clock = clock

    async def CreateExport(
        self, request: pb.CreateExportRequest, context: Context
    ) -> pb.CreateExportResponse:
        """Ask for a copy of everything."""
        requests.check_request_id(request.request_id)
        export = await self._exports.create(current_caller(), request.request_id)
        return pb.CreateExportResponse(export=_export(export))

    async def GetExport(
        self, request: pb.GetExportRequest, context: Context
    ) -> pb.GetExportResponse:
        """Return an export, and the way to it once it is ready."""
        caller = current_caller()
        export = await self._exports.get(caller, ids.parse(ids.EXPORT, request.id, "id"))
        answer = pb.GetExportResponse(export=_export(export))
        if export.archive:
            await self._exports.note_download(caller, export.id)
            ends_at = self._clock() + self._url_lifetime
            answer.download_url = self._blobs.download_url(
                object_key(caller, export.id),
                self._url_lifetime,
                file_name=f"kimberly-{export.created_at:%Y-%m-%d}.zip",
                version_id=export.archive.version_id,
            )
            answer.download_url_expire_time.FromDatetime(ends_at)
        return answer

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
            membership_receipt_ids=(
                ids.show(ids.RECEIPT, each) for each in erasure.membership_receipt_ids
            ),
        )
        if erasure.state is not ErasureState.ERASING:
            key = await self._signer()
            shown.receipt = words.sign_receipt(erasure, key)
            shown.receipt_key = json.dumps(key.as_dict(private=False), sort_keys=True)
        return shown


def _export(export: Export) -> pb.Export:
    return pb.Export(
        id=ids.show(ids.EXPORT, export.id),
        state=_EXPORT_STATES[export.state],
        job_id=ids.show(ids.JOB, export.job_id),
        create_time=_timestamp(export.created_at),
        finish_time=_timestamp(export.finished_at),
        expire_time=_timestamp(export.expires_at),
        size_bytes=export.archive.size_bytes if export.archive else 0,
        sha256=export.archive.sha256.hex() if export.archive else "",
    )


def _timestamp(instant: datetime | None) -> Timestamp | None:
    if instant is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(instant)
    return timestamp
