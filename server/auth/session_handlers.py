"""What AuthService answers about sessions."""

from typing import Any, TypeAlias
from uuid import UUID

import grpc
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.auth import refresh_tokens
from server.auth.issuing import Issuer
from server.auth.messages import timestamp
from server.auth.metrics import TOKENS
from server.auth.session_store import LivingSession, SessionStore
from server.caller import current_caller, current_credentials
from server.clock import Clock
from server.errors import RefreshTokenInvalid

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class SessionHandlers:
    """A part of AuthService."""

    _sessions: SessionStore
    _issuer: Issuer
    _clock: Clock

    async def RefreshToken(
        self, request: pb.RefreshTokenRequest, context: Context
    ) -> pb.RefreshTokenResponse:
        return pb.RefreshTokenResponse(tokens=await self.refreshed(request.refresh_token))

    async def LogOut(self, request: pb.LogOutRequest, context: Context) -> pb.LogOutResponse:
        token_hash = refresh_tokens.hash_of(request.refresh_token)
        await self._sessions.end_by_token(token_hash, self._clock())
        return pb.LogOutResponse()

    async def LogOutEverywhere(
        self, request: pb.LogOutEverywhereRequest, context: Context
    ) -> pb.LogOutEverywhereResponse:
        ended, revoked = await self._sessions.end_everywhere(
            current_caller(), self._clock(), with_keys=request.revoke_api_keys
        )
        return pb.LogOutEverywhereResponse(ended=ended, revoked_api_keys=revoked)

    async def ListSessions(
        self, request: pb.ListSessionsRequest, context: Context
    ) -> pb.ListSessionsResponse:
        credentials = current_credentials()
        living = await self._sessions.list_living(credentials.caller, self._clock())
        return pb.ListSessionsResponse(
            sessions=(_session_to(each, credentials.grant_id) for each in living)
        )

    async def RevokeSession(
        self, request: pb.RevokeSessionRequest, context: Context
    ) -> pb.RevokeSessionResponse:
        session_id = ids.parse(ids.SESSION, request.id, "id")
        await self._sessions.revoke(current_caller(), session_id, self._clock())
        return pb.RevokeSessionResponse()

    async def refreshed(self, refresh_token: str) -> pb.Tokens:
        """Exchange a refresh token for new tokens.

        Raises:
            RefreshTokenInvalid: It opens no session any more.
            StoreUnavailable: There is no key to sign with; the token is not used up.
        """
        await self._issuer.check()
        token = refresh_tokens.new_token()
        session = await self._sessions.use_token(
            refresh_tokens.hash_of(refresh_token), refresh_tokens.hash_of(token), self._clock()
        )
        if session is None:
            raise RefreshTokenInvalid
        TOKENS.labels("refresh_token").inc()
        return await self._issuer.tokens(session, token)


def _session_to(session: LivingSession, current: UUID) -> pb.Session:
    refreshed_at = session.refreshed_at
    return pb.Session(
        id=ids.show(ids.SESSION, session.id),
        start_time=timestamp(session.started_at),
        expire_time=timestamp(session.expires_at),
        refresh_time=timestamp(refreshed_at) if refreshed_at else None,
        client_name=session.client_name,
        current=session.id == current,
        tenant_id=ids.show(ids.TENANT, session.tenant_id),
    )
