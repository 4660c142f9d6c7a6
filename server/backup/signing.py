"""Who made a backup: its manifest is signed, by a key that opens no backup and writes to none.

The manifest has a digest of every part. Without a signature, whoever may write to the bucket could
put another dump there, and digests that fit.
"""

import base64
from collections.abc import Sequence
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from server.backup.sealing import KeyRefused

_MEANT_AS: Final = b"kimberly-backup-manifest\n"
"""Before what is signed: nothing else that the key may ever sign passes for a manifest."""


class ManifestForged(Exception):
    """It is not what somebody who makes backups has signed."""


class Unsigned(ManifestForged):
    """It has no signature: removed, or of a release that made none."""


class Signer:
    """Signs manifests (Ed25519, RFC 8032)."""

    def __init__(self, key: str) -> None:
        """Read a private key: 32 bytes in base64.

        Raises:
            KeyRefused: It is none.
        """
        self._key = Ed25519PrivateKey.from_private_bytes(_bytes(key, "the key that signs backups"))

    @property
    def public(self) -> str:
        """By what the signatures are verified: 32 bytes in base64."""
        return base64.b64encode(self._key.public_key().public_bytes_raw()).decode()

    def sign(self, manifest: bytes) -> bytes:
        """Return the signature of an encoded manifest."""
        return self._key.sign(_MEANT_AS + manifest)


class Signers:
    """Those whose signatures count."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Read public keys, each 32 bytes in base64.

        Raises:
            KeyRefused: One is none, or there is none.
        """
        if not keys:
            raise KeyRefused("nobody is named whose signature of a backup counts")
        self._keys = [
            Ed25519PublicKey.from_public_bytes(_bytes(key, "a signer of backups")) for key in keys
        ]

    def check(self, backup: str, manifest: bytes, signature: bytes | None) -> None:
        """Return if one of them signed an encoded manifest.

        Raises:
            Unsigned: Nobody did.
            ManifestForged: Somebody else did, or it has been changed since.
        """
        if signature is None:
            raise Unsigned(
                f"the manifest of {backup} has no signature: if it is older than signatures, "
                "say --unsigned"
            )
        if not any(_has_signed(key, manifest, signature) for key in self._keys):
            raise ManifestForged(
                f"the manifest of {backup} is not what any of KIMBERLY_BACKUP_SIGNERS signed: "
                "it was changed, or made by somebody else; do not restore it"
            )


def _has_signed(key: Ed25519PublicKey, manifest: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, _MEANT_AS + manifest)
    except InvalidSignature:
        return False
    return True


def _bytes(key: str, what: str) -> bytes:
    try:
        raw = base64.b64decode(key, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise KeyRefused(f"{what} is not 32 bytes in base64")
    return raw
