"""Ranking in process: the scorer of the service over whole conversations, without its stores.

What the stores do is done here with arrays: amounts have a row for each question and a column for
each turn. What then decides the order is the service's own code: an idea gains there what it gains
here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from bench.conversations import Conversation, Question, Turn
from bench.judging import DEPTH, Judgement, judge
from server.memory import ranking, words
from server.memory.fusion import Weights, rank
from server.memory.model import Candidate, Filter
from server.memory.questions import Question as Asked
from server.preferences import USUAL_WEIGHTS, Language
from workers import scoring
from workers.sentiment import sentiments

Amounts = npt.NDArray[np.float64]
"""How well each turn answers each question: a row for each question, a column for each turn."""

_LANGUAGE: Final = Language.ENGLISH
_TODAY: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Setting:
    """How turns are ranked. Without arguments: as the service does."""

    weights: Weights = field(default_factory=Weights)
    around_words: tuple[float, ...] = ranking.NEIGHBOURHOOD
    """What a word counts in the turn itself, in the turns next to it, and so on."""
    around_meaning: tuple[float, ...] = ranking.NEIGHBOURHOOD
    """What a cosine counts in the turn itself, in the turns next to it, and so on."""
    names: float = 1.0
    """What a word of a question counts that is a speaker's name."""
    session: float = 0.0
    """What the session of a turn adds to its words, of the best turn's."""
    session_of: str = "whole"
    """Where that comes from: BM25 of the `whole` session, or the `sum` of those of its turns that
    are candidates."""
    candidates: int = 5 * DEPTH
    """How many turns each leg brings."""
    has_floor: bool = True
    """Whether a leg takes what it did not bring for as good as its last; else for nothing."""
    is_scored: bool = False
    """Whether a meditation has been there."""
    is_asked_then: bool = False
    """Whether questions are asked when the last thing was said, rather than years later."""


class Told:
    """One conversation, and what its turns amount to as answers to its questions."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.sessions = conversation.sessions
        named = {session: n for n, session in enumerate(dict.fromkeys(self.sessions.values()))}
        self._session_of = np.array([named[turn.session] for turn in conversation.turns])
        self._said = [words.terms(turn.text, _LANGUAGE) for turn in conversation.turns]
        self._by_words: dict[tuple[tuple[float, ...], float], Amounts] = {}

    def by_words(self, setting: Setting) -> Amounts:
        """Return what the words bring, as the service weighs them."""
        asked = setting.around_words, setting.names
        if asked not in self._by_words:
            documents = [
                ranking.blend(self._around(place, setting.around_words), setting.around_words)
                for place in range(len(self._said))
            ]
            self._by_words[asked] = self._matched(documents, setting)
        amounts = self._by_words[asked]
        if not setting.session:
            return amounts
        best = amounts.max(axis=1, keepdims=True)
        lifted: Amounts = amounts + setting.session * best * self._by_session(amounts, setting)
        return lifted

    def by_meaning(self, setting: Setting) -> Amounts:
        """Return the mean of the cosines of each turn and the turns around it."""
        cosines = _vectors(self.conversation.questions) @ _vectors(self.conversation.turns).T
        weights = np.zeros((len(self._said), len(self._said)))
        for place in range(len(self._said)):
            for distance, other in self._places_around(place, len(setting.around_meaning) - 1):
                weights[place, other] = setting.around_meaning[distance]
        means: Amounts = cosines @ (weights / weights.sum(axis=1, keepdims=True)).T
        return means

    @cached_property
    def scores(self) -> Sequence[float]:
        """What a meditation makes of the turns on the day that they are said."""
        turns = self.conversation.turns
        unknown, none = np.full(len(turns), np.nan), np.zeros(len(turns))
        felt = sentiments([turn.text for turn in turns])
        weights = np.tile(USUAL_WEIGHTS, (len(turns), 1))
        signals = scoring.Signals(none, none, none, none, unknown, felt, unknown, weights)
        scores: Sequence[float] = scoring.score(signals).score.tolist()
        return scores

    def _around(self, place: int, weights: Sequence[float]) -> list[tuple[int, list[int]]]:
        return [(far, self._said[one]) for far, one in self._places_around(place, len(weights) - 1)]

    def _places_around(self, place: int, reach: int) -> list[tuple[int, int]]:
        """Return how far away, and where, the turns are that are near in the same session."""
        first, last = max(place - reach, 0), min(place + reach, len(self._said) - 1)
        return [
            (abs(other - place), other)
            for other in range(first, last + 1)
            if self._session_of[other] == self._session_of[place]
        ]

    def _matched(self, documents: Sequence[Mapping[int, float]], setting: Setting) -> Amounts:
        """Return how much the words of each question weigh in each document."""
        lexicon = ranking.Lexicon.of(map(list, documents))
        speakers = {turn.speaker for turn in self.conversation.turns}
        names = {term for name in speakers for term in words.terms(name, _LANGUAGE)}
        amounts = np.zeros((len(self.conversation.questions), len(documents)))
        for row, question in enumerate(self.conversation.questions):
            query = ranking.query_weights(question.text, lexicon, _LANGUAGE)
            for name in names & query.keys():
                query[name] *= setting.names
            amounts[row] = [ranking.score(query, document) for document in documents]
        return amounts

    def _by_session(self, amounts: Amounts, setting: Setting) -> Amounts:
        """Return what each turn's session is worth: 0 to 1, 1 for the best session."""
        sessions = range(self._session_of.max() + 1)
        if setting.session_of == "whole":
            worth = self._matched([self._whole(session) for session in sessions], setting)
        else:
            brought = np.where(amounts >= _least(amounts, setting.candidates), amounts, 0)
            grouped = [brought[:, self._session_of == session] for session in sessions]
            worth = np.stack([group.sum(axis=1) for group in grouped], axis=1)
        shares: Amounts = worth[:, self._session_of] / np.maximum(
            worth.max(axis=1, keepdims=True), 1e-9
        )
        return shares

    def _whole(self, session: int) -> Mapping[int, float]:
        """Return BM25's weights of all that is said in a session, the usual one of usual length."""
        counts = Counter(
            term
            for place in np.flatnonzero(self._session_of == session)
            for term in self._said[place]
        )
        usual = sum(map(len, self._said)) / (self._session_of.max() + 1)
        norm = ranking.K1 * (1 - ranking.B + ranking.B * counts.total() / usual)
        return {term: n * (ranking.K1 + 1) / (n + norm) for term, n in counts.items()}


def judged(told: Told, setting: Setting, *, with_vectors: bool) -> list[Judgement]:
    """Rank the turns of a conversation for each of its questions, and judge that."""
    turns = told.conversation.turns
    by_words = told.by_words(setting)
    by_meaning = told.by_meaning(setting) if with_vectors else np.zeros_like(by_words)
    as_of = max(turn.said_at for turn in turns) if setting.is_asked_then else _TODAY
    candidate_of = [_candidate(told, place, setting) for place in range(len(turns))]
    judgements = []
    for row, question in enumerate(told.conversation.questions):
        found = _brought(by_words[row], setting.candidates)
        near = _brought(by_meaning[row], setting.candidates) if with_vectors else {}
        if not setting.has_floor:
            found, near = near.fromkeys(near, 0.0) | found, found.fromkeys(found, 0.0) | near
        order = rank(
            [candidate_of[place](amount) for place, amount in found.items()],
            [candidate_of[place](amount) for place, amount in near.items()],
            Asked(question.text, Filter(), as_of, limit=DEPTH),
            setting.weights,
            wanted=setting.candidates,
        )
        ids = [turns[one.id.int].id for _, one in order.places]
        judgements.append(judge(ids, question.evidence, told.sessions))
    return judgements


def _vectors(what: Sequence[Turn] | Sequence[Question]) -> Amounts:
    return np.array([one.vector for one in what], dtype=np.float64)


def _candidate(told: Told, place: int, setting: Setting) -> Callable[[float], Candidate]:
    turn = told.conversation.turns[place]
    one = Candidate(
        UUID(int=place),
        0.0,
        turn.speaker,
        turn.session,
        turn.said_at.timestamp(),
        told.scores[place] if setting.is_scored else None,
        len(turn.text.encode()),
    )
    return lambda amount: one._replace(amount=amount)


def _brought(amounts: npt.NDArray[np.float64], most: int) -> dict[int, float]:
    """Return what a leg brings of one question's amounts: the best, if they are more than 0."""
    best = np.argsort(-amounts, kind="stable")[:most]
    return {int(place): float(amounts[place]) for place in best if amounts[place] > 0}


def _least(amounts: Amounts, most: int) -> Amounts:
    """Return the amount of the last candidate of each question."""
    last = min(most, amounts.shape[1]) - 1
    least: Amounts = -np.sort(-amounts, axis=1)[:, last : last + 1]
    return least
