"""Which texts share terms, in every language: stems, empty words, elisions, scripts, Unicode."""

from __future__ import annotations

import unicodedata

import pytest

from server.memory.ranking import MOST_TERMS, Lexicon, query_weights, score, weights
from server.memory.words import stems, telling_words, term_counts, words
from server.preferences import Language

LEXICON = Lexicon(10)


def finds(query: str, text: str, language: Language) -> bool:
    """Tell whether a query shares a term with a memory."""
    asked = query_weights(query, LEXICON, language)
    return score(asked, weights(text, language=language)) > 0


# --- stems


@pytest.mark.parametrize(
    ("language", "query", "text"),
    [
        (Language.ENGLISH, "boat", "Three boats lay in the harbour."),
        (Language.ENGLISH, "SAILED", "We like sailing."),
        (Language.GERMAN, "Haus", "Die Häuser am Fluss sind bunt."),
        (Language.GERMAN, "Strassen", "In dieser Straße wohnt sie."),
        (Language.GERMAN, "Mueller", "Frau Müller rief an."),
        (Language.GERMAN, "fröhlich", "Ein fröhliches Fest."),
        (Language.FRENCH, "cheval", "Les chevaux dorment."),
        (Language.FRENCH, "amie", "Toutes mes amies viennent."),
        (Language.SPANISH, "corazón", "Dos corazones rotos."),
        (Language.SPANISH, "niño", "Los niños juegan."),
        (Language.ITALIAN, "gatto", "I gatti neri."),
        (Language.ITALIAN, "parlare", "Parlava sempre di te."),
        (Language.PORTUGUESE, "casa", "As casas brancas."),
        (Language.PORTUGUESE, "livros", "Um livro antigo."),
        (Language.SIMPLE, "BOATS", "Three boats lay in the harbour."),
    ],
)
def test_a_word_is_found_in_its_other_forms(language: Language, query: str, text: str) -> None:
    assert finds(query, text, language)


@pytest.mark.parametrize(
    ("language", "query", "text"),
    [
        (Language.ENGLISH, "Haus", "Die Häuser am Fluss sind bunt."),
        (Language.GERMAN, "city", "The cities are far."),
        (Language.SIMPLE, "boat", "Three boats lay in the harbour."),
    ],
)
def test_stems_are_those_of_the_language(language: Language, query: str, text: str) -> None:
    assert not finds(query, text, language)


# --- words that say nothing


@pytest.mark.parametrize(
    ("language", "empty", "elsewhere"),
    [
        (Language.ENGLISH, "and what was it that they did", Language.GERMAN),
        (Language.GERMAN, "und wer war nicht bei mir", Language.ENGLISH),
        (Language.FRENCH, "qu'il n'est pas avec nous", Language.ENGLISH),
        (Language.SPANISH, "¿quién está con ellos?", Language.ENGLISH),
        (Language.ITALIAN, "c'è chi non lo ha", Language.ENGLISH),
        (Language.PORTUGUESE, "quem não está com você", Language.ENGLISH),
    ],
)
def test_words_that_say_nothing_in_a_language_tell_in_another(
    language: Language, empty: str, elsewhere: Language
) -> None:
    assert not stems(empty, language)
    assert stems(empty, elsewhere)


def test_simple_neither_stems_nor_drops_words() -> None:
    text = "The boats and the Häuser, l'acqua"
    assert stems(text, Language.SIMPLE) == ["the", "boats", "and", "the", "häuser", "l'acqua"]


@pytest.mark.parametrize(
    ("language", "text", "telling"),
    [
        (Language.FRENCH, "L’école d'aujourd'hui, qu’il aime", "école aujourd'hui aime"),
        (Language.FRENCH, "jusqu'à l'été", "été"),
        (Language.ITALIAN, "Bevo l'acqua dell'isola", "bevo acqua isola"),
        (Language.ITALIAN, "un po' d’olio", "po olio"),
        (Language.PORTUGUESE, "um copo d'água", "copo água"),
        (Language.ENGLISH, "Ann's o'clock", "ann o'clock"),
        (Language.GERMAN, "Geht's Anna’s Hund gut?", "geht anna hund gut"),
    ],
)
def test_elided_words_say_nothing(language: Language, text: str, telling: str) -> None:
    assert telling_words(text, language) == telling.split()


# --- Unicode


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", unicodedata.normalize("NFD", "café")),
        ("Ångström", unicodedata.normalize("NFD", "ångström")),
        ("ÉCOLE", "école"),
        ("STRASSE", "Straße"),
        ("ΟΔΟΣ", "οδος"),
        ("\uff46\uff55\uff4c\uff4c", "full"),
        ("ﬁsh", "fish"),
        ("ｶﾞﾗｽ", "ガラス"),
        ("한국", unicodedata.normalize("NFD", "한국")),
        ("Windows™", "windows"),
    ],
)
def test_spellings_that_look_alike_are_one_word(language: Language, one: str, other: str) -> None:
    assert term_counts(one, language) == term_counts(other, language)
    assert term_counts(one, language).total() >= 1


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("東京", "私は東京に住んでいます"),
        ("猫", "うちの猫は黒い"),
        ("ラーメン", "昨日ラーメンを食べた"),
        ("中文", "我在学习中文"),
        ("กาแฟ", "ฉันชอบดื่มกาแฟตอนเช้า"),
        ("東京", "Tokyo東京2024"),
        ("2024", "東京2024年"),
        ("हिन्दी", "मुझे हिन्दी पसंद है"),
        ("서울", "나는 서울 사람"),
        ("привет", "Привет, мир"),
        ("🎂", "Alles Gute🎂🎉"),
        ("👍🏽", "👍"),
    ],
)
def test_a_word_of_any_script_is_found_where_it_stands(
    language: Language, query: str, text: str
) -> None:
    assert finds(query, text, language)


def test_a_run_is_its_pairs_and_its_han_characters() -> None:
    assert words("猫がいる") == ["猫が", "がい", "いる"]
    assert telling_words("猫がいる", Language.ENGLISH) == ["猫が", "がい", "いる", "猫"]
    assert telling_words("猫", Language.ENGLISH) == ["猫"]
    assert not finds("犬", "猫がいる", Language.SIMPLE)


def test_a_sentence_that_holds_the_word_comes_before_one_that_shares_a_character() -> None:
    asked = query_weights("東京", LEXICON, Language.ENGLISH)
    tokyo, kyoto = (weights(text) for text in ("東京に行った", "京都に行った"))
    assert score(asked, tokyo) > score(asked, kyoto) > 0


# --- English as it was measured


def test_english_words_have_the_terms_that_retrieval_was_measured_with() -> None:
    text = (
        "I don't like Ann's naïve under_scored 2nd-hand boats—don’t you? O'Brien's _x_ " + "a" * 70
    )
    assert words(text)[:4] == ["i", "don't", "like", "ann"]
    assert stems(text, Language.ENGLISH) == [
        "like",
        "ann",
        "naïv",
        "score",
        "2nd",
        "hand",
        "boat",
        "o'brien",
        "x",
        "a" * 64,
    ]
    assert dict(term_counts("two boats, a boat", Language.ENGLISH)) == {
        298486374: 1,
        631121226: 2,
    }


@pytest.mark.parametrize("language", Language)
@pytest.mark.parametrize(
    "query",
    [
        "",
        " \n\t",
        "AND OR NOT (",
        'content:"boat" -harbour +x ~2 ^3 *',
        "'; DROP TABLE memories; --",
        "$1 %s {0} \\ \x00",
        "''''’’’",
        "\u200d\ufe0f\u0301",
        "e" + "\u0301" * 5_000,
        "🎂" * 5_000,
        "漢" * 10_000,
    ],
)
def test_any_text_can_be_read(language: Language, query: str) -> None:
    assert len(telling_words(query, language)) == len(stems(query, language))
    assert len(query_weights(query, LEXICON, language)) <= MOST_TERMS


def test_ten_thousand_words_weigh_no_more_than_the_heaviest() -> None:
    text = "boat boat " + " ".join(f"word{number}" for number in range(10_000))
    asked = query_weights(text, LEXICON, Language.GERMAN)
    assert len(asked) == MOST_TERMS
    assert score(asked, weights("boat", language=Language.GERMAN)) > 0
