"""Choosing sentences: what is said most tellingly, always the same, in bounded memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

from workers import digest
from workers.digest import LONGEST, Digest, sentences_of

TALK = """
Good morning! How are you? We should talk about the move to Lisbon. The move to Lisbon is planned
for May. Fine. In Lisbon the flat near the river is free from May. My cat likes tuna very much.
The movers for the flat in Lisbon cost 900 euros.
""".replace("\n", " ")


def digest_of(text: str, most_kept: int = digest.MOST_KEPT) -> Digest:
    made = Digest(most_kept)
    made.add(text)
    return made


def chosen(text: str, how_many: int, most_kept: int = digest.MOST_KEPT) -> list[str]:
    return [each.text for each in digest_of(text, most_kept).choose(how_many)]


def test_what_the_talk_is_about_is_chosen_in_its_order() -> None:
    found = chosen(TALK, 3)
    assert len(found) == 3
    assert all("Lisbon" in sentence for sentence in found)
    places = [TALK.index(sentence) for sentence in found]
    assert places == sorted(places)


def test_nods_are_chosen_only_where_there_is_nothing_else() -> None:
    assert "Fine." not in chosen(TALK, 20)
    assert chosen("Fine. Yes. No.", 2) == ["Fine.", "Yes."]
    assert chosen("", 3) == []


def test_what_was_said_is_not_said_again() -> None:
    twice = "The flat in Lisbon costs a lot. " * 2 + "The movers come to Lisbon on Monday."
    assert len(set(chosen(twice, 2))) == 2


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two!", ["One.", "Two!"]),
        ("He said: «Go!» Then he went.", ["He said: «Go!»", "Then he went."]),
        ("a line\nanother", ["a line", "another"]),
        ("3.5 percent", ["3.5 percent"]),
        ("x" * (LONGEST + 1), ["x" * LONGEST, "x"]),
        (" \n ", []),
    ],
)
def test_sentences_end_where_readers_think_so(text: str, sentences: list[str]) -> None:
    assert sentences_of(text) == sentences


def test_however_long_the_text_a_bounded_number_of_sentences_waits() -> None:
    made = Digest(most_kept=50)
    for number in range(2000):
        made.add(f"The weather of day {number} was as grey as ever.")
        if number % 100 == 0:
            made.add("The ship with the harbour master sinks.")
        assert len(made._kept) <= 50
        assert len(made._short) <= 50
    assert len(made.choose(5)) == 5


def test_up_to_the_bound_nothing_is_lost() -> None:
    assert chosen(TALK, 3, most_kept=100) == chosen(TALK, 3)


def test_another_process_chooses_the_same() -> None:
    program = (
        "import sys; from tests.workers.test_digest import TALK, chosen; print(chosen(TALK, 3))"
    )
    for seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ".:client"},
            capture_output=True,
            check=True,
            text=True,
        )
        assert told.stdout.strip() == str(chosen(TALK, 3))
