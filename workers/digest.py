"""The most telling sentences of a text of any length, in memory that does not grow with it.

Extractive: nothing is said that is not in the text. A sentence is a vector of its words, each as
often as it occurs times how rare it is among the sentences (TF-IDF); it tells the more, the nearer
it is to the sum of all sentences, the centroid (Radev et al., "Centroid-based summarization of
multiple documents", 2004). Of sentences that say the same, one is chosen: what is like the chosen
ones counts less (maximal marginal relevance, Carbonell and Goldstein, 1998).

Words are counted under a hash, so that however many there are, two arrays hold them. Of the
sentences a bounded number is kept: when there are more, the half goes that tells less so far. Up
to that number the choice is exact, and it is always the same for the same text.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

MOST_KEPT: Final = 2000
"""Sentences that wait to be chosen."""
LONGEST: Final = 1000
"""Characters of a sentence; what is longer is cut into several."""

_SLOTS: Final = 1 << 15
_FEWEST_WORDS: Final = 4
"""Shorter ones are greetings and nods; they are chosen only where there is nothing else."""
_NOVELTY: Final = 0.6
_END: Final = re.compile(r"(?<=[.!?…。])\s+|(?<=[.!?…。][\"'»”’)])\s+|\n+")
"""White space behind the end of a sentence, or of one that is quoted; and the end of a line."""
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, and where it stands."""

    place: int
    text: str
    is_sensitive: bool


@dataclass(frozen=True, slots=True)
class _Kept:
    sentence: Sentence
    slots: npt.NDArray[np.int64]
    counts: Floats


def sentences_of(text: str) -> list[str]:
    """Return the sentences of a text, without the white space around them."""
    parts = (part.strip() for part in _END.split(text))
    return [
        part[start : start + LONGEST] for part in parts for start in range(0, len(part), LONGEST)
    ]


class Digest:
    """Takes text in, in its order, and chooses from it in the end."""

    def __init__(self, most_kept: int = MOST_KEPT) -> None:
        self._most_kept = most_kept
        self._kept: list[_Kept] = []
        self._short: list[Sentence] = []
        self._frequencies: Floats = np.zeros(_SLOTS)
        """In how many sentences a word occurs."""
        self._totals: Floats = np.zeros(_SLOTS)
        """How often it occurs in all."""
        self._seen = 0
        self._place = 0

    def add(self, text: str, *, is_sensitive: bool = False) -> None:
        """Take in some more text."""
        for found in sentences_of(text):
            sentence = Sentence(self._place, found, is_sensitive)
            self._place += 1
            self._take(sentence)

    def choose(self, how_many: int) -> list[Sentence]:
        """Return the sentences that tell most, in the order of the text."""
        if not self._kept:
            return self._short[:how_many]
        chosen = _choose(self._kept, self._weights(), self._totals, how_many)
        return sorted((each.sentence for each in chosen), key=lambda sentence: sentence.place)

    def _take(self, sentence: Sentence) -> None:
        words = _WORD.findall(sentence.text.casefold())
        if len(words) < _FEWEST_WORDS:
            if len(self._short) < self._most_kept:
                self._short.append(sentence)
            return
        kept = _Kept(sentence, *_counted(words))
        self._frequencies[kept.slots] += 1
        self._totals[kept.slots] += kept.counts
        self._seen += 1
        self._kept.append(kept)
        if len(self._kept) > self._most_kept:
            self._halve()

    def _halve(self) -> None:
        worth = _worth(self._kept, self._weights(), self._totals)
        best = np.argsort(-worth, kind="stable")[: self._most_kept // 2]
        self._kept = [self._kept[place] for place in sorted(best.tolist())]

    def _weights(self) -> Floats:
        """Return how rare each word is (smoothed inverse document frequency)."""
        weights: Floats = np.log((1 + self._seen) / (1 + self._frequencies)) + 1
        return weights


def _counted(words: Iterable[str]) -> tuple[npt.NDArray[np.int64], Floats]:
    # Not hash(): that of another process is another one.
    counts = Counter(zlib.crc32(word.encode()) % _SLOTS for word in words)
    slots = np.fromiter(counts.keys(), np.int64, len(counts))
    return slots, np.fromiter(counts.values(), np.float64, len(counts))


def _worth(kept: Sequence[_Kept], weights: Floats, totals: Floats) -> Floats:
    """Return how near each sentence is to the centroid: their cosine, 0 to 1."""
    centroid = totals * weights
    length = np.linalg.norm(centroid)
    vectors = [each.counts * weights[each.slots] for each in kept]
    return np.array(
        [
            vector @ centroid[each.slots] / (np.linalg.norm(vector) * length)
            for vector, each in zip(vectors, kept, strict=True)
        ]
    )


def _choose(kept: Sequence[_Kept], weights: Floats, totals: Floats, how_many: int) -> list[_Kept]:
    worth = _worth(kept, weights, totals)
    likeness: Floats = np.zeros(len(kept))
    open_: npt.NDArray[Any] = np.ones(len(kept), dtype=bool)
    chosen: list[_Kept] = []
    for _ in range(min(how_many, len(kept))):
        value = np.where(open_, _NOVELTY * worth - (1 - _NOVELTY) * likeness, -np.inf)
        place = int(np.argmax(value))
        open_[place] = False
        chosen.append(kept[place])
        likeness = np.maximum(likeness, _alike(kept[place], kept, weights))
    return chosen


def _alike(one: _Kept, kept: Sequence[_Kept], weights: Floats) -> Floats:
    """Return the cosine of one sentence with each."""
    vector: Floats = np.zeros(_SLOTS)
    vector[one.slots] = one.counts * weights[one.slots]
    vector /= np.linalg.norm(vector)
    found = np.zeros(len(kept))
    for place, each in enumerate(kept):
        other = each.counts * weights[each.slots]
        found[place] = other @ vector[each.slots] / np.linalg.norm(other)
    return found
