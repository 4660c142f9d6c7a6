"""Access tokens: JWTs of a few minutes (RFC 9068)."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from joserfc import jwt
from joserfc.jwk import ECKey

from server import ids
from server.caller import Credentials
from server.tokens import ALGORITHM, TYP


@dataclass(frozen=True, slots=True)
class Mint:
    """Makes access tokens of one issuer."""

    issuer: str
    audience: str
    lifetime: timedelta

    def expiry(self, now: datetime, grant_expires_at: datetime) -> datetime:
        """Return when a token made now ends: no token outlives its grant."""
        return min(now + self.lifetime, grant_expires_at)

    def make(
        self, credentials: Credentials, key: ECKey, now: datetime, expires_at: datetime
    ) -> str:
        """Return a token that says what the credentials are, signed with a private key."""
        caller = credentials.caller
        # RFC 8693, section 4.1: the subject is whose data it is, the actor who acts for them.
        acting = {"act": {"sub": caller.actor}} if caller.agent else {}
        return jwt.encode(
            {"alg": ALGORITHM, "kid": key.kid, "typ": TYP},
            {
                **acting,
                "iss": self.issuer,
                "aud": self.audience,
                "sub": ids.show(ids.USER, caller.user_id),
                "tid": ids.show(ids.TENANT, caller.tenant_id),
                "sid": ids.show(credentials.grant_kind, credentials.grant_id),
                "role": credentials.role,
                "scope": " ".join(sorted(credentials.scopes)),
                "jti": ids.new_id().hex,
                "iat": int(now.timestamp()),
                "nbf": int(now.timestamp()),
                "exp": int(expires_at.timestamp()),
            },
            key,
            algorithms=[ALGORITHM],
        )
