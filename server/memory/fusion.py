"""From what the legs of a query found to one answer: weights, bounds, reasons."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from uuid import UUID

from server.memory.model import Candidate, Found, Memory
from server.memory.questions import Question
from server.memory.words import telling_words, terms, words
from server.preferences import Language, RetrievalWeights

Parts = tuple[float, float, float, float, float, float, float]
"""Score, lexical, semantic, score of the memory, freshness, speaker, session."""

_BYTES_PER_TOKEN = 4
_WORDS_IN_REASON = 5


@dataclass(frozen=True, slots=True)
class Weights:
    """What counts how much in the order of an answer."""

    semantic: float = 0.5
    """Share of the meaning; the words have the rest. Without vectors they have all of it."""
    named_speaker: float = 0.3
    """For a turn of someone whom the question names."""
    session: float = 0.1
    """For the best match of the same session, by words and meaning."""
    memory_score: float = 0.05
    unscored: float = 0.5
    """Score of a memory before its first meditation."""
    freshness: float = 0.05
    half_life: timedelta = timedelta(days=30)
    """Time in which half of the freshness goes."""

    def changed_by(self, chosen: RetrievalWeights) -> "Weights":
        """Return these weights with those that a user chose in their place."""
        return replace(
            self,
            semantic=self.semantic if chosen.semantic is None else chosen.semantic,
            named_speaker=self.named_speaker if chosen.speaker is None else chosen.speaker,
            session=self.session if chosen.session is None else chosen.session,
            memory_score=self.memory_score if chosen.memory_score is None else chosen.memory_score,
            freshness=self.freshness if chosen.freshness is None else chosen.freshness,
        )


@dataclass(frozen=True, slots=True)
class Match:
    """A memory that answers a query, with what brought it here."""

    memory: Memory
    score: float
    lexical: float
    """BM25 relative to the best match of this answer, 0 to 1."""
    semantic: float
    """Mean cosine relative to the best match of this answer, 0 to 1."""
    memory_score: float
    """0 to 1."""
    freshness: float
    """1 for what occurs now, half as much with every half-life since."""
    speaker: float
    """1 for a turn of someone whom the question names, else 0."""
    session: float
    """What the best match of its session has by words and meaning, 0 to 1; of none, its own."""
    reason: str


@dataclass(frozen=True, slots=True)
class Leg:
    """How well memories answer, as one leg measures it."""

    amounts: Mapping[UUID, float]
    floor: float
    """What a memory is taken to have that the leg did not bring."""

    @classmethod
    def of_words(cls, found: Sequence[Candidate], wanted: int) -> "Leg":
        """Return the lexical leg: what it leaves out of a short list has no word of the query."""
        amounts = {one.id: one.amount for one in found}
        return cls(amounts, min(amounts.values()) if len(amounts) >= wanted else 0.0)

    @classmethod
    def of_meaning(cls, near: Sequence[Candidate]) -> "Leg":
        """Return the semantic leg.

        What it leaves out has no vector, or is at most as near as the last that it brought. To
        count it as 0 would put it far below that one, and cost 3 points of recall@10.
        """
        amounts = {one.id: one.amount for one in near}
        return cls(amounts, min(amounts.values(), default=0.0))

    def amount(self, memory_id: UUID) -> float:
        """Return how well a memory answers."""
        return self.amounts.get(memory_id, self.floor)

    def shares(self, memory_ids: Iterable[UUID]) -> list[float]:
        """Return how well memories answer, relative to the best: 0 to 1."""
        best = max(self.amounts.values(), default=0.0)
        if best <= 0:
            return [0.0 for _ in memory_ids]
        return [max(self.amount(memory_id), 0.0) / best for memory_id in memory_ids]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The candidates that an answer holds, best first, and the legs that brought them."""

    places: Sequence[tuple[Parts, Candidate]]
    by_words: Leg
    by_meaning: Leg


def rank(
    found: Sequence[Candidate],
    near: Sequence[Candidate],
    question: Question,
    weights: Weights,
    *,
    wanted: int,
) -> Ranking:
    """Order what the legs found, best first, within the bounds of the question.

    Args:
        found: What the words brought.
        near: What the meaning brought.
        question: The question.
        weights: What counts how much.
        wanted: How many memories the words were asked for.
    """
    by_words, by_meaning = Leg.of_words(found, wanted), Leg.of_meaning(near)
    candidates = {one.id: one for one in (*found, *near)}
    shares = zip(by_words.shares(candidates), by_meaning.shares(candidates), strict=True)
    priors = _Priors(question, weights)
    share = weights.semantic if near else 0.0
    matched = [
        (one, lexical, semantic, share * semantic + (1 - share) * lexical)
        for one, (lexical, semantic) in zip(candidates.values(), shares, strict=True)
    ]
    best = _best_of_sessions(matched)
    scored = []
    for one, lexical, semantic, match in matched:
        worth, freshness = priors.worth(one), priors.freshness(one)
        speaker = float(priors.is_named(one.speaker))
        session = best.get(one.session_id, match)
        score = (
            match
            + weights.named_speaker * speaker
            + weights.session * session
            + weights.memory_score * worth
            + weights.freshness * freshness
        )
        scored.append(((score, lexical, semantic, worth, freshness, speaker, session), one))
    # Below 0, cosines still tell apart what shares cannot.
    scored.sort(key=lambda place: (-place[0][0], -by_meaning.amount(place[1].id), place[1].id))
    return Ranking(list(_bounded(scored, question)), by_words, by_meaning)


def explain(
    ranking: Ranking, memories: Mapping[UUID, Memory], question: Question, language: Language
) -> list[Match]:
    """Return the answer, each memory with what brought it here.

    Args:
        ranking: The order of the answer.
        memories: Those that are still there.
        question: The question.
        language: What question and memories are written in.
    """
    telling = telling_words(question.text, language)
    asked = dict(zip(terms(question.text, language), telling, strict=True))
    return [
        Match(memory, *parts, reason=_reason(memory, parts, asked, language, ranking))
        for parts, one in ranking.places
        if (memory := memories.get(one.id))
    ]


def candidate_of(found: Found) -> Candidate:
    """Return what counts of a memory that came with its text."""
    memory = found.memory
    return Candidate(
        id=memory.id,
        amount=found.lexical,
        speaker=memory.speaker,
        session_id=memory.session_id,
        occurred_at=memory.occurred_at.timestamp(),
        score=None if memory.score is None else memory.score.value,
        text_bytes=len(memory.content.encode()),
    )


class _Priors:
    """What counts in the order of an answer besides words and meaning."""

    def __init__(self, question: Question, weights: Weights) -> None:
        self._unscored = weights.unscored
        self._as_of = question.as_of.timestamp()
        self._half_life = weights.half_life.total_seconds()
        self._names = set(words(question.text))
        self._named = {"": False}

    def worth(self, one: Candidate) -> float:
        """Return the score of a memory."""
        return self._unscored if one.score is None else one.score

    def freshness(self, one: Candidate) -> float:
        """Return 1 for what occurs now, half as much with every half-life since."""
        half_lives = (self._as_of - one.occurred_at) / self._half_life
        return 0.5**half_lives if half_lives > 0 else 1.0

    def is_named(self, speaker: str) -> bool:
        """Tell whether the question names a speaker. They are few, and said much."""
        named = self._named.get(speaker)
        if named is None:
            named = self._named[speaker] = not self._names.isdisjoint(words(speaker))
        return named


def _best_of_sessions(matched: Iterable[tuple[Candidate, float, float, float]]) -> dict[str, float]:
    """Return how well the best of each session answers; what is of none stands for itself."""
    best: dict[str, float] = {}
    for one, _, _, match in matched:
        if one.session_id and match > best.get(one.session_id, 0.0):
            best[one.session_id] = match
    return best


def _bounded(
    scored: Iterable[tuple[Parts, Candidate]], question: Question
) -> Iterator[tuple[Parts, Candidate]]:
    tokens_left = question.max_tokens
    left = question.limit
    said: Counter[str] = Counter()
    for parts, one in scored:
        if left == 0 or parts[0] < question.min_score:
            return
        if one.session_id and said[one.session_id] == question.max_per_session:
            continue
        if tokens_left is not None:
            tokens = -(-one.text_bytes // _BYTES_PER_TOKEN)
            if tokens > tokens_left:
                continue
            tokens_left -= tokens
        said[one.session_id] += 1
        left -= 1
        yield parts, one


def _reason(
    memory: Memory, parts: Parts, asked: Mapping[int, str], language: Language, ranking: Ranking
) -> str:
    *_, speaker, _ = parts
    said = set(terms(memory.content, language))
    shared = [word for term, word in asked.items() if term in said][:_WORDS_IN_REASON]
    reasons = []
    if shared:
        reasons.append(f"shares {', '.join(shared)}")
    elif memory.id in ranking.by_words.amounts:
        reasons.append("was said next to turns that share words with the query")
    if speaker:
        reasons.append(f"was said by {memory.speaker}")
    if memory.id in ranking.by_meaning.amounts:
        reasons.append("is close in meaning")
    return ", ".join((*reasons[:-2], " and ".join(reasons[-2:])))
