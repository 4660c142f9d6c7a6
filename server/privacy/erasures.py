"""An erasure as a value, and how a round goes through the stores."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from server.caller import Caller


class ErasureState(enum.Enum):
    """How far an erasure is."""

    ERASING = "erasing"
    ERASED = "erased"
    CONFIRMED = "confirmed"


class Store(enum.Enum):
    """Where things of a user are, in the order in which a round goes through it."""

    POSTGRES = "postgres"
    OBJECTS = "objects"
    UPLOADS = "uploads"
    VALKEY = "valkey"


@dataclass(frozen=True, slots=True)
class Erasure:
    """What its user is told."""

    id: UUID
    caller: Caller
    receipt_id: UUID
    """Made by chance alone: who knows it may read this."""
    state: ErasureState
    requested_at: datetime
    erased_at: datetime | None
    confirmed_at: datetime | None
    removed: Mapping[str, int]
    """How much, by store and place."""
    rounds: int
    membership_receipt_ids: Sequence[UUID] = ()
    """Of the erasures of what the account was in other tenants, if they began with this one."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the round of an erasure is."""

    store: Store
    place: str
    """Where in the store to go on; empty for its beginning."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What was removed from a place, and where to go on."""

    place: str
    """Counted under this name."""
    count: int
    next_place: str
    """Empty: the store is through."""


def after(standing: Standing, removal: Removal) -> Standing | None:
    """Return where the round goes on; None: it has been through all stores."""
    if removal.next_place:
        return Standing(standing.store, removal.next_place)
    stores = list(Store)
    following = stores[stores.index(standing.store) + 1 :]
    return Standing(following[0], "") if following else None
