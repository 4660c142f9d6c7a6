"""Keeps the terms of conversation turns right when turns around them come, change or go."""

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from pgvector import SparseVector

from server.caller import Caller
from server.database import Connection
from server.memory import ranking, words
from server.memory.model import Draft
from server.memory.pacing import paced
from server.memory.words import DIMENSIONS
from server.preferences import Language

REACH = len(ranking.NEIGHBOURHOOD) - 1
"""How many places away a turn is still a neighbour."""

_WAYS: Final = range(-REACH, REACH + 1)
_LAST: Final = 2**31 - 1
"""The last position that there is."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a turn stands."""

    session_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A stored turn."""

    id: UUID
    place: Place
    content: str


class Terms(SparseVector):
    """Weights of terms as pgvector takes them, made in a third of the time."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        terms = sorted(weights)
        count = len(terms)
        values = map(weights.__getitem__, terms)
        self._binary = struct.pack(f">iii{count}i{count}f", DIMENSIONS, count, 0, *terms, *values)

    def to_binary(self) -> bytes:
        """Return what goes to the database."""
        return self._binary


def sparse(weights: Mapping[int, float]) -> SparseVector:
    """Return weights of terms as pgvector takes them."""
    return Terms(weights)


NO_TERMS: Final = sparse({})
"""Of what no words are in the index."""


def place_of(draft: Draft) -> Place | None:
    """Return where a draft stands in its conversation, if it is a turn of one."""
    if draft.session_position is None:
        return None
    return Place(draft.session_id, draft.session_position)


class Surroundings:
    """The stored turns around some places, read and locked before those places change.

    Sensitive turns are not among them: no turn has their words, and they have no words of others.
    Two writers next to each other in one conversation take turns: each sees the other's text.
    """

    def __init__(
        self, turns: Iterable[Turn], language: Language, coming: Iterable[Draft] = ()
    ) -> None:
        self._turns = tuple(turns)
        self._language = language
        # By session and position a set, in order: a turn may be retold, but the same words count
        # once.
        self._said: dict[str, dict[int, dict[str, None]]] = {}
        self._named: dict[str, list[int]] = {}
        self._reached: set[tuple[str, int]] | None = None
        for turn in self._turns:
            self._note(turn.place.session_id, turn.place.position, turn.content)
        for draft in coming:
            if draft.session_position is not None and not draft.is_sensitive:
                self._note(draft.session_id, draft.session_position, draft.content)

    @classmethod
    async def of(
        cls,
        connection: Connection,
        caller: Caller,
        places: Iterable[Place],
        language: Language = Language.ENGLISH,
    ) -> "Surroundings":
        """Read what the terms at the places, and at their neighbours, are made of.

        Args:
            connection: The transaction that changes something there.
            caller: Whose conversations they are.
            places: Where something changes.
            language: What the terms are made in, held until the transaction ends.
        """
        wanted = sorted({(place.session_id, place.position) for place in places})
        if not wanted:
            return cls((), language)
        await connection.execute(
            """
            SELECT pg_advisory_xact_lock(hashtextextended($1 || session_id, 0))
              FROM (SELECT DISTINCT unnest($2::text[]) AS session_id ORDER BY 1) AS sessions
            """,
            str(caller.user_id),
            [session_id for session_id, _ in wanted],
        )
        runs = _runs(wanted)
        # A run at a time, by the index: of a user whom the statistics have not met yet the planner
        # would rather read everything.
        rows = await connection.fetch(
            """
            SELECT near.id, near.session_id, near.session_position, near.content
              FROM unnest($3::text[], $4::integer[], $5::integer[])
                   AS run (session_id, first, last)
              CROSS JOIN LATERAL (
                   SELECT id, session_id, session_position, content
                     FROM memories
                    WHERE tenant_id = $1 AND user_id = $2
                      AND session_id <> '' AND session_id = run.session_id
                      AND session_position BETWEEN run.first AND run.last
                      AND archived_at IS NULL AND NOT sensitive
                   OFFSET 0
                   ) AS near
            """,
            caller.tenant_id,
            caller.user_id,
            [session_id for session_id, _, _ in runs],
            [max(first - 2 * REACH, 0) for _, first, _ in runs],
            [min(last + 2 * REACH, _LAST) for _, _, last in runs],
        )
        turns = (
            Turn(row["id"], Place(row["session_id"], row["session_position"]), row["content"])
            for row in rows
        )
        return cls(turns, language)

    def with_drafts(self, drafts: Iterable[Draft]) -> "Surroundings":
        """Return these surroundings once the drafts are stored."""
        return Surroundings(self._turns, self._language, drafts)

    def without(self, *memory_ids: UUID) -> "Surroundings":
        """Return these surroundings once some turns are gone."""
        gone = set(memory_ids)
        left = (turn for turn in self._turns if turn.id not in gone)
        return Surroundings(left, self._language)

    def including(self, *turns: Turn) -> "Surroundings":
        """Return these surroundings once some turns are back."""
        return Surroundings((*self._turns, *turns), self._language)

    def with_text(self, memory_id: UUID, content: str) -> "Surroundings":
        """Return these surroundings once a turn has another text."""
        retold = (
            Turn(turn.id, turn.place, content) if turn.id == memory_id else turn
            for turn in self._turns
        )
        return Surroundings(retold, self._language)

    def terms(self, content: str, place: Place | None) -> SparseVector:
        """Return the terms of a memory, with those of the turns around it."""
        around = self._around(place) if place else ()
        return sparse(ranking.blend(((0, self._terms(content)), *around)))

    async def terms_of(self, drafts: Iterable[Draft]) -> list[SparseVector]:
        """Return the terms of drafts, with those of the turns around them; sensitive have none."""
        return [
            NO_TERMS if draft.is_sensitive else self.terms(draft.content, place_of(draft))
            async for _, draft in paced(drafts)
        ]

    def reach(self, draft: Draft) -> bool:
        """Tell whether a stored turn stands where it adds to the terms of a draft."""
        place = place_of(draft)
        if place is None or not self._turns:
            return False
        if self._reached is None:
            self._reached = {
                (turn.place.session_id, turn.place.position + way)
                for turn in self._turns
                for way in _WAYS
            }
        return (place.session_id, place.position) in self._reached

    async def refresh(
        self, connection: Connection, caller: Caller, places: Iterable[Place]
    ) -> None:
        """Store anew the terms of the stored turns at the places and next to them."""
        if not self._turns:
            return
        near = {(one.session_id, one.position + way) for one in places for way in _WAYS}
        turns = [t for t in self._turns if (t.place.session_id, t.place.position) in near]
        if turns:
            turns.sort(key=lambda turn: turn.id)
            terms = {
                turn.id: self.terms(turn.content, turn.place) async for _, turn in paced(turns)
            }
            await store_terms(connection, caller, terms)

    def _note(self, session_id: str, position: int, content: str) -> None:
        self._said.setdefault(session_id, {}).setdefault(position, {})[content] = None

    def _around(self, place: Place) -> Iterable[tuple[int, list[int]]]:
        said = self._said.get(place.session_id, {})
        for way in _WAYS:
            if way:
                for text in said.get(place.position + way, ()):
                    yield abs(way), self._terms(text)

    def _terms(self, text: str) -> list[int]:
        named = self._named.get(text)
        if named is None:
            named = self._named[text] = words.terms(text, self._language)
        return named


async def store_terms(
    connection: Connection, caller: Caller, terms: Mapping[UUID, SparseVector]
) -> None:
    """Store the terms of memories by their ids."""
    await connection.execute(
        """
        UPDATE memories AS memory
           SET terms = made.terms
          FROM unnest($3::uuid[], $4::sparsevec[]) AS made (id, terms)
         WHERE memory.tenant_id = $1 AND memory.user_id = $2 AND memory.id = made.id
           AND memory.id = ANY ($3)
        """,
        caller.tenant_id,
        caller.user_id,
        list(terms),
        list(terms.values()),
    )


def _runs(places: Iterable[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Return sorted places as runs: session, first and last position.

    Places that have a neighbour's neighbour in common are of one run.
    """
    runs: list[tuple[str, int, int]] = []
    for session_id, position in places:
        before = runs[-1] if runs else ("", 0, 0)
        if before[0] == session_id and position - before[2] <= 4 * REACH:
            runs[-1] = (session_id, before[1], position)
        else:
            runs.append((session_id, position, position))
    return runs
