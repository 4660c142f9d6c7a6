"""BM25 over memories in their conversation: how much the words of a query weigh in a memory.

score(q, d) = Σ_t idf(t) · w(t, d)   (Robertson & Zaragoza 2009, "The Probabilistic Relevance
Framework: BM25 and Beyond", equation 3.15), split so that the database can do the sum:

* w(t, d), the saturated and length-normalised frequency, is stored with the memory;
* idf(t) comes from a sample of the user's memories, when they ask.

A turn of a conversation is matched together with the turns around it: the answer to a question
often has none of its words, but stands next to a turn that has them.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import nlargest
from operator import itemgetter

from server.memory import words
from server.preferences import Language

K1 = 0.9
B = 0.4
"""K1 and B are Anserini's defaults for BM25, which carry over between collections."""

NEIGHBOURHOOD = (2.0, 1.0, 0.5)
"""What a term counts in the memory itself, in the turns next to it, in the ones after those."""

USUAL_LENGTH = 35
"""Weighted terms of a usual turn with its neighbours. A constant: weights that are stored cannot
follow a mean that moves."""

MOST_TERMS = 1_000
"""How many terms of one memory are indexed; pgvector takes 16 000."""


def weights(
    text: str,
    neighbours: Iterable[tuple[int, str]] = (),
    language: Language = Language.ENGLISH,
) -> dict[int, float]:
    """Return w(t, d) for every term: {term id: weight}, weights in 0..K1 + 1.

    Args:
        text: The memory.
        neighbours: Turns of the same conversation: how many places away, and the text. Those
            beyond the neighbourhood do not count.
        language: What all of them are written in.
    """
    return blend(
        (distance, words.terms(said, language)) for distance, said in ((0, text), *neighbours)
    )


def blend(
    said: Iterable[tuple[int, Iterable[int]]], neighbourhood: Sequence[float] = NEIGHBOURHOOD
) -> dict[int, float]:
    """Return `weights` of texts whose terms are known: how many places away, and the terms."""
    counts: dict[int, float] = {}
    for distance, named in said:
        if distance < len(neighbourhood):
            each = neighbourhood[distance]
            for term in named:
                counts[term] = counts.get(term, 0.0) + each
    norm = K1 * (1 - B + B * sum(counts.values()) / USUAL_LENGTH)
    if len(counts) > MOST_TERMS:
        counts = dict(nlargest(MOST_TERMS, counts.items(), key=itemgetter(1)))
    return {term: count * (K1 + 1) / (count + norm) for term, count in counts.items()}


@dataclass(frozen=True, slots=True)
class Lexicon:
    """In how many of a user's memories each term occurs."""

    documents: int = 0
    frequencies: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, documents: Iterable[Iterable[int]]) -> "Lexicon":
        """Count the terms of documents that are given as sets of term ids."""
        frequencies: Counter[int] = Counter()
        size = 0
        for terms in documents:
            frequencies.update(terms)
            size += 1
        return cls(size, frequencies)

    def idf(self, term: int) -> float:
        """Return ln(1 + (N - n + ½) / (n + ½)), which is never negative."""
        occurrences = self.frequencies.get(term, 0)
        return math.log1p((self.documents - occurrences + 0.5) / (occurrences + 0.5))


def query_weights(text: str, lexicon: Lexicon, language: Language) -> dict[int, float]:
    """Return idf(t) for every term of a query, times how often the query names it."""
    heaviest = words.term_counts(text, language).most_common(MOST_TERMS)
    return {term: count * lexicon.idf(term) for term, count in heaviest}


def score(query: Mapping[int, float], document: Mapping[int, float]) -> float:
    """Return Σ_t idf(t) · w(t, d)."""
    return sum(weight * document.get(term, 0.0) for term, weight in query.items())
