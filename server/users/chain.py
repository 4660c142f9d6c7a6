"""The hash chain of a tenant's audit log.

Each link holds SHA-256(hash of the link before || the whole event), the first one the hash of
the tenant's id. Who changes, removes, adds or moves an event must compute every later link anew,
and the recorded head of the chain still says where it really ended.
"""

import hashlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

_SEED: Final = b"kimberly audit chain 1\0"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

LINK_MISSING: Final = "the link of this place is missing"
EVENT_DELETED: Final = "the event of this place was deleted"
EVENT_EDITED: Final = "the event of this place, or its link, was changed"
REORDERED: Final = "the events are not in the order in which they were chained"
TAIL_CUT: Final = "the end of the log was cut off"
TAIL_ADDED: Final = "links were added behind the recorded end of the log"
REHASHED: Final = "the chain was computed anew: it does not end in its recorded hash"
EVENT_INSERTED: Final = "an event was inserted before this place after the log was chained"


@dataclass(frozen=True, slots=True)
class Event:
    """An audit event as stored."""

    id: UUID
    tenant_id: UUID
    user_id: UUID
    actor: str
    action: str
    resource: str
    event_time: datetime
    xid: int

    @property
    def order(self) -> tuple[int, UUID]:
        """Where the event belongs: after those of transactions that began to write earlier."""
        return self.xid, self.id


@dataclass(frozen=True, slots=True)
class Head:
    """Where a chain ends: the place and hash of its last link."""

    position: int
    hash: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """An event's place in the chain of its tenant."""

    tenant_id: UUID
    position: int
    event_id: UUID
    hash: bytes


@dataclass(frozen=True, slots=True)
class StoredLink:
    """A link as found, with its event as found: None if there is none."""

    position: int
    hash: bytes
    event: Event | None


@dataclass(frozen=True, slots=True)
class Break:
    """The first place where a chain does not hold, and why."""

    position: int
    problem: str


def start(tenant_id: UUID) -> Head:
    """Return the head of a chain without links."""
    return Head(0, hashlib.sha256(_SEED + tenant_id.bytes).digest())


def append(head: Head, event: Event) -> Head:
    """Return the head of the chain after one more event."""
    return Head(head.position + 1, hashlib.sha256(head.hash + encode(event)).digest())


def encode(event: Event) -> bytes:
    """Return all fields of an event so that no two events have the same bytes.

    Ids of 16 bytes, time in microseconds since 1970 and xid in 8 bytes each, big-endian; then
    each text in UTF-8 behind its length in 4 bytes.
    """
    texts = [text.encode() for text in (event.actor, event.action, event.resource)]
    return b"".join(
        (
            event.id.bytes,
            event.tenant_id.bytes,
            event.user_id.bytes,
            struct.pack(">qQ", (event.event_time - _EPOCH) // _MICROSECOND, event.xid),
            *(struct.pack(">I", len(text)) + text for text in texts),
        )
    )


def extend(
    heads: Mapping[UUID, Head], events: Iterable[Event]
) -> tuple[Sequence[Link], Mapping[UUID, Head]]:
    """Chain events of many tenants.

    Args:
        heads: Where the chains end now; a tenant that is not named has none yet.
        events: The events in the order of (xid, id).

    Returns:
        The new links, and the heads of all chains that grew.
    """
    links: list[Link] = []
    grown: dict[UUID, Head] = {}
    for event in events:
        tenant_id = event.tenant_id
        before = grown.get(tenant_id) or heads.get(tenant_id) or start(tenant_id)
        grown[tenant_id] = after = append(before, event)
        links.append(Link(tenant_id, after.position, event.id, after.hash))
    return links, grown


@dataclass(frozen=True, slots=True)
class Walk:
    """How far a verification came, and the last event that it passed."""

    head: Head
    last: Event | None = None


def walk(before: Walk, page: Sequence[StoredLink], beyond: StoredLink | None) -> Walk | Break:
    """Verify the next links of a chain.

    Args:
        before: How far the verification came.
        page: The links from there on.
        beyond: The link after the page, if there is one.

    Returns:
        How far it came then, or the first break.
    """
    current = before
    for link, following in zip(page, [*page[1:], beyond], strict=True):
        problem = _problem(current, link, following)
        if problem is not None:
            return Break(current.head.position + 1, problem)
        current = Walk(Head(link.position, link.hash), link.event)
    return current


def _problem(before: Walk, link: StoredLink, following: StoredLink | None) -> str | None:
    if link.position != before.head.position + 1:
        return LINK_MISSING
    if link.event is None:
        return EVENT_DELETED
    comes_early = _is_after(before.last, link.event)
    if not comes_early and append(before.head, link.event).hash == link.hash:
        return None
    comes_late = following is not None and _is_after(link.event, following.event)
    return REORDERED if comes_early or comes_late else EVENT_EDITED


def _is_after(event: Event | None, following: Event | None) -> bool:
    return event is not None and following is not None and event.order > following.order


def first(one: Break | None, other: Break | None) -> Break | None:
    """Return the break that comes first; of two at one place, the one given first."""
    breaks = [each for each in (one, other) if each is not None]
    return min(breaks, key=lambda each: each.position, default=None)


def compare_end(walked: Head, recorded: Head, last_position: int) -> Break | None:
    """Compare where a chain ends with where it was recorded to end.

    Args:
        walked: The end that the verification reached.
        recorded: The head as the sealer left it.
        last_position: Place of the last link there is.
    """
    if walked.position < recorded.position:
        return Break(walked.position + 1, TAIL_CUT)
    if last_position > recorded.position:
        return Break(recorded.position + 1, TAIL_ADDED)
    if walked.hash != recorded.hash:
        return Break(recorded.position, REHASHED)
    return None
