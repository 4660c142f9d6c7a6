"""What is signed about erasures: the word that somebody is to be erased, and the receipt.

The word is an object in S3, which no backup of the database takes back. It is signed, since who
could write one could have anybody erased.
"""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from server import ids
from server.caller import Caller
from server.errors import InvalidArgument
from server.privacy.erasures import Erasure, ErasureState
from server.tokens import ALGORITHM

WORD: Final = "kimberly-erasure"
RECEIPT: Final = "kimberly-erasure-receipt"
"""In the signed header: neither passes for the other, nor for a checkpoint of the audit log."""
LONGEST_BYTES: Final = 4096
"""More than any word has."""
DIRECTORY: Final = "erasures/"
"""What the keys of words in S3 begin with."""


class WordForged(Exception):
    """It is not signed by a key of this mesh, or it was not meant to be one."""


def object_key(erasure: Erasure) -> str:
    """Return where in S3 the word of an erasure is."""
    return f"{DIRECTORY}{erasure.caller.user_id.hex}.jws"


def sign_word(erasure: Erasure, key: ECKey) -> str:
    """Return the word that a user is to be erased, signed with a private key."""
    receipt = {"receiptId": ids.show(ids.RECEIPT, erasure.receipt_id)}
    return _sign(WORD, _whom(erasure) | receipt, key)


def read_word(token: str, keys: Mapping[str, ECKey]) -> Erasure:
    """Return the erasure that a word is of, as it was when it had just been asked for.

    Raises:
        WordForged: None of the keys signed it, or it is something else.
    """
    try:
        header = jws.extract_compact(token.encode()).headers()
        key = keys[header["kid"]]
        claims = json.loads(jws.deserialize_compact(token, key, algorithms=[ALGORITHM]).payload)
        if header["typ"] != WORD:
            raise WordForged
        return _erasure(claims)
    except (JoseError, LookupError, TypeError, ValueError, InvalidArgument) as error:
        raise WordForged from error


def sign_receipt(erasure: Erasure, key: ECKey) -> str:
    """Return the receipt of an erasure after which nothing was left."""
    claims = _whom(erasure) | {
        "state": erasure.state.value,
        "eraseTime": erasure.erased_at.isoformat() if erasure.erased_at else None,
        "confirmTime": erasure.confirmed_at.isoformat() if erasure.confirmed_at else None,
        "removed": dict(erasure.removed),
        "rounds": erasure.rounds,
        "left": 0,
    }
    return _sign(RECEIPT, claims, key)


def _whom(erasure: Erasure) -> dict[str, Any]:
    return {
        "id": ids.show(ids.ERASURE, erasure.id),
        "tenantId": ids.show(ids.TENANT, erasure.caller.tenant_id),
        "userId": ids.show(ids.USER, erasure.caller.user_id),
        "createTime": erasure.requested_at.isoformat(),
    }


def _erasure(claims: Mapping[str, Any]) -> Erasure:
    tenant_id = ids.parse(ids.TENANT, claims["tenantId"], "tenantId")
    user_id: UUID = ids.parse(ids.USER, claims["userId"], "userId")
    return Erasure(
        id=ids.parse(ids.ERASURE, claims["id"], "id"),
        caller=Caller(tenant_id, user_id),
        receipt_id=ids.parse(ids.RECEIPT, claims["receiptId"], "receiptId"),
        state=ErasureState.ERASING,
        requested_at=datetime.fromisoformat(claims["createTime"]),
        erased_at=None,
        confirmed_at=None,
        removed={},
        rounds=0,
    )


def _sign(kind: str, claims: Mapping[str, Any], key: ECKey) -> str:
    header = {"alg": ALGORITHM, "kid": key.thumbprint(), "typ": kind}
    return jws.serialize_compact(header, json.dumps(claims), key, algorithms=[ALGORITHM])
