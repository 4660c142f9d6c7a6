"""Passwords: what is allowed, and hashes that are dear to guess."""

import asyncio
import unicodedata
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar

import argon2
from argon2.exceptions import VerifyMismatchError

from server.auth.breached import Breached
from server.errors import InvalidArgument

_T = TypeVar("_T")

_SHORTEST: Final = 12
_LONGEST: Final = 256
_TRIMMINGS: Final = "0123456789!?.-_# "

OWASP: Final = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
"""Argon2id with 19 MiB and two passes: the OWASP cheat sheet's recommendation of 2025."""


class Passwords:
    """Hashes and verifies, a few at a time, in threads of its own.

    Each hash takes tens of milliseconds and of mebibytes. The number of threads bounds both, and
    holds even when callers hang up: a thread that has started cannot be called back.
    """

    def __init__(
        self,
        *,
        concurrency: int,
        hasher: argon2.PasswordHasher = OWASP,
        breached: Sequence[Breached] = (),
    ) -> None:
        self._hasher = hasher
        self._breached = breached
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="password")
        self._nobodys = hasher.hash("nobody's password")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    async def check_new(self, password: str, field: str, *, names: Sequence[str]) -> None:
        """Refuse a password that is short, too long to be typed, or that guessers try early.

        There is no rule about kinds of characters: NIST SP 800-63B advises against them.

        Args:
            password: The password.
            field: Where it came from.
            names: What the user is called: a password that says nothing else is refused.

        Raises:
            InvalidArgument: It has fewer than 12 or more than 256 characters, or is easily guessed.
        """
        if not _SHORTEST <= len(password) <= _LONGEST:
            raise InvalidArgument(field, f"must have {_SHORTEST} to {_LONGEST} characters")
        said = password.casefold().strip(_TRIMMINGS)
        if said in {"", *(name.casefold() for name in names)}:
            raise InvalidArgument(field, "must not be made of the name or email of its user")
        if await self._run(self._is_breached, password):
            raise InvalidArgument(field, "is known to those who guess passwords; choose another")

    async def hash(self, password: str) -> str:
        """Return a hash that holds its salt and parameters."""
        return await self._run(self._hasher.hash, _canonical(password))

    async def match(self, stored: str | None, password: str) -> bool:
        """Tell whether the password made the hash; None matches nothing and takes as long."""
        if len(password) > _LONGEST:
            return False
        matches = await self._run(self._verify, stored or self._nobodys, _canonical(password))
        return matches and stored is not None

    def is_outdated(self, stored: str) -> bool:
        """Tell whether the hash was made with other parameters than those of today."""
        return self._hasher.check_needs_rehash(stored)

    def _verify(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except VerifyMismatchError:
            return False

    def _is_breached(self, password: str) -> bool:
        return any(source.holds(password) for source in self._breached)

    async def _run(self, function: Callable[..., _T], *arguments: str) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)


def _canonical(password: str) -> str:
    """Spell a password the same way whatever keyboard it was typed on (NIST SP 800-63B)."""
    return unicodedata.normalize("NFKC", password)
