"""Memories to be scored, and their scores, as columns: no Python object for each of them."""

import struct
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
from asyncpg.pgproto import pgproto

Column = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_DAY_MICROSECONDS = 86_400e6

# COPY's binary format: a header, each field after its length, a trailer. No column is NULL, so
# that every row has the same size and the whole answer is one array.
_HEADER: Final = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER: Final = struct.pack(">h", -1)
Fields = tuple[tuple[str, str], ...]
"""Name and NumPy type of each column."""

_FIELDS: Final = (
    ("user_id", "S16"),
    ("memory_id", "S16"),
    ("text_version", ">i4"),
    ("last_seen_at", ">i8"),
    ("use_count", ">i4"),
    ("retrieved_count", ">i4"),
    ("useful_count", ">i4"),
    ("feedback", ">f4"),
    ("sentiment", ">f4"),
    ("score", ">f4"),
    ("relevance_to_goals", ">f4"),
    ("goals_key", ">i8"),
    ("scorer_version", ">i4"),
)
_SCORED_FIELDS: Final = (
    ("user_id", "S16"),
    ("memory_id", "S16"),
    ("text_version", ">i4"),
    ("goals_key", ">i8"),
    ("score", ">f4"),
    ("relevance_to_goals", ">f4"),
    ("emotional_weight", ">f4"),
    ("predictive_value", ">f4"),
    ("recency_frequency", ">f4"),
    ("sentiment", ">f4"),
)


SCORED_COLUMNS: Final = [name for name, _ in _SCORED_FIELDS]
"""What `ScoreColumns.to_copy` writes."""


@cache
def _row(fields: Fields) -> np.dtype[np.void]:
    """Return a row as COPY writes it: how many fields, and each after its length."""
    return np.dtype(
        [("fields", ">i2")]
        + [item for name, kind in fields for item in ((f"{name}_bytes", ">i4"), (name, kind))]
    )


_ROW: Final = _row(_FIELDS)


async def copied(fields: Fields, batches: Iterable[Mapping[str, Column]]) -> AsyncIterator[bytes]:
    """Yield what COPY … WITH (FORMAT binary) takes, a piece a batch.

    Around a file, asyncpg would make a cycle that keeps what was in it.

    Args:
        fields: The columns, in the order of the table's.
        batches: Each column by its name, all of a batch as long as each other.
    """
    yield _HEADER
    for columns in batches:
        table = np.zeros(len(columns[fields[0][0]]), _row(fields))
        table["fields"] = len(fields)
        for name, kind in fields:
            table[f"{name}_bytes"] = np.dtype(kind).itemsize
            table[name] = columns[name]
        yield table.tobytes()
    yield _TRAILER


@dataclass(frozen=True, slots=True)
class Rows:
    """Memories in order of (user, memory), as Postgres copied them out."""

    table: Column
    """Structured array with a field for each of `_FIELDS`."""

    @classmethod
    def parse(cls, copied: bytes) -> "Rows":
        """Read the answer to COPY … WITH (FORMAT binary).

        Raises:
            ValueError: It does not have the columns of `_FIELDS`, all of them NOT NULL.
        """
        if not copied.endswith(_TRAILER):
            raise ValueError("COPY ended early")
        return cls(np.frombuffer(copied[len(_HEADER) : -len(_TRAILER)], _ROW))

    def __len__(self) -> int:
        return len(self.table)

    def head(self, size: int) -> "Rows":
        """Return the first rows only."""
        return Rows(self.table[:size])

    def only(self, indexes: Column | slice) -> "Rows":
        """Return some rows."""
        return Rows(self.table[indexes])

    def column(self, name: str, kind: str) -> Column:
        """Return a column, converted."""
        return self.table[name].astype(kind)

    def days_since_last_seen(self, as_of: datetime) -> Floats:
        """Return ages in days; nothing is younger than 0."""
        then = (as_of - _EPOCH).total_seconds() * 1e6
        days = (then - self.table["last_seen_at"].astype(np.float64)) / _DAY_MICROSECONDS
        return np.maximum(days, 0).astype(np.float32)

    def key(self, index: int) -> tuple[UUID, UUID]:
        """Return user and memory of one row."""
        user, memory = self.table["user_id"][index], self.table["memory_id"][index]
        # NumPy drops trailing zero bytes of what it takes for text.
        return UUID(bytes=user.ljust(16, b"\0")), UUID(bytes=memory.ljust(16, b"\0"))

    def memory_ids(self, indexes: Column | None = None) -> list[pgproto.UUID]:
        """Return the ids of all memories, or of some."""
        column = self.table["memory_id"]
        return uuids(column if indexes is None else column[indexes])

    def user_ids(self, indexes: Column | None = None) -> list[pgproto.UUID]:
        """Return the user of each memory, or of some; few objects, many references."""
        column = self.table["user_id"]
        users, places = np.unique(
            column if indexes is None else column[indexes], return_inverse=True
        )
        objects = np.empty(len(users), dtype=object)
        objects[:] = uuids(users)
        listed: list[pgproto.UUID] = objects[places].tolist()
        return listed

    def by_user(
        self, usual: Sequence[float], of_users: Mapping[UUID, Sequence[float]], kind: str = "<f4"
    ) -> Column:
        """Return some numbers for each memory: those of its user, or else the usual ones."""
        numbers = np.tile(np.array(usual, kind), (len(self), 1))
        users = np.array([user.bytes for user in of_users], "S16")
        column = self.table["user_id"]
        # A user's memories stand together: one search for each user, not one for each memory.
        starts, ends = np.searchsorted(column, users), np.searchsorted(column, users, "right")
        for start, end, own in zip(starts, ends, of_users.values(), strict=True):
            numbers[start:end] = own
        return numbers

    def users(self) -> list[pgproto.UUID]:
        """Return every user once."""
        column = self.table["user_id"]
        # A user's memories stand together: there is nothing to sort.
        is_first = np.ones(len(column), dtype=bool)
        np.not_equal(column[1:], column[:-1], out=is_first[1:])
        return uuids(column[is_first])


@dataclass(frozen=True, slots=True)
class ScoreColumns:
    """What a scorer found, one element a memory, in the order of the batch."""

    scorer_version: int
    score: Floats
    relevance_to_goals: Floats
    emotional_weight: Floats
    predictive_value: Floats
    recency_frequency: Floats
    sentiment: Floats
    """NaN where there is none."""

    def only(self, indexes: Column | slice) -> "ScoreColumns":
        """Return the scores of some memories."""
        chosen = (column[indexes] for column in (*self.components(), self.sentiment))
        return ScoreColumns(self.scorer_version, *chosen)

    def sum(self) -> float:
        """Return the sum of the scores."""
        return float(self.score.sum(dtype=np.float64))

    def components(self) -> Sequence[Floats]:
        """Return the columns that are never NaN."""
        return (
            self.score,
            self.relevance_to_goals,
            self.emotional_weight,
            self.predictive_value,
            self.recency_frequency,
        )

    def to_copy(self, rows: Rows, goals_keys: Column) -> AsyncIterator[bytes]:
        """Return what COPY … WITH (FORMAT binary) takes: the columns of `SCORED_COLUMNS`.

        Args:
            rows: The memories that the scores are of.
            goals_keys: Which goals they were matched with.
        """
        columns = {name: rows.table[name] for name in ("user_id", "memory_id", "text_version")}
        columns["goals_key"] = goals_keys
        columns |= {name: getattr(self, name) for name in SCORED_COLUMNS[4:]}
        return copied(_SCORED_FIELDS, [columns])

    def is_sound(self, size: int) -> bool:
        """Tell whether there are `size` of each, and every number is 0 to 1."""
        if any(len(column) != size for column in (*self.components(), self.sentiment)):
            return False
        known = self.sentiment[~np.isnan(self.sentiment)]
        return all(
            bool(np.all((column >= 0) & (column <= 1))) for column in (*self.components(), known)
        )


def uuids(column: Column) -> list[pgproto.UUID]:
    """Return a column of 16 bytes each as ids."""
    raw = column.tobytes()
    return [pgproto.UUID(raw[start : start + 16]) for start in range(0, len(raw), 16)]
