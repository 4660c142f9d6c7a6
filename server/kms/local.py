"""A key manager that is a file."""

import base64
import binascii
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from server.kms import KmsUnusable, UnwrapFailed
from server.kms.private_files import read_private

log = structlog.get_logger()

_VARIABLE: Final = "KIMBERLY_MASTER_KEY_FILE"
_KEY_BYTES: Final = 32
_KEY_ID_BYTES: Final = 8
_NONCE_BYTES: Final = 12


class LocalKms:
    """Wraps with AES-256-GCM under the master keys of a local file.

    The file holds one key a line, 32 bytes in base64, the oldest first; empty lines and lines
    that begin with # are passed over. The last key wraps, all of them unwrap. Its mode is 0600.

    To rotate, add a line on every machine, in one rename; a key that is not known yet is looked
    for in the file, and the new one wraps from the next `newest_version` or start on. When nothing
    is wrapped by the first line any more, remove it.
    """

    def __init__(self, path: Path) -> None:
        """Read the keys.

        Raises:
            KmsUnusable: There is no such file, others may read it, or it holds something else.
        """
        self._path = path
        self._ciphers = _read(path)

    async def wrap(self, secret: bytes, *, context: bytes) -> bytes:
        """Encrypt a secret; see `server.kms.Kms`."""
        key_id = self._newest()
        nonce = os.urandom(_NONCE_BYTES)
        return key_id + nonce + self._ciphers[key_id].encrypt(nonce, secret, context)

    async def unwrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the secret.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
        """
        key_id, sealed = wrapped[:_KEY_ID_BYTES], wrapped[_KEY_ID_BYTES:]
        if key_id not in self._ciphers:
            self._read_again()
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise UnwrapFailed(f"wrapped by another master key than those of {_VARIABLE}")
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError) as error:
            raise UnwrapFailed("damaged, or wrapped for another purpose") from error

    async def rewrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the same secret, wrapped by the newest key.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
        """
        return await self.wrap(await self.unwrap(wrapped, context=context), context=context)

    async def newest_version(self) -> str:
        """Return the name of the key that wraps from now on: the last one of the file."""
        self._read_again()
        return self.version_of(self._newest())

    def version_of(self, wrapped: bytes) -> str:
        """Return the name of the key that wrapped a secret."""
        return f"local:{wrapped[:_KEY_ID_BYTES].hex()}"

    def _newest(self) -> bytes:
        return list(self._ciphers)[-1]

    def _read_again(self) -> None:
        """Take over what was added to the file. Keys at hand outlive a file that is damaged."""
        try:
            self._ciphers = _read(self._path)
        except KmsUnusable:
            log.exception("master keys not read")


def _read(path: Path) -> Mapping[bytes, AESGCM]:
    """Return the keys by their ids, oldest first."""
    lines = [line.strip() for line in read_private(path, _VARIABLE).splitlines()]
    try:
        keys = [
            base64.b64decode(line, validate=True)
            for line in lines
            if line and not line.startswith(b"#")
        ]
    except binascii.Error:
        keys = []
    if not keys or {len(key) for key in keys} != {_KEY_BYTES} or len(set(keys)) != len(keys):
        raise KmsUnusable(
            f"{_VARIABLE}: {path} must hold {_KEY_BYTES} bytes in base64 a line, none twice; "
            f"make a line with: head -c {_KEY_BYTES} /dev/urandom | base64"
        )
    return {_id_of(key): AESGCM(key) for key in keys}


def _id_of(key: bytes) -> bytes:
    return hashlib.sha256(b"kimberly master key id" + key).digest()[:_KEY_ID_BYTES]
