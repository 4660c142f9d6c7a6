"""What some users had in Redis when they were last asked: read and understood once."""

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from server.caller import Caller
from server.memory import ranking
from server.memory.conversation import REACH, Place
from server.memory.model import Memory
from server.memory.short_term_bodies import kept_from
from server.preferences import Language

Entry = Sequence[Any]
"""What the scripts return of a memory, its id first."""
Terms = Mapping[int, float]
_Said = tuple[Language, str, tuple[tuple[int, str], ...]]
"""What the terms of a memory follow from: language, text, and the texts around it by distance."""

_MOST_BYTES: Final = 64 * 1024 * 1024
_BYTES_BESIDE_TEXT: Final = 4 * 1024
"""What the objects and the terms of a usual turn take, roughly."""
_AT_ONCE: Final = 50
"""How many texts are read between two turns of the loop: about ten milliseconds."""


class Snapshot:
    """The short-term memories of a user at one version of them.

    What is as it was in the snapshot before is taken from there: it is neither parsed nor are its
    words told apart again.
    """

    def __init__(
        self, version: bytes, entries: Iterable[Entry], before: "Snapshot | None" = None
    ) -> None:
        """Read what the scripts return of the memories; `before` is an earlier snapshot."""
        read = before._read if before else {}  # noqa: SLF001 - another snapshot's
        self.version = version
        self._read: dict[bytes, tuple[Entry, Memory]] = {
            entry[0]: _understood(entry, read.get(entry[0])) for entry in entries
        }
        self.memories = [memory for _, memory in self._read.values()]
        """Some may have expired since."""
        self.size_bytes = _BYTES_BESIDE_TEXT + sum(
            memory.size_bytes + _BYTES_BESIDE_TEXT for memory in self.memories
        )
        """About how much it takes here."""
        self._known: Mapping[_Said, Terms] = before._known if before else {}  # noqa: SLF001 - another snapshot's
        self._terms: dict[Language, Mapping[UUID, Terms]] = {}

    async def terms(self, language: Language) -> Mapping[UUID, Terms]:
        """Return the terms of every memory, with those of the turns around it."""
        if language not in self._terms:
            said = _said(self.memories, language)
            known: dict[_Said, Terms] = {}
            made = 0
            for key in said.values():
                known[key] = self._known.get(key) or _weights(key)
                made += key not in self._known
                if made % _AT_ONCE == _AT_ONCE - 1:
                    await asyncio.sleep(0)
            self._known = known
            self._terms = {language: {one: known[key] for one, key in said.items()}}
        return self._terms[language]


class Snapshots:
    """The snapshots that were asked for last, as many as there is room for."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Caller, Snapshot] = OrderedDict()
        self._size_bytes = 0

    def find(self, caller: Caller) -> Snapshot | None:
        """Return the last snapshot of a user's memories."""
        if caller in self._kept:
            self._kept.move_to_end(caller)
        return self._kept.get(caller)

    def keep(self, caller: Caller, snapshot: Snapshot) -> None:
        """Keep a snapshot in place of the last, and let go of those that nobody asks for."""
        before = self._kept.pop(caller, None)
        self._size_bytes += snapshot.size_bytes - (before.size_bytes if before else 0)
        self._kept[caller] = snapshot
        while self._size_bytes > _MOST_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._size_bytes -= oldest.size_bytes


def _understood(entry: Entry, before: tuple[Entry, Memory] | None) -> tuple[Entry, Memory]:
    if before and before[0] == entry:
        return before
    return entry, kept_from(entry).memory


def _weights(key: _Said) -> Terms:
    language, content, around = key
    return ranking.weights(content, around, language)


def _said(memories: Sequence[Memory], language: Language) -> dict[UUID, _Said]:
    at: dict[Place, dict[str, None]] = defaultdict(dict)
    for memory in memories:
        if place := _place(memory):
            # The same words count once, as in Surroundings.
            at[place][memory.content] = None
    return {memory.id: (language, memory.content, _around(memory, at)) for memory in memories}


def _around(memory: Memory, at: Mapping[Place, Mapping[str, None]]) -> tuple[tuple[int, str], ...]:
    place = _place(memory)
    if place is None:
        return ()
    return tuple(
        (abs(offset), text)
        for offset in range(-REACH, REACH + 1)
        if offset
        for text in at.get(Place(place.session_id, place.position + offset), ())
    )


def _place(memory: Memory) -> Place | None:
    if memory.session_position is None:
        return None
    return Place(memory.session_id, memory.session_position)
