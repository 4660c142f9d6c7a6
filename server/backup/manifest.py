"""What a backup consists of. The manifest is written last: without one there is no backup."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

FORMAT: Final = 1
"""Raised when an older release could not restore what a newer one writes."""


class ManifestUnreadable(Exception):
    """It is not one, or it is of a release that is newer than this one."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a stream as it lies in the bucket."""

    size_bytes: int
    sha256: str
    """In hexadecimal, of the bytes in the bucket."""


@dataclass(frozen=True, slots=True)
class Table:
    """What a table held."""

    rows: int
    digest: str
    """Of all rows, in whatever order: see `server.backup.snapshot`."""


@dataclass(frozen=True, slots=True)
class Transactions:
    """How far transactions were numbered when the snapshot was taken."""

    ended: int
    """All below had ended: what the snapshot does not hold has this number or a higher one."""
    begun: int
    """None had this number or a higher one."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A backup."""

    id: str
    mark: datetime
    """Every write that was acknowledged before is in it."""
    finished_at: datetime
    migrations: int
    """Number of the last migration of the schema."""
    transactions: Transactions
    tables: Mapping[str, Table]
    objects: int
    """How many objects the tables name, without those in `gone`."""
    object_bytes: int
    gone: int
    """How many objects were deleted, with their rows, while the backup was made."""
    streams: Mapping[str, Sequence[Part]]
    """The parts of each stream, in order."""
    lost: int
    """How many objects rows name that were not there: something had gone wrong before."""
    new_bytes: int
    """How much this backup has added to the bucket."""

    @property
    def rows(self) -> int:
        """How many rows all tables had."""
        return sum(table.rows for table in self.tables.values())

    def encode(self) -> bytes:
        """Return it as JSON."""
        fields = dataclasses.asdict(self) | {
            "format": FORMAT,
            "mark": self.mark.isoformat(),
            "finished_at": self.finished_at.isoformat(),
        }
        return json.dumps(fields, indent=1, sort_keys=True).encode()

    @classmethod
    def decode(cls, encoded: bytes) -> "Manifest":
        """Read what `encode` wrote.

        Raises:
            ManifestUnreadable: It did not, or not in this format.
        """
        try:
            fields: dict[str, Any] = json.loads(encoded)
            known = fields.pop("format")
            if known != FORMAT:
                raise ManifestUnreadable(f"the manifest has format {known}, not {FORMAT}")
            return cls(**fields | _decoded(fields))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ManifestUnreadable("not a manifest of a backup") from error


def _decoded(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "mark": datetime.fromisoformat(fields["mark"]),
        "finished_at": datetime.fromisoformat(fields["finished_at"]),
        "transactions": Transactions(**fields["transactions"]),
        "tables": {name: Table(**table) for name, table in fields["tables"].items()},
        "streams": {
            name: tuple(Part(**part) for part in parts) for name, parts in fields["streams"].items()
        },
    }


def digest(encoded: bytes) -> bytes:
    """Return the SHA-256 that a manifest is known by."""
    return hashlib.sha256(encoded).digest()
