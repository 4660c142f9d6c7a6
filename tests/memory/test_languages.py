"""What every language brings: a stemmer that exists, and stop words that are sound."""

from __future__ import annotations

import pytest
import Stemmer

from server.memory import languages
from server.memory.languages import VOCABULARIES
from server.memory.words import words
from server.preferences import Language

NATURAL = [language for language in Language if language is not Language.SIMPLE]


def listed(language: Language) -> list[str]:
    """Return the stop words as they are written down, repeated ones included."""
    text: str = getattr(languages, f"_{language.name}")
    return text.split()


def test_every_language_that_can_be_chosen_has_a_vocabulary() -> None:
    assert set(VOCABULARIES) == set(Language)


def test_simple_neither_stems_nor_stops() -> None:
    assert VOCABULARIES[Language.SIMPLE] == languages.Vocabulary(None, frozenset(), frozenset())


@pytest.mark.parametrize("language", NATURAL)
def test_stemmers_exist(language: Language) -> None:
    assert VOCABULARIES[language].stemmer in Stemmer.algorithms()


@pytest.mark.parametrize("language", NATURAL)
def test_stop_words_are_lower_case_words_each_written_once(language: Language) -> None:
    stop_words = listed(language)
    assert 80 <= len(stop_words) <= 150
    assert len(set(stop_words)) == len(stop_words)
    for word in stop_words:
        assert words(word) == [word]
    assert VOCABULARIES[language].stop_words == set(stop_words)


@pytest.mark.parametrize("language", NATURAL)
def test_elisions_are_letters_that_stand_before_an_apostrophe(language: Language) -> None:
    for elision in VOCABULARIES[language].elisions:
        assert elision.isalpha()
        assert elision.islower()
        assert words(f"{elision}’ora") == [f"{elision}'ora"]


@pytest.mark.parametrize(
    ("language", "one", "many"),
    [
        (Language.ENGLISH, "boat", "boats"),
        (Language.ENGLISH, "city", "cities"),
        (Language.GERMAN, "hund", "hunde"),
        (Language.GERMAN, "katze", "katzen"),
        (Language.GERMAN, "haus", "häuser"),
        (Language.FRENCH, "bateau", "bateaux"),
        (Language.FRENCH, "amie", "amies"),
        (Language.SPANISH, "flor", "flores"),
        (Language.SPANISH, "libro", "libros"),
        (Language.ITALIAN, "gatto", "gatti"),
        (Language.ITALIAN, "casa", "case"),
        (Language.PORTUGUESE, "casa", "casas"),
        (Language.PORTUGUESE, "flor", "flores"),
    ],
)
def test_singular_and_plural_share_a_stem(language: Language, one: str, many: str) -> None:
    stemmer = Stemmer.Stemmer(VOCABULARIES[language].stemmer)
    assert stemmer.stemWord(one) == stemmer.stemWord(many)


@pytest.mark.parametrize(
    ("language", "question", "telling"),
    [
        (Language.ENGLISH, "What was the name of the boat?", "name boat"),
        (Language.GERMAN, "Wie heißt das Boot von meiner Schwester?", "heißt boot schwester"),
        (Language.FRENCH, "Où est la maison de ma sœur ?", "maison sœur"),
        (Language.SPANISH, "¿Cuándo nació el hijo de mi hermana?", "nació hijo hermana"),
        (Language.ITALIAN, "Dove è la casa di mia sorella?", "casa sorella"),
        (Language.PORTUGUESE, "Quando é que a minha irmã foi a Lisboa?", "irmã lisboa"),
    ],
)
def test_a_question_keeps_the_words_that_tell_something(
    language: Language, question: str, telling: str
) -> None:
    stop_words = VOCABULARIES[language].stop_words
    assert [word for word in words(question) if word not in stop_words] == telling.split()
