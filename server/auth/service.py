"""Serves kimberly.auth.v1.AuthService."""

import unicodedata
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import grpc
from google.protobuf import duration_pb2
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids
from server.auth import emails, passwords, refresh_tokens
from server.auth.access_tokens import Mint
from server.auth.keyring import Keyring
from server.auth.passwords import Passwords
from server.auth.refresh_tokens import Session
from server.auth.store import Account, AccountStore, NewUser
from server.caller import Caller
from server.clock import Clock, utc_now
from server.errors import (
    CredentialsInvalid,
    InvalidArgument,
    RefreshTokenInvalid,
    StoreUnavailable,
)

Context = grpc.aio.ServicerContext[Any, Any]

_LONGEST_NAME: Final = 100


class AuthService(rpc.AuthServiceServicer):
    """Signs people up and in, and issues the tokens that every other service verifies."""

    def __init__(
        self,
        store: AccountStore,
        keyring: Keyring,
        hashing: Passwords,
        mint: Mint,
        *,
        session_lifetime: timedelta,
        clock: Clock = utc_now,
    ) -> None:
        self._store = store
        self._keyring = keyring
        self._hashing = hashing
        self._mint = mint
        self._session_lifetime = session_lifetime
        self._clock = clock

    async def SignUp(self, request: pb.SignUpRequest, context: Context) -> pb.SignUpResponse:
        """Create a user in a tenant of their own, and start a session."""
        email = emails.normalize(request.email, "email")
        display_name = _display_name(request.display_name, email)
        passwords.check_new(request.password, "password")
        caller = Caller(tenant_id=ids.new_id(), user_id=ids.new_id())
        password_hash = await self._hashing.hash(request.password)
        user = NewUser(caller, email, display_name, password_hash)
        session, token = self._new_session(caller), refresh_tokens.new_token()
        tokens = await self._tokens(session, token)
        await self._store.sign_up(user, session, refresh_tokens.hash_of(token), self._clock())
        return pb.SignUpResponse(
            user_id=ids.show(ids.USER, caller.user_id),
            tenant_id=ids.show(ids.TENANT, caller.tenant_id),
            tokens=tokens,
        )

    async def LogIn(self, request: pb.LogInRequest, context: Context) -> pb.LogInResponse:
        """Start a session. An unknown email costs and says what a wrong password does."""
        account = await self._store.find(emails.normalize(request.email, "email"))
        stored = account.password_hash if account else None
        matches = await self._hashing.match(stored, request.password)
        if account is None or not matches:
            raise CredentialsInvalid
        await self._renew_hash(account, request.password)
        session, token = self._new_session(account.caller), refresh_tokens.new_token()
        tokens = await self._tokens(session, token)
        await self._store.start_session(session, refresh_tokens.hash_of(token), self._clock())
        return pb.LogInResponse(tokens=tokens)

    async def RefreshToken(
        self, request: pb.RefreshTokenRequest, context: Context
    ) -> pb.RefreshTokenResponse:
        """Exchange a refresh token for new tokens."""
        # Before the token is used up: with no key to sign with, nothing must be lost.
        await self._keyring.signer()
        token = refresh_tokens.new_token()
        session = await self._store.use_token(
            refresh_tokens.hash_of(request.refresh_token),
            refresh_tokens.hash_of(token),
            self._clock(),
        )
        if session is None:
            raise RefreshTokenInvalid
        return pb.RefreshTokenResponse(tokens=await self._tokens(session, token))

    async def LogOut(self, request: pb.LogOutRequest, context: Context) -> pb.LogOutResponse:
        """End the session of a refresh token, if it has one."""
        token_hash = refresh_tokens.hash_of(request.refresh_token)
        await self._store.end_session(token_hash, self._clock())
        return pb.LogOutResponse()

    async def GetJwks(self, request: pb.GetJwksRequest, context: Context) -> pb.GetJwksResponse:
        """Return the published keys."""
        if not self._keyring.keys:
            await self._keyring.refresh()
        if not self._keyring.keys:
            raise StoreUnavailable("the store of the signing keys")
        return pb.GetJwksResponse(keys=_to_proto(self._keyring.keys))

    def _new_session(self, caller: Caller) -> Session:
        return Session(ids.new_id(), caller, self._clock() + self._session_lifetime)

    async def _tokens(self, session: Session, refresh_token: str) -> pb.Tokens:
        key, now = await self._keyring.signer(), self._clock()
        expires_at = self._mint.expiry(now, session.expires_at)
        return pb.Tokens(
            access_token=self._mint.make(session.caller, key, now, expires_at),
            access_token_lifetime=_seconds(expires_at - now),
            refresh_token=refresh_token,
            refresh_token_lifetime=_seconds(session.expires_at - now),
        )

    async def _renew_hash(self, account: Account, password: str) -> None:
        if self._hashing.is_outdated(account.password_hash):
            renewed = await self._hashing.hash(password)
            await self._store.replace_hash(account.caller.user_id, account.password_hash, renewed)


def _display_name(requested: str, email: str) -> str:
    name = requested.strip() or email.partition("@")[0]
    if len(name) > _LONGEST_NAME:
        raise InvalidArgument("display_name", f"must have at most {_LONGEST_NAME} characters")
    if any(unicodedata.category(character) == "Cc" for character in name):
        raise InvalidArgument("display_name", "must have no control characters")
    return name


def _to_proto(keys: Mapping[str, ECKey]) -> list[pb.JsonWebKey]:
    return [
        pb.JsonWebKey(**{name: str(value) for name, value in key.as_dict().items()})
        for key in keys.values()
    ]


def _seconds(duration: timedelta) -> duration_pb2.Duration:
    return duration_pb2.Duration(seconds=int(duration.total_seconds()))
