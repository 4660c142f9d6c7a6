"""What AuthService answers to standard clients."""

import json
from collections.abc import Mapping
from datetime import timedelta
from http import HTTPStatus
from typing import Any, Final, TypeAlias

import grpc
from google.api import httpbody_pb2
from kimberly.auth.v1 import auth_pb2 as pb

from server.access import Scope
from server.auth import oauth
from server.auth.api_key_store import ApiKeyStore
from server.auth.api_keys import Opened
from server.auth.issuing import Issuer
from server.auth.metrics import TOKENS
from server.auth.oauth import Client, OAuthError
from server.auth.session_handlers import SessionHandlers
from server.clock import Clock
from server.errors import ConsentMissing, InvalidArgument, RefreshTokenInvalid

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Answer: TypeAlias = dict[str, object]

STATUS_HEADER: Final = "x-oauth-status"
"""Told to the edge, which makes it the HTTP status: to gRPC, an error is an answer like another."""


class OAuthHandlers(SessionHandlers):
    """A part of AuthService."""

    _api_keys: ApiKeyStore
    _issuer: Issuer
    _clock: Clock

    async def IssueToken(
        self, request: pb.IssueTokenRequest, context: Context
    ) -> pb.IssueTokenResponse:
        metadata = dict(context.invocation_metadata() or ())
        try:
            form = oauth.read_form(request.form.content_type, request.form.data)
            client = oauth.client_of(str(metadata.get("authorization", "")), form)
            answer = await self._issue(form, client)
        except OAuthError as error:
            answer = {"error": error.error, "error_description": error.description}
            await context.send_initial_metadata(_headers_of(error))
        body = httpbody_pb2.HttpBody(
            content_type="application/json", data=json.dumps(answer).encode()
        )
        return pb.IssueTokenResponse(json=body)

    async def GetOpenIdConfiguration(
        self, request: pb.GetOpenIdConfigurationRequest, context: Context
    ) -> pb.GetOpenIdConfigurationResponse:
        return pb.GetOpenIdConfigurationResponse(
            issuer=self._issuer.name,
            token_endpoint=f"{self._issuer.name}/v1/oauth/token",
            jwks_uri=f"{self._issuer.name}/.well-known/jwks.json",
            grant_types_supported=oauth.GRANTS,
            # RFC 8414 has it say something, and clients hold it to that.
            response_types_supported=["none"],
            subject_types_supported=["public"],
            id_token_signing_alg_values_supported=["ES256"],
            token_endpoint_auth_methods_supported=[
                "client_secret_basic",
                "client_secret_post",
                "none",
            ],
            scopes_supported=[scope.value for scope in Scope],
        )

    async def _issue(self, form: Mapping[str, str], client: Client) -> Answer:
        match oauth.need(form, "grant_type"):
            case oauth.REFRESH_TOKEN:
                return await self._by_refresh_token(oauth.need(form, "refresh_token"))
            case oauth.CLIENT_CREDENTIALS:
                opened = await self._open(client.secret)
                if opened is None or client.id != opened.client_id:
                    raise OAuthError("invalid_client", "the API key or its id is not valid", 401)
                return await self._by_api_key(opened, form.get("scope", ""))
            case oauth.TOKEN_EXCHANGE:
                if oauth.need(form, "subject_token_type") != oauth.API_KEY_TYPE:
                    raise OAuthError("invalid_request", f"subject_token_type: {oauth.API_KEY_TYPE}")
                opened = await self._open(oauth.need(form, "subject_token"))
                if opened is None:
                    raise OAuthError("invalid_request", "the API key is not valid")
                issued = await self._by_api_key(opened, form.get("scope", ""))
                return issued | {"issued_token_type": oauth.ACCESS_TOKEN_TYPE}
            case _:
                raise OAuthError("unsupported_grant_type", f"one of {', '.join(oauth.GRANTS)}")

    async def _by_refresh_token(self, refresh_token: str) -> Answer:
        try:
            tokens = await self.refreshed(refresh_token)
        except RefreshTokenInvalid as error:
            raise OAuthError("invalid_grant", error.message) from error
        lifetime = tokens.access_token_lifetime.ToTimedelta()
        answer = _answer(tokens.access_token, lifetime, Scope.USER)
        return answer | {"refresh_token": tokens.refresh_token}

    async def _by_api_key(self, opened: Opened, scope: str) -> Answer:
        try:
            credentials = opened.credentials(scope.split(), "scope")
        except InvalidArgument as error:
            raise OAuthError("invalid_scope", error.message) from error
        access = await self._issuer.access_token(credentials, opened.expires_at)
        TOKENS.labels("api_key").inc()
        return _answer(access.token, access.lifetime, " ".join(sorted(credentials.scopes)))

    async def _open(self, secret: str) -> Opened | None:
        try:
            return await self._api_keys.open(secret, self._clock())
        except ConsentMissing as error:
            raise OAuthError("unauthorized_client", error.message) from error


def _answer(token: str, lifetime: timedelta, scope: str) -> Answer:
    expires_in = int(lifetime.total_seconds())
    return {
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": expires_in,
        "scope": scope,
    }


def _headers_of(error: OAuthError) -> tuple[tuple[str, str], ...]:
    status = (STATUS_HEADER, str(error.status))
    asked = ("www-authenticate", 'Basic realm="kimberly"')
    return (status, asked) if error.status == HTTPStatus.UNAUTHORIZED else (status,)
