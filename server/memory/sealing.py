"""Sealing: sensitive content as AES-256-GCM, and the hash that recognises it.

Sealed content is a version byte, a random nonce of 12 bytes, and ciphertext with its tag of 16.
It is bound to the tenant, the user and the memory that it is of. Keys for sealing and for hashing
are derived from the user's data key by HKDF-SHA-256, each for its one use.

Random nonces allow 2^32 messages a key (NIST SP 800-38D, 8.3): a user who wrote one a second would
get there in 136 years.
"""

import os
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hmac import HMAC
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from server.caller import Caller
from server.errors import ContentUnreadable

_VERSION: Final = b"\x01"
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32
_FOR_SEALING: Final = b"kimberly memory content 1"
_FOR_HASHING: Final = b"kimberly memory content hash 1"


def binding(caller: Caller, memory_id: UUID) -> bytes:
    """Return what the content of a memory is bound to: 48 bytes."""
    return caller.tenant_id.bytes + caller.user_id.bytes + memory_id.bytes


def seal(key: bytes, content: str, bound_to: bytes) -> bytes:
    """Encrypt content, differently each time: 29 bytes longer than its UTF-8."""
    nonce = os.urandom(_NONCE_BYTES)
    cipher = AESGCM(_derived(key, _FOR_SEALING))
    return _VERSION + nonce + cipher.encrypt(nonce, content.encode(), _VERSION + bound_to)


def unseal(key: bytes, sealed: bytes, bound_to: bytes) -> str:
    """Return the content.

    Raises:
        ContentUnreadable: Another key, another memory, damage, or a version of the future.
    """
    version, nonce, ciphertext = (
        sealed[:1],
        sealed[1 : 1 + _NONCE_BYTES],
        sealed[1 + _NONCE_BYTES :],
    )
    if version != _VERSION:
        raise ContentUnreadable
    cipher = AESGCM(_derived(key, _FOR_SEALING))
    try:
        return cipher.decrypt(nonce, ciphertext, version + bound_to).decode()
    except (InvalidTag, ValueError) as error:
        raise ContentUnreadable from error


def keyed_hash(key: bytes, content: str) -> bytes:
    """Return the HMAC-SHA-256 that identical content of one user is recognised by.

    Without the key nobody can try out what a short secret may have been, as with a plain hash.
    """
    digest = HMAC(_derived(key, _FOR_HASHING), hashes.SHA256())
    digest.update(content.encode())
    return digest.finalize()


def _derived(key: bytes, use: bytes) -> bytes:
    return HKDF(hashes.SHA256(), _KEY_BYTES, salt=None, info=use).derive(key)
