"""Key management: wraps small secrets, so that a copy of the database reveals none of them."""

import base64
import binascii
import hashlib
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from server.settings import PREFIX

_VARIABLE: Final = f"{PREFIX}MASTER_KEY_FILE"
_KEY_BYTES: Final = 32
_KEY_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12


class MasterKeyUnusable(Exception):
    """The file that KIMBERLY_MASTER_KEY_FILE names holds no key."""


class UnwrapFailed(Exception):
    """The secret was wrapped by another key, for another purpose, or was damaged since."""


class LocalKms:
    """Wraps with AES-256-GCM under one key from a local file.

    What `wrap` returns is opaque and names the key that made it. Both methods are coroutines
    because other key managers are asked over the network.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise MasterKeyUnusable(f"a master key has {_KEY_BYTES} bytes, not {len(key)}")
        self._cipher = AESGCM(key)
        self._key_id = hashlib.sha256(b"kimberly master key id" + key).digest()[:_KEY_ID_BYTES]

    @classmethod
    def from_file(cls, path: Path) -> "LocalKms":
        """Read the key: 32 bytes in base64.

        Raises:
            MasterKeyUnusable: There is no such file, or it holds something else.
        """
        try:
            return cls(base64.b64decode(path.read_bytes().strip(), validate=True))
        except OSError as error:
            raise MasterKeyUnusable(f"{_VARIABLE}: {path}: {error.strerror}") from error
        except (binascii.Error, MasterKeyUnusable) as error:
            raise MasterKeyUnusable(
                f"{_VARIABLE}: {path} must hold {_KEY_BYTES} bytes in base64; "
                f"make one with: head -c {_KEY_BYTES} /dev/urandom | base64"
            ) from error

    async def wrap(self, secret: bytes, *, context: bytes) -> bytes:
        """Encrypt a secret. `context` says what it is for and is needed to unwrap it."""
        nonce = os.urandom(_NONCE_BYTES)
        return self._key_id + nonce + self._cipher.encrypt(nonce, secret, context)

    async def unwrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the secret.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
        """
        key_id, sealed = wrapped[:_KEY_ID_BYTES], wrapped[_KEY_ID_BYTES:]
        if key_id != self._key_id:
            raise UnwrapFailed(f"wrapped by another master key than the one of {_VARIABLE}")
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise UnwrapFailed("damaged, or wrapped for another purpose") from error
