"""From text to terms: words, without the ones that say nothing, reduced to their stems."""

import re
import zlib
from collections import Counter

import Stemmer

DIMENSIONS = 1_000_000_000
"""Size of the space that stems are hashed into: the largest that pgvector's sparsevec has."""

_LONGEST_WORD = 64
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP_WORDS = frozenset(
    """
    a about above after again against all am an and any are as at be because been before being
    below between both but by can could did do does doing down during each few for from further
    had has have having he her here hers herself him himself his how i if in into is it its
    itself just me more most my myself no nor not now of off on once only or other our ours
    ourselves out over own same she should so some such than that the their theirs them
    themselves then there these they this those through to too under until up very was we were
    what when where which while who whom why will with would you your yours yourself yourselves
    i'm i've i'd i'll don't didn't doesn't isn't wasn't can't you're we're they're
    let won't couldn't wouldn't shouldn't
    """.split()  # noqa: SIM905 - words read better without quotes
)
_stemmer = Stemmer.Stemmer("english")


def words(text: str) -> list[str]:
    """Return the words of a text in order, in lower case."""
    return [word.replace("’", "'").removesuffix("'s") for word in _WORD.findall(text.lower())]


def telling_words(text: str) -> list[str]:
    """Return the words of a text in order, without those that say nothing."""
    return [word[:_LONGEST_WORD] for word in words(text) if word not in _STOP_WORDS]


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
