"""What AuthService answers about API keys."""

from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import grpc
from google.protobuf import timestamp_pb2
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.auth.api_key_store import ApiKeyStore
from server.auth.api_keys import ApiKey, Secret, check_expiry, check_overlap, check_scopes
from server.auth.issuing import Issuer, seconds
from server.auth.messages import timestamp
from server.auth.metrics import TOKENS
from server.caller import current_caller, current_credentials
from server.clock import Clock
from server.display_names import check_display_name
from server.errors import ApiKeyInvalid, InvalidArgument
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ApiKeyHandlers:
    """A part of AuthService."""

    _api_keys: ApiKeyStore
    _issuer: Issuer
    _clock: Clock

    async def CreateApiKey(
        self, request: pb.CreateApiKeyRequest, context: Context
    ) -> pb.CreateApiKeyResponse:
        check_request_id(request.request_id)
        now, secret = self._clock(), Secret.new()
        asked = _instant(request.expire_time) if request.HasField("expire_time") else None
        key = ApiKey(
            id=ids.new_id(),
            caller=current_caller(),
            name=check_display_name(request.name, "name"),
            prefix=secret.prefix,
            scopes=check_scopes(request.scopes, "scopes"),
            created_at=now,
            expires_at=check_expiry(asked, "expire_time", now),
        )
        contents = request.SerializeToString(deterministic=True)
        kept, is_new = await self._api_keys.create(
            key, secret, request.request_id, contents, current_credentials().grant_id
        )
        return pb.CreateApiKeyResponse(api_key=_key_to(kept), secret=secret.text if is_new else "")

    async def ListApiKeys(
        self, request: pb.ListApiKeysRequest, context: Context
    ) -> pb.ListApiKeysResponse:
        keys = await self._api_keys.list_keys(current_caller())
        return pb.ListApiKeysResponse(api_keys=map(_key_to, keys))

    async def RotateApiKey(
        self, request: pb.RotateApiKeyRequest, context: Context
    ) -> pb.RotateApiKeyResponse:
        key_id = ids.parse(ids.API_KEY, request.id, "id")
        overlap, secret = _overlap(request), Secret.new()
        key = await self._api_keys.rotate(current_caller(), key_id, secret, overlap, self._clock())
        return pb.RotateApiKeyResponse(api_key=_key_to(key), secret=secret.text)

    async def RevokeApiKey(
        self, request: pb.RevokeApiKeyRequest, context: Context
    ) -> pb.RevokeApiKeyResponse:
        key_id = ids.parse(ids.API_KEY, request.id, "id")
        await self._api_keys.revoke(current_caller(), key_id, self._clock())
        return pb.RevokeApiKeyResponse()

    async def ExchangeToken(
        self, request: pb.ExchangeTokenRequest, context: Context
    ) -> pb.ExchangeTokenResponse:
        opened = await self._api_keys.open(request.api_key, self._clock())
        if opened is None:
            raise ApiKeyInvalid
        credentials = opened.credentials(request.scopes, "scopes")
        access = await self._issuer.access_token(credentials, opened.expires_at)
        TOKENS.labels("api_key").inc()
        return pb.ExchangeTokenResponse(
            access_token=access.token,
            access_token_lifetime=seconds(access.lifetime),
            scopes=sorted(credentials.scopes),
        )


def _overlap(request: pb.RotateApiKeyRequest) -> timedelta:
    try:
        return check_overlap(request.overlap.ToTimedelta(), "overlap")
    except (ValueError, OverflowError) as error:
        raise InvalidArgument("overlap", "is no duration that exists") from error


def _instant(timestamp: timestamp_pb2.Timestamp) -> datetime:
    try:
        return timestamp.ToDatetime(UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument("expire_time", "is no instant that exists") from error


def _key_to(key: ApiKey) -> pb.ApiKey:
    used_at = key.last_used_at
    return pb.ApiKey(
        id=ids.show(ids.API_KEY, key.id),
        name=key.name,
        prefix=key.prefix,
        scopes=key.scopes,
        create_time=timestamp(key.created_at),
        expire_time=timestamp(key.expires_at),
        last_use_time=timestamp(used_at) if used_at else None,
    )
