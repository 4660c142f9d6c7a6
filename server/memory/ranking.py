"""BM25: how much the words of a query weigh in a memory.

score(q, d) = Σ_t idf(t) · w(t, d)   (Robertson & Zaragoza 2009, "The Probabilistic Relevance
Framework: BM25 and Beyond", equation 3.15), split so that the database can do the sum:

* w(t, d), the saturated and length-normalised frequency, is stored with the memory;
* idf(t) comes from a sample of the user's memories, when they ask.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from server.memory.words import term_counts

K1 = 1.2
B = 0.75
USUAL_LENGTH = 12
"""Terms of a usual memory. A constant: weights that are stored cannot follow a mean that moves."""

MOST_TERMS = 1_000
"""How many terms of one memory are indexed; pgvector takes 16 000."""


def weights(text: str) -> dict[int, float]:
    """Return w(t, d) for every term of a text: {term id: weight}, weights in 0..2.2."""
    counts = term_counts(text)
    norm = K1 * (1 - B + B * counts.total() / USUAL_LENGTH)
    heaviest = counts.most_common(MOST_TERMS)
    return {term: count * (K1 + 1) / (count + norm) for term, count in heaviest}


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


def query_weights(text: str, lexicon: Lexicon) -> dict[int, float]:
    """Return idf(t) for every term of a query, times how often the query names it."""
    heaviest = term_counts(text).most_common(MOST_TERMS)
    return {term: count * lexicon.idf(term) for term, count in heaviest}


def score(query: Mapping[int, float], document: Mapping[int, float]) -> float:
    """Return Σ_t idf(t) · w(t, d)."""
    return sum(weight * document.get(term, 0.0) for term, weight in query.items())
