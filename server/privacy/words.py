"""What is signed about erasures: the word that somebody is to be erased, and the receipt.

The word is an object in S3, which no backup of the database takes back. It is signed, since who
could write one could have anybody erased.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from joserfc.jwk import ECKey

from server import ids, signed_words
from server.caller import Caller
from server.errors import InvalidArgument
from server.privacy.erasures import Erasure, ErasureState
from server.signed_words import WordForged

WORD: Final = "kimberly-erasure"
RECEIPT: Final = "kimberly-erasure-receipt"
"""In the signed header: neither passes for the other, nor for a checkpoint of the audit log."""
DIRECTORY: Final = "erasures/"
"""What the keys of words in S3 begin with."""


def object_key(erasure: Erasure) -> str:
    """Return where in S3 the word of an erasure is."""
    return f"{DIRECTORY}{erasure.caller.user_id.hex}.jws"


def sign_word(erasure: Erasure, key: ECKey) -> str:
    """Return the word that a user is to be erased, signed with a private key."""
    receipt = {"receiptId": ids.show(ids.RECEIPT, erasure.receipt_id)}
    return signed_words.sign(WORD, _whom(erasure) | receipt, key)


def read_word(word: bytes | None, keys: Mapping[str, ECKey]) -> Erasure:
    """Return the erasure that a word is of, as it was when it had just been asked for.

    Raises:
        WordForged: None of the keys signed it, or it is something else.
    """
    claims = signed_words.read(WORD, word, keys)
    try:
        return _erasure(claims)
    except (LookupError, TypeError, ValueError, InvalidArgument) as error:
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
    return signed_words.sign(RECEIPT, claims, key)


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
