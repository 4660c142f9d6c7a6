"""From what the legs of a query found to one answer: weights, bounds, reasons."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from uuid import UUID

from server.memory.model import Found, Memory, Near
from server.memory.questions import Question
from server.memory.words import stems, telling_words, words
from server.preferences import RetrievalWeights

Parts = tuple[float, float, float, float, float]
"""Score, lexical, semantic, score of the memory, freshness."""

_BYTES_PER_TOKEN = 4
_WORDS_IN_REASON = 5


@dataclass(frozen=True, slots=True)
class Weights:
    """What counts how much in the order of an answer."""

    semantic: float = 0.5
    """Share of the meaning; the words have the rest. Without vectors they have all of it."""
    named_speaker: float = 0.2
    """For a turn of someone whom the question names."""
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
    reason: str


@dataclass(frozen=True, slots=True)
class Leg:
    """How well memories answer, as one leg measures it."""

    amounts: Mapping[UUID, float]
    floor: float
    """What a memory is taken to have that the leg did not bring."""
    best: float

    @classmethod
    def of_words(cls, found: Sequence[Found], wanted: int) -> "Leg":
        """Return the lexical leg: what it leaves out of a short list has no word of the query."""
        amounts = {one.memory.id: one.lexical for one in found}
        floor = min(amounts.values()) if len(amounts) >= wanted else 0.0
        return cls(amounts, floor, max(amounts.values(), default=0.0))

    @classmethod
    def of_meaning(cls, near: Sequence[Near]) -> "Leg":
        """Return the semantic leg.

        What it leaves out has no vector, or is at most as near as the last that it brought. To
        count it as 0 would put it far below that one, and cost 3 points of recall@10.
        """
        amounts = {one.memory.id: one.similarity for one in near}
        return cls(amounts, min(amounts.values(), default=0.0), max(amounts.values(), default=0.0))

    def amount(self, memory_id: UUID) -> float:
        """Return how well a memory answers."""
        return self.amounts.get(memory_id, self.floor)

    def share(self, memory_id: UUID) -> float:
        """Return how well a memory answers, relative to the best: 0 to 1."""
        return max(self.amount(memory_id), 0.0) / self.best if self.best > 0 else 0.0


def fuse(
    found: Sequence[Found],
    near: Sequence[Near],
    question: Question,
    weights: Weights,
    *,
    wanted: int,
) -> list[Match]:
    """Order what the legs found, best first, within the bounds of the question.

    Args:
        found: What the words brought.
        near: What the meaning brought.
        question: The question.
        weights: What counts how much.
        wanted: How many memories the words were asked for.
    """
    by_words, by_meaning = Leg.of_words(found, wanted), Leg.of_meaning(near)
    memories = {one.memory.id: one.memory for one in found}
    memories |= {one.memory.id: one.memory for one in near}
    names = set(words(question.text))
    # No object for each of them: most are not in the answer.
    scored = [
        (_parts(memory, by_words, by_meaning, names, question.as_of, weights), memory)
        for memory in memories.values()
        if memory.expires_at is None or memory.expires_at > question.as_of
    ]
    # Below 0, cosines still tell apart what shares cannot.
    scored.sort(key=lambda one: (-one[0][0], -by_meaning.amount(one[1].id), one[1].id))
    asked = dict(zip(stems(question.text), telling_words(question.text), strict=True))
    return [
        Match(memory, *parts, reason=_reason(memory, asked, by_words, by_meaning))
        for parts, memory in _bounded(scored, question)
    ]


def token_count(text: str) -> int:
    """Estimate the tokens of a text: one for every four bytes of UTF-8, rounded up."""
    return -(-len(text.encode()) // _BYTES_PER_TOKEN)


def _parts(
    memory: Memory,
    by_words: Leg,
    by_meaning: Leg,
    names: set[str],
    as_of: datetime,
    weights: Weights,
) -> Parts:
    lexical, semantic = by_words.share(memory.id), by_meaning.share(memory.id)
    share = weights.semantic if by_meaning.amounts else 0.0
    worth = weights.unscored if memory.score is None else memory.score.value
    half_lives = (as_of - memory.occurred_at) / weights.half_life
    freshness = 0.5**half_lives if half_lives > 0 else 1.0
    is_named = not names.isdisjoint(words(memory.speaker))
    score = (
        share * semantic
        + (1 - share) * lexical
        + weights.named_speaker * is_named
        + weights.memory_score * worth
        + weights.freshness * freshness
    )
    return score, lexical, semantic, worth, freshness


def _bounded(
    scored: Iterable[tuple[Parts, Memory]], question: Question
) -> Iterator[tuple[Parts, Memory]]:
    tokens_left = question.max_tokens
    left = question.limit
    said: Counter[str] = Counter()
    for parts, memory in scored:
        if left == 0 or parts[0] < question.min_score:
            return
        if memory.session_id and said[memory.session_id] == question.max_per_session:
            continue
        if tokens_left is not None:
            tokens = token_count(memory.content)
            if tokens > tokens_left:
                continue
            tokens_left -= tokens
        said[memory.session_id] += 1
        left -= 1
        yield parts, memory


def _reason(memory: Memory, asked: Mapping[str, str], by_words: Leg, by_meaning: Leg) -> str:
    said = set(stems(memory.content))
    shared = [word for stem, word in asked.items() if stem in said][:_WORDS_IN_REASON]
    reasons = []
    if shared:
        reasons.append(f"shares {', '.join(shared)}")
    elif memory.id in by_words.amounts:
        reasons.append("was said next to turns that share words with the query")
    if memory.id in by_meaning.amounts:
        reasons.append("is close in meaning")
    return " and ".join(reasons)
