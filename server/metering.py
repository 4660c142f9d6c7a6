"""What the call that is being served changes, counted as it is committed.

Whatever changes tells the audit log in its own transaction. The same word is counted here when that
transaction has committed: however the call ends, what it left behind counts, and once. A retry that
finds its work done changes nothing and counts as nothing.
"""

from collections.abc import Callable
from contextvars import ContextVar

Count = Callable[[int, int], None]
"""Is told how many changes were committed, and how many bytes came another way than with them."""


class Ledger:
    """The changes of one call that wait for their transactions to commit."""

    __slots__ = ("_count", "_waiting")

    def __init__(self, count: Count) -> None:
        self._count = count
        # What was rolled back stays here, and is never asked for again.
        self._waiting: dict[object, tuple[int, int]] = {}

    def note(self, transaction: object, changes: int, *, uploaded_bytes: int = 0) -> None:
        """Note what counts once a transaction has committed."""
        noted_changes, noted_bytes = self._waiting.get(transaction, (0, 0))
        self._waiting[transaction] = noted_changes + changes, noted_bytes + uploaded_bytes

    def settle(self, transaction: object) -> None:
        """Count what was noted of a transaction that has committed."""
        if noted := self._waiting.pop(transaction, None):
            self._count(*noted)

    def committed(self, changes: int) -> None:
        """Count the changes of a statement that has committed by itself."""
        self._count(changes, 0)


_current: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


def open_ledger(count: Count | None) -> None:
    """Have what the current task changes from now on counted; None: have it count as nothing."""
    _current.set(Ledger(count) if count else None)


def ledger() -> Ledger | None:
    """Return where the changes of the call that is being served are noted, if they count."""
    return _current.get()
