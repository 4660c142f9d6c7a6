"""The conversations that retrieval is judged on. They are read where they lie, never copied."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from local.layout import CHECKOUT

DATA = CHECKOUT.parent / "shared" / "data" / "locomo-dev.json"
MODEL = "all-MiniLM-L6-v2"
"""What made the vectors that lie beside the conversations."""

_SESSION_TIME = "%I:%M %p on %d %B, %Y"
Vectors = npt.NDArray[np.float32]


class DataError(Exception):
    """The conversations cannot be read; the text says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """One thing that somebody said."""

    id: str
    session: str
    position: int
    """Place in the session, from 0."""
    said_at: datetime
    speaker: str
    text: str
    vector: Vectors | None
    """Of `line`; None if the data brings no vectors."""

    @property
    def line(self) -> str:
        """The turn as one text, for stores that know no speakers."""
        return f"{self.speaker}: {self.text}"


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """A question, and the turns that answer it."""

    text: str
    evidence: frozenset[str]
    vector: Vectors | None


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """What one user remembers, and what that user is asked."""

    name: str
    turns: tuple[Turn, ...]
    questions: tuple[Question, ...]

    @property
    def sessions(self) -> Mapping[str, str]:
        """The session of each turn, by id."""
        return {turn.id: turn.session for turn in self.turns}


def load(file: Path) -> list[Conversation]:
    """Read conversations, and their vectors from `<name>-minilm.npz` beside them if it is there.

    Raises:
        DataError: There is no such file, or it holds something else.
    """
    try:
        entries = json.loads(file.read_text())
        beside = file.with_name(f"{file.stem}-minilm.npz")
        vectors = dict(np.load(beside)) if beside.exists() else {}
        return [_conversation(entry, vectors) for entry in entries]
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} holds no conversations: {error!r}") from error


def _conversation(entry: dict[str, Any], vectors: Mapping[str, Any]) -> Conversation:
    name, turns, questions = entry["conversation"], entry["turns"], entry["questions"]
    of_turns = iter(_rows(vectors, f"{name}/turns", len(turns)))
    of_questions = _rows(vectors, f"{name}/questions", len(questions))
    return Conversation(
        name,
        tuple(
            _turn(turn, position, next(of_turns))
            for _, session in groupby(turns, key=lambda turn: turn["session"])
            for position, turn in enumerate(session)
        ),
        tuple(
            Question(question["question"], frozenset(question["evidence"]), vector)
            for question, vector in zip(questions, of_questions, strict=True)
        ),
    )


def _rows(vectors: Mapping[str, Any], name: str, size: int) -> Sequence[Vectors | None]:
    return list(vectors[name].astype(np.float32)) if vectors else [None] * size


def _turn(entry: dict[str, Any], position: int, vector: Vectors | None) -> Turn:
    return Turn(
        id=entry["id"],
        session=str(entry["session"]),
        position=position,
        said_at=datetime.strptime(entry["session_time"], _SESSION_TIME).replace(tzinfo=UTC),
        speaker=entry["speaker"],
        text=entry["text"],
        vector=vector,
    )
