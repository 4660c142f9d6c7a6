"""From text to terms: words, without the ones that say nothing, reduced to their stems."""

import re
import zlib
from collections import Counter

import Stemmer

from server.memory.languages import VOCABULARIES
from server.preferences import Language

DIMENSIONS = 1_000_000_000
"""Size of the space that stems are hashed into: the largest that pgvector's sparsevec has."""

_LONGEST_WORD = 64
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_ENGLISH = VOCABULARIES[Language.ENGLISH]
_stemmer = Stemmer.Stemmer(_ENGLISH.stemmer)


def words(text: str) -> list[str]:
    """Return the words of a text in order, in lower case."""
    return [word.replace("’", "'").removesuffix("'s") for word in _WORD.findall(text.lower())]


def telling_words(text: str) -> list[str]:
    """Return the words of a text in order, without those that say nothing."""
    return [word[:_LONGEST_WORD] for word in words(text) if word not in _ENGLISH.stop_words]


def stems(text: str) -> list[str]:
    """Return the stems of the telling words of a text, in order."""
    stemmed: list[str] = _stemmer.stemWords(telling_words(text))
    return stemmed


def term_id(stem: str) -> int:
    """Return the dimension of a stem, 0 to DIMENSIONS - 1. Collisions are rarer than typos."""
    return zlib.crc32(stem.encode()) % DIMENSIONS


def term_counts(text: str) -> Counter[int]:
    """Return how often each term occurs in a text."""
    return Counter(map(term_id, stems(text)))
