"""Passwords: what is allowed, and hashes that are dear to guess."""

import asyncio
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self, TypeVar
from weakref import WeakValueDictionary

import argon2
from argon2.exceptions import VerifyMismatchError

from server.auth.breached import Breached
from server.errors import InvalidArgument

_T = TypeVar("_T")

_SHORTEST: Final = 12
_LONGEST: Final = 256
_TRIMMINGS: Final = "0123456789!?.-_# "
_NOBODYS: Final = "nobody's password"

OWASP: Final = argon2.PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
"""Argon2id with 19 MiB and two passes: the OWASP cheat sheet's recommendation of 2025."""


class Passwords:
    """Hashes and verifies, a few at a time, in threads of its own.

    Each hash takes tens of milliseconds and of mebibytes. The number of threads bounds both, and
    holds even when callers hang up: a thread that has started cannot be called back.

    Whether there is a hash, and how dear it was made, must not show in the time. So every attempt
    pays for a hash of each cost that stored hashes have: once that was changed for both, until the
    last old hash is renewed.
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
        nobodys = hasher.hash(_NOBODYS)
        self._nobodys = {_cost_of(nobodys): nobodys}
        self._todays = _cost_of(nobodys)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

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

    async def know(self, stored: Iterable[str]) -> None:
        """Have attempts pay for the costs of these hashes, and for no others but today's."""
        costs = {_cost_of(each): each for each in stored}
        for each in costs.values():
            await self._learn(each)
        for forgotten in self._nobodys.keys() - costs.keys() - {self._todays}:
            del self._nobodys[forgotten]

    def turn_of(self, email: str) -> asyncio.Lock:
        """Return what calls of a signed-in account hold while they prove its password.

        One after the other: the many of one user must not be all that the threads do.
        """
        return self._turns.setdefault(email, asyncio.Lock())

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
        if stored is not None:
            await self._learn(stored)
        cost = stored and _cost_of(stored)
        hashes = [
            stored if stored and each == cost else nobodys
            for each, nobodys in sorted(self._nobodys.items())
        ]
        return await self._run(self._verify_all, hashes, stored, _canonical(password))

    def is_outdated(self, stored: str) -> bool:
        """Tell whether the hash was made with other parameters than those of today."""
        return self._hasher.check_needs_rehash(stored)

    async def _learn(self, stored: str) -> None:
        """Make a hash that nobody has, of the same cost."""
        cost = _cost_of(stored)
        if cost not in self._nobodys:
            like = argon2.PasswordHasher.from_parameters(argon2.extract_parameters(stored))
            self._nobodys[cost] = await self._run(like.hash, _NOBODYS)

    def _verify_all(self, hashes: Sequence[str], stored: str | None, password: str) -> bool:
        # Whichever matches, the others are paid for.
        matches = [self._verify(each, password) and each is stored for each in hashes]
        return any(matches)

    def _verify(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except VerifyMismatchError:
            return False

    def _is_breached(self, password: str) -> bool:
        return any(source.holds(password) for source in self._breached)

    async def _run(self, function: Callable[..., _T], *arguments: object) -> _T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)


def _cost_of(stored: str) -> str:
    """Return the part of a hash that says how it was made: all but salt and sum."""
    return stored.rsplit("$", 2)[0]


def _canonical(password: str) -> str:
    """Spell a password the same way whatever keyboard it was typed on (NIST SP 800-63B)."""
    return unicodedata.normalize("NFKC", password)
