"""Withdrawals of consent as signed words in S3, which no backup of the database takes back.

A backup holds the consents of its hour. Whoever restores it reads these words as well, so that what
was withdrawn since stays withdrawn. What was granted again since is granted no more: of that there
is no word, and between the two mistakes this is the one that the user can take back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from joserfc.jwk import ECKey

from server import ids, signed_words
from server.caller import Caller
from server.errors import InvalidArgument
from server.signed_words import WordForged

KIND: Final = "withdrawals"
"""What the keys of words in S3 begin with: then come the tenant and the user, as of all objects."""

_WORD: Final = "kimberly-withdrawal"


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A user took a consent back."""

    caller: Caller
    purpose: str
    version: int
    """Of the decision. Greater ones of the same user and purpose came later."""
    recorded_at: datetime


def object_key(withdrawal: Withdrawal) -> str:
    """Return where in S3 the word is. In order of the keys, those of one purpose came in time."""
    caller = withdrawal.caller
    owner = f"{caller.tenant_id.hex}/{caller.user_id.hex}"
    return f"{KIND}/{owner}/{withdrawal.purpose}/{withdrawal.version:020}.jws"


def sign_word(withdrawal: Withdrawal, key: ECKey) -> str:
    """Return the word of a withdrawal, signed with a private key."""
    claims = {
        "tenantId": ids.show(ids.TENANT, withdrawal.caller.tenant_id),
        "userId": ids.show(ids.USER, withdrawal.caller.user_id),
        "purpose": withdrawal.purpose,
        "version": withdrawal.version,
        "recordTime": withdrawal.recorded_at.isoformat(),
    }
    return signed_words.sign(_WORD, claims, key)


def read_word(word: bytes | None, keys: Mapping[str, ECKey]) -> Withdrawal:
    """Return the withdrawal that a word is of.

    Raises:
        WordForged: None of the keys signed it, or it is something else.
    """
    claims = signed_words.read(_WORD, word, keys)
    try:
        return Withdrawal(
            Caller(
                ids.parse(ids.TENANT, claims["tenantId"], "tenantId"),
                ids.parse(ids.USER, claims["userId"], "userId"),
            ),
            str(claims["purpose"]),
            int(claims["version"]),
            datetime.fromisoformat(claims["recordTime"]),
        )
    except (LookupError, TypeError, ValueError, InvalidArgument) as error:
        raise WordForged from error
