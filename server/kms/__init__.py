"""Key management: wraps small secrets, so that a copy of the database reveals none of them."""

from typing import Protocol


class KmsUnusable(Exception):
    """The key manager is set up in a way that cannot work; the message names the setting."""


class UnwrapFailed(Exception):
    """The secret was wrapped by another key, for another purpose, or was damaged since."""


class Kms(Protocol):
    """Keeps master keys of several versions: the newest wraps, all that are left unwrap.

    A secret is bound to its `context`, which says what it is for and is needed to unwrap it. It
    is no secret itself and must not be empty. What `wrap` returns is opaque and names the version
    that made it. To destroy a version is to destroy whatever is still wrapped by it, in copies of
    the database too.
    """

    async def wrap(self, secret: bytes, *, context: bytes) -> bytes:
        """Encrypt a secret.

        Raises:
            StoreUnavailable: The key manager does not answer.
        """

    async def unwrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the secret.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
            StoreUnavailable: The key manager does not answer.
        """

    async def rewrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the same secret, wrapped by the newest version.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
            StoreUnavailable: The key manager does not answer.
        """

    async def newest_version(self) -> str:
        """Return the name of the version that wraps from now on.

        Raises:
            StoreUnavailable: The key manager does not answer.
        """

    def version_of(self, wrapped: bytes) -> str:
        """Return the name of the version that wrapped a secret."""
