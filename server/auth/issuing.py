"""What a client is given: access tokens of a grant, and the refresh tokens of a session."""

from datetime import datetime, timedelta
from typing import NamedTuple

from google.protobuf import duration_pb2
from kimberly.auth.v1 import auth_pb2 as pb

from server import ids
from server.access import Scope
from server.auth import refresh_tokens
from server.auth.access_tokens import Mint
from server.auth.keyring import Keyring
from server.auth.refresh_tokens import Session
from server.caller import Caller, Credentials
from server.clock import Clock

_EVERYTHING = frozenset({Scope.USER.value})


class NewSession(NamedTuple):
    """A session that is about to start, and its first refresh token."""

    session: Session
    refresh_token: str

    @property
    def token_hash(self) -> bytes:
        """What is stored of the refresh token."""
        return refresh_tokens.hash_of(self.refresh_token)


class AccessToken(NamedTuple):
    """An access token and how long it is good for."""

    token: str
    lifetime: timedelta


class Issuer:
    """Begins sessions, and makes the tokens of grants."""

    def __init__(
        self, keyring: Keyring, mint: Mint, session_lifetime: timedelta, clock: Clock
    ) -> None:
        self._keyring = keyring
        self._mint = mint
        self._session_lifetime = session_lifetime
        self._clock = clock

    @property
    def name(self) -> str:
        """The claim `iss` of every token."""
        return self._mint.issuer

    def begin(self, caller: Caller, role: str, client_name: str) -> NewSession:
        """Return a session that starts now."""
        expires_at = self._clock() + self._session_lifetime
        session = Session(ids.new_id(), caller, expires_at, client_name, role)
        return NewSession(session, refresh_tokens.new_token())

    async def check(self) -> None:
        """Make sure that there is a key to sign with, before anything is used up.

        Raises:
            StoreUnavailable: There is none yet.
        """
        await self._keyring.signer()

    async def access_token(self, credentials: Credentials, until: datetime) -> AccessToken:
        """Return an access token, which lives no longer than its grant."""
        key, now = await self._keyring.signer(), self._clock()
        expires_at = self._mint.expiry(now, until)
        return AccessToken(self._mint.make(credentials, key, now, expires_at), expires_at - now)

    async def tokens(self, session: Session, refresh_token: str) -> pb.Tokens:
        """Return what a signed-in client holds."""
        credentials = Credentials(
            session.caller, ids.SESSION, session.id, _EVERYTHING, session.role
        )
        access = await self.access_token(credentials, session.expires_at)
        return pb.Tokens(
            access_token=access.token,
            access_token_lifetime=seconds(access.lifetime),
            refresh_token=refresh_token,
            refresh_token_lifetime=seconds(session.expires_at - self._clock()),
        )


def seconds(duration: timedelta) -> duration_pb2.Duration:
    """Return a duration without its fraction."""
    return duration_pb2.Duration(seconds=int(duration.total_seconds()))
