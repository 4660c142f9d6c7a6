"""Access tokens, good and forged, put together by hand."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

ABSENT = object()
"""In place of a member: leave it out."""

Sign = Callable[[bytes], bytes]
Members = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Forger:
    """Somebody who knows what tokens look like; and in these tests, even has the key."""

    key: ec.EllipticCurvePrivateKey
    kid: str
    issuer: str
    user_id: str
    tenant_id: str

    def token(
        self, claims: Members | None = None, header: Members | None = None, sign: Sign | None = None
    ) -> str:
        """Return a token like those that auth issues, but for what is given."""
        now = int(time.time())
        good = {
            "iss": self.issuer,
            "aud": "kimberly",
            "sub": self.user_id,
            "tid": self.tenant_id,
            "sid": f"ses_{'0' * 32}",
            "scope": "user",
            "role": "owner",
            "jti": "0" * 32,
            "iat": now,
            "nbf": now,
            "exp": now + 600,
        }
        headers = {"alg": "ES256", "kid": self.kid, "typ": "at+jwt"}
        signed = b".".join([_part(headers, header), _part(good, claims)])
        signature = (sign or es256(self.key))(signed)
        return b".".join([signed, _encode(signature)]).decode()

    @property
    def public_pem(self) -> bytes:
        """The public key, as anybody can make it from the key set."""
        return self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )


def es256(key: ec.EllipticCurvePrivateKey) -> Sign:
    """Sign with ECDSA on P-256 (RFC 7518, section 3.4)."""

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")

    return sign


def hs256(key: bytes) -> Sign:
    """Sign with HMAC and SHA-256."""
    return lambda data: hmac.digest(key, data, hashlib.sha256)


def jwk_of(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """Return the public half of a key as a JSON Web Key."""
    numbers = key.public_key().public_numbers()
    point = {"x": numbers.x, "y": numbers.y}
    return {"kty": "EC", "crv": "P-256"} | {
        name: _encode(value.to_bytes(32, "big")).decode() for name, value in point.items()
    }


def _part(usual: Members, other: Members | None) -> bytes:
    members = {**usual, **(other or {})}
    kept = {name: value for name, value in members.items() if value is not ABSENT}
    return _encode(json.dumps(kept).encode())


def _encode(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
