"""From text to terms: words, without the ones that say nothing, reduced to their stems.

What a word is does not depend on the language; which ones say nothing and what their stems are
does. Words are compared in Unicode's form NFKC and folded case: a letter with its accent is the
same in one code point or two, and so are STRASSE and Straße, full-width and plain letters.

Han, kana, Thai, Lao, Burmese and Khmer put no space between words. A run of them stands for every
two neighbours in it, and each Han character for itself too: a word of any length is found in the
sentence that it stands in. An emoji is a word.
"""

import re
import unicodedata
import zlib
from collections import Counter
from itertools import chain
from typing import Final

import Stemmer

from server.memory.languages import VOCABULARIES
from server.preferences import Language

DIMENSIONS = 1_000_000_000
"""Size of the space that stems are hashed into: the largest that pgvector's sparsevec has."""

_LONGEST_WORD = 64
_REMEMBERED = 1 << 15
"""Words of each language whose terms are remembered: some megabytes."""

_HAN: Final = r"\u3005\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA: Final = r"\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_THAI_LAO: Final = r"\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ebd\u0ec0-\u0ece"
_BURMESE_KHMER: Final = r"\u1000-\u103f\u1050-\u108f\u1780-\u17d3"
_UNSPACED: Final = _HAN + _KANA + _THAI_LAO + _BURMESE_KHMER
_EMOJI: Final = r"\u2600-\u27bf\U0001f1e6-\U0001f1ff\U0001f300-\U0001f3fa\U0001f400-\U0001faff"
# Python's \w leaves out accents that stand apart from their letter, and vowel signs. They end
# where the variation selectors start, which belong to emoji.
_MARKS: Final = "".join(
    mark for mark in map(chr, range(0x300, 0xFE00)) if unicodedata.category(mark).startswith("M")
)
_LETTERS: Final = rf"[^\W_{_UNSPACED}]+(?:[{_MARKS}]+[^\W_{_UNSPACED}]*)*"
_WORD = re.compile(rf"{_LETTERS}(?:['’]{_LETTERS})*|[{_UNSPACED}]+|[{_EMOJI}]")
# The same for ASCII alone, in a third of the time.
_PLAIN_WORD = re.compile(r"[a-z0-9]+(?:'[a-z0-9]+)*")
_RUN = re.compile(rf"[{_UNSPACED}]+")
_ONE_HAN = re.compile(f"[{_HAN}]")

# A stemmer is not for several threads; all of ours are used on the event loop.
_STEMMERS: Final = {
    language: Stemmer.Stemmer(vocabulary.stemmer)
    for language, vocabulary in VOCABULARIES.items()
    if vocabulary.stemmer
}


def words(text: str) -> list[str]:
    """Return the words of a text in order, in lower case; of a run, its pairs."""
    found: list[str] = []
    for word in _written(text):
        found += _pairs(word) if _is_run(word) else (word,)
    return found


def telling_words(text: str, language: Language) -> list[str]:
    """Return the words of a text in order, without those that say nothing."""
    vocabulary = VOCABULARIES[language]
    telling: list[str] = []
    for word in _written(text):
        if _is_run(word):
            telling += _pairs(word)
            telling += _ONE_HAN.findall(word) if len(word) > 1 else ()
            continue
        bare = _unelided(word, vocabulary.elisions) if "'" in word else word
        if bare not in vocabulary.stop_words:
            telling.append(bare[:_LONGEST_WORD])
    return telling


def stems(text: str, language: Language) -> list[str]:
    """Return the stems of the telling words of a text, in order."""
    folded = [word.casefold() for word in telling_words(text, language)]
    if language not in _STEMMERS:
        return folded
    stemmed: list[str] = _STEMMERS[language].stemWords(folded)
    return stemmed


def term_id(stem: str) -> int:
    """Return the dimension of a stem, 0 to DIMENSIONS - 1. Collisions are rarer than typos."""
    return zlib.crc32(stem.encode()) % DIMENSIONS


def terms(text: str, language: Language) -> list[int]:
    """Return the terms of a text, in order: the dimensions of its stems."""
    return list(chain.from_iterable(map(_TERMS_OF[language].__getitem__, _as_written(text))))


def term_counts(text: str, language: Language) -> Counter[int]:
    """Return how often each term occurs in a text."""
    return Counter(terms(text, language))


class _Terms(dict[str, tuple[int, ...]]):
    """The terms of words and runs as they stand in a text, in lower case.

    Most of what people write are words that were written before: those cost one look.
    """

    def __init__(self, language: Language) -> None:
        super().__init__()
        self._language = language
        self._stop_words = VOCABULARIES[language].stop_words
        self._stemmer = _STEMMERS.get(language)

    def __missing__(self, written: str) -> tuple[int, ...]:
        if len(self) >= _REMEMBERED:
            self.clear()
        is_plain = written.isascii() and "'" not in written
        found = self._of_a_word(written) if is_plain else self._of_any(written)
        self[written] = found
        return found

    def _of_any(self, written: str) -> tuple[int, ...]:
        return tuple(map(term_id, stems(written, self._language)))

    def _of_a_word(self, written: str) -> tuple[int, ...]:
        """Return the same for what is one ASCII word, in a third of the time."""
        if written in self._stop_words:
            return ()
        bare = written[:_LONGEST_WORD]
        return (term_id(self._stemmer.stemWord(bare) if self._stemmer else bare),)


_TERMS_OF: Final = {language: _Terms(language) for language in Language}


def _as_written(text: str) -> list[str]:
    """Return words and runs as they are written, in lower case."""
    return (_PLAIN_WORD if text.isascii() else _WORD).findall(text.lower())


def _written(text: str) -> list[str]:
    """Return words and runs in lower case, of one form and without 's."""
    found = _as_written(text)
    if not text.isascii():
        found = [unicodedata.normalize("NFKC", word.replace("’", "'")) for word in found]
    return [word.removesuffix("'s") for word in found]


def _is_run(word: str) -> bool:
    return not word.isascii() and _RUN.match(word) is not None


def _pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(len(run) - 1)] or [run]


def _unelided(word: str, elisions: frozenset[str]) -> str:
    elided, _, rest = word.partition("'")
    return rest if elided in elisions else word
