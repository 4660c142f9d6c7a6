"""Passwords that others have lost (NIST SP 800-63B, section 3.1.1.2)."""

import hashlib
import mmap
from pathlib import Path
from typing import Final, Protocol

_DIGITS: Final = 40


class Breached(Protocol):
    """Knows passwords that are in the hands of whoever guesses."""

    def holds(self, password: str) -> bool:
        """Tell whether a password is one of them."""


class Commonplace:
    """The passwords of twelve and more characters that guessers try first, and nothing else."""

    _WORDS: Final = ("password", "qwertyuiop", "1234567890", "kimberly", "letmein", "abcdefghij")

    def holds(self, password: str) -> bool:
        """Tell whether it is a word, or a character, over and over, with little at its ends."""
        core = password.lower().strip("0123456789!?.-_# ") or password
        return len(set(password)) < 4 or any(not core.replace(word, "") for word in self._WORDS)


class HashFile:
    """SHA-1 hashes in hexadecimal, a line each and in order, as Have I Been Pwned has them.

    What follows a hash in its line, such as ":" and a count, does not matter. The file is mapped
    and searched: a thousand million lines take thirty looks.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def holds(self, password: str) -> bool:
        """Tell whether the hash of a password is in the file."""
        # Not for security: the file is what it is.
        wanted = hashlib.sha1(password.encode(), usedforsecurity=False).hexdigest().upper().encode()
        low, high = 0, len(self._lines)
        while low < high:
            start = self._lines.rfind(b"\n", 0, (low + high) // 2) + 1
            found = self._lines[start : start + _DIGITS].upper()
            if found == wanted:
                return True
            if found < wanted:
                end = self._lines.find(b"\n", start)
                low = len(self._lines) if end < 0 else end + 1
            else:
                high = start
        return False
