"""Access tokens: which ones to believe. Every process verifies for itself what its sidecar did."""

import asyncio
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, NoReturn, Protocol
from uuid import UUID

import grpc
import structlog
from joserfc import jws, jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from kimberly.auth.v1 import auth_pb2, auth_pb2_grpc

from server import ids
from server.access import Scope
from server.caller import ActingAgent, Caller, Credentials
from server.clock import Clock, utc_now
from server.errors import InvalidArgument, StoreUnavailable, Unauthenticated

log = structlog.get_logger()

ALGORITHM: Final = "ES256"
TYP: Final = "at+jwt"
"""RFC 9068: no other kind of token that the key may ever sign passes for an access token."""
LEEWAY_SECONDS: Final = 30
LONGEST_LIFETIME_SECONDS: Final = 900

_HEADER: Final = frozenset({"alg", "kid", "typ"})
_MOST_REMEMBERED: Final = 10_000
_REFETCH_SECONDS: Final = 1.0
_FETCH_SECONDS: Final = 2.0

PublicKeys = Mapping[str, ECKey]
"""Public keys by kid."""


class KeySource(Protocol):
    """Knows the keys that sign access tokens."""

    @property
    def keys(self) -> PublicKeys:
        """The keys as last seen. Another object whenever they changed, the same until then."""

    async def refresh(self) -> None:
        """Look for other keys. Where they come from being away is no error: the old ones stay."""


@dataclass(frozen=True, slots=True)
class _Verified:
    credentials: Credentials
    refused_from: datetime


class TokenVerifier:
    """Says whom an access token names, or that nobody need believe it.

    A token that was verified is remembered until it expires or the keys change: checking a
    signature takes longer than most calls. Whether its session or key has ended is asked every
    time.
    """

    def __init__(
        self,
        source: KeySource,
        *,
        issuer: str,
        audience: str,
        ended: Container[UUID],
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._ended = ended
        self._clock = clock
        self._monotonic = monotonic
        self._claims = jwt.JWTClaimsRegistry(
            now=lambda: int(clock().timestamp()),
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            sub={"essential": True},
            tid={"essential": True},
            sid={"essential": True},
            scope={"essential": True},
            role={"essential": True},
            iat={"essential": True},
            nbf={"essential": True},
            exp={"essential": True},
        )
        self._keys = source.keys
        self._verified: dict[str, _Verified] = {}
        self._refetching = asyncio.Lock()
        self._refetched_at = -_REFETCH_SECONDS

    async def verify(self, token: str) -> Credentials:
        """Return what the token says.

        Raises:
            Unauthenticated: The token is not to be believed; the text says not why.
            StoreUnavailable: No key is known yet, and auth does not answer.
        """
        if self._keys is not self._source.keys:
            self._keys = self._source.keys
            self._verified.clear()
        verified = self._verified.get(token) or await self._examine(token)
        if self._clock() >= verified.refused_from:
            del self._verified[token]
            _refuse()
        if verified.credentials.grant_id in self._ended:
            _refuse()
        return verified.credentials

    async def _examine(self, token: str) -> _Verified:
        key = await self._key(_key_id(token))
        verified = self._believe(token, key)
        if len(self._verified) >= _MOST_REMEMBERED:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = verified
        return verified

    def _believe(self, token: str, key: ECKey) -> _Verified:
        try:
            claims = jwt.decode(token, key, algorithms=[ALGORITHM]).claims
            self._claims.validate(claims)
            credentials = _credentials(claims)
        except (JoseError, InvalidArgument, ValueError, RecursionError) as error:
            _refuse(error)
        if claims["exp"] - claims["iat"] > LONGEST_LIFETIME_SECONDS:
            _refuse()
        refused_from = datetime.fromtimestamp(claims["exp"] + LEEWAY_SECONDS, UTC)
        return _Verified(credentials, refused_from)

    async def _key(self, kid: str) -> ECKey:
        if kid not in self._source.keys:
            await self._refetch()
        keys = self._source.keys
        if not keys:
            raise StoreUnavailable("auth")
        if kid not in keys:
            _refuse()
        return keys[kid]

    async def _refetch(self) -> None:
        """Look for other keys, at most once a second: strangers can make up key ids for ever."""
        async with self._refetching:
            if self._monotonic() - self._refetched_at >= _REFETCH_SECONDS:
                await self._source.refresh()
                self._refetched_at = self._monotonic()


def _credentials(claims: Mapping[str, object]) -> Credentials:
    """Read the claims of ours.

    Raises:
        InvalidArgument: One of them is not what it must be.
    """
    grant, scope, role = str(claims["sid"]), claims["scope"], claims["role"]
    kind = ids.API_KEY if grant.startswith(ids.API_KEY) else ids.SESSION
    if not isinstance(scope, str) or not isinstance(role, str):
        raise InvalidArgument("scope", "must be a string, as must be the role")
    scopes = frozenset(scope.split())
    caller = Caller(
        tenant_id=ids.parse(ids.TENANT, str(claims["tid"]), "tid"),
        user_id=ids.parse(ids.USER, str(claims["sub"]), "sub"),
        agent=_agent(claims["act"], scopes) if "act" in claims else None,
    )
    return Credentials(caller, kind, ids.parse(kind, grant, "sid"), scopes, role)


def _agent(act: object, scopes: frozenset[str]) -> ActingAgent:
    """Read who acts (RFC 8693, section 4.1). Whoever it is that we do not understand is refused.

    Raises:
        InvalidArgument: It is nothing that we say, or an agent that may do everything.
    """
    if not isinstance(act, dict) or act.keys() != {"sub"} or Scope.USER in scopes:
        raise InvalidArgument("act", "must be an agent, of some scopes")
    agent_id = ids.parse(ids.AGENT, str(act["sub"]), "act.sub")
    return ActingAgent(agent_id, sees_sensitive=Scope.MEMORY_SENSITIVE in scopes)


class RemoteKeys:
    """The keys as the auth process publishes them; the last good set while it is away."""

    def __init__(self, channel: grpc.aio.Channel, *, refresh_seconds: float) -> None:
        self._auth = auth_pb2_grpc.AuthServiceStub(channel)
        self._refresh_seconds = refresh_seconds
        self._keys: PublicKeys = {}

    @property
    def keys(self) -> PublicKeys:
        """The last good set; empty until the first answer."""
        return self._keys

    async def refresh(self) -> None:
        """Ask auth once."""
        request = auth_pb2.GetJwksRequest()
        try:
            response = await self._auth.GetJwks(request, timeout=_FETCH_SECONDS)
            keys = {key.kid: _import(key) for key in response.keys}
        except (grpc.aio.AioRpcError, JoseError, ValueError) as error:
            log.warning("signing keys not fetched", error=repr(error))
            return
        # An empty answer would lock everybody out: it can only be a mistake.
        if keys and keys != self._keys:
            self._keys = keys
            log.info("signing keys changed", kids=sorted(keys))

    async def run(self) -> NoReturn:
        """Ask auth again and again."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._refresh_seconds if self._keys else _REFETCH_SECONDS)


def _import(key: auth_pb2.JsonWebKey) -> ECKey:
    return ECKey.import_key(
        {
            "kty": key.kty,
            "crv": key.crv,
            "x": key.x,
            "y": key.y,
            "kid": key.kid,
            "use": key.use,
            "alg": key.alg,
        }
    )


def _key_id(token: str) -> str:
    """Return the kid of a token whose header is of our making.

    Other members are refused rather than ignored: `crit`, `jwk`, `jku`, `x5c` and `b64` all say
    something that we would not do.
    """
    try:
        header = jws.extract_compact(token.encode()).headers()
    except (JoseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        _refuse(error)
    if not isinstance(header, dict) or header.keys() != _HEADER:
        _refuse()
    kid = header["kid"]
    if header["typ"] != TYP or header["alg"] != ALGORITHM or not isinstance(kid, str):
        _refuse()
    return kid


def _refuse(cause: Exception | None = None) -> NoReturn:
    raise Unauthenticated("the access token is not valid; refresh it or log in again") from cause
