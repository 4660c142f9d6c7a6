"""Sealing with age: who makes backups knows public keys only, and can read none."""

import asyncio
from collections.abc import Sequence
from typing import Final

import pyrage
from pyrage import x25519

_SECRET: Final = "AGE-SECRET-KEY-"  # noqa: S105 - what every one begins with


class KeyRefused(Exception):
    """It is no key of age, or none of the keys opens a file. Says nothing of the key itself."""


class Sealer:
    """Seals for several holders of keys: each of them can open."""

    def __init__(self, recipients: Sequence[str]) -> None:
        """Read public keys, such as age1….

        Raises:
            KeyRefused: One is not a key, or there is none.
        """
        if not recipients:
            raise KeyRefused("a backup needs the public key of somebody who can open it")
        try:
            self._recipients = [x25519.Recipient.from_str(each) for each in recipients]
        except pyrage.RecipientError as error:
            raise KeyRefused("a recipient of backups is not a public key of age") from error

    async def seal(self, plain: bytes) -> bytes:
        """Return an age file that holds these bytes."""
        return await asyncio.to_thread(pyrage.encrypt, plain, self._recipients)


class Unsealer:
    """Opens what was sealed for one of its keys."""

    def __init__(self, identities: str) -> None:
        """Read secret keys as age-keygen writes them: one a line, beside comments.

        Raises:
            KeyRefused: There is none.
        """
        lines = [line.strip() for line in identities.splitlines()]
        secrets = [line for line in lines if line.startswith(_SECRET)]
        if not secrets:
            raise KeyRefused("the file has no secret key of age")
        try:
            self._identities = [x25519.Identity.from_str(each) for each in secrets]
        except pyrage.IdentityError as error:
            raise KeyRefused("the file has a secret key that is none of age's") from error

    async def open(self, sealed: bytes) -> bytes:
        """Return what an age file holds.

        Raises:
            KeyRefused: None of the keys opens it, or it is not what was sealed.
        """
        try:
            plain: bytes = await asyncio.to_thread(pyrage.decrypt, sealed, self._identities)
        except pyrage.DecryptError as error:
            raise KeyRefused("no key opens it") from error
        return plain
