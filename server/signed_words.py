"""Signed words in S3, where no backup of the database takes them back.

Who could write one without a signature could have anybody erased, or any consent withdrawn.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from server.tokens import ALGORITHM

LONGEST_BYTES: Final = 4096
"""More than any word has."""

Signer = Callable[[], Awaitable[ECKey]]
"""Returns the private key that signs now."""
Keys = Callable[[], Awaitable[Mapping[str, ECKey]]]
"""Returns the keys whose signatures count, by key id."""


class WordForged(Exception):
    """It is not signed by a key of this mesh, or it was not meant to be one."""


def sign(kind: str, claims: Mapping[str, Any], key: ECKey) -> str:
    """Return what is claimed, signed with a private key.

    The kind is in the signed header: nothing passes for what it was not meant to be.
    """
    header = {"alg": ALGORITHM, "kid": key.thumbprint(), "typ": kind}
    return jws.serialize_compact(header, json.dumps(claims), key, algorithms=[ALGORITHM])


def read(kind: str, word: bytes | None, keys: Mapping[str, ECKey]) -> Mapping[str, Any]:
    """Return what a word of this kind claims.

    Raises:
        WordForged: None of the keys signed it, or it is something else.
    """
    try:
        token = (word or b"").decode("ascii")
        header = jws.extract_compact(token.encode()).headers()
        key = keys[header["kid"]]
        claims = json.loads(jws.deserialize_compact(token, key, algorithms=[ALGORITHM]).payload)
    except (JoseError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise WordForged from error
    if header["typ"] != kind or not isinstance(claims, dict):
        raise WordForged
    return claims
