"""Long texts are read a few at a time: whoever else is served does not wait for all of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from server.memory.import_store import make_terms
from server.memory.model import Draft, Source, Tier
from server.memory.pacing import Turns, paced
from server.memory.words import stems, term_id, terms
from server.preferences import Language


@dataclass
class Clock:
    """Counts the turns of the event loop."""

    turns: int = 0

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0)
            self.turns += 1


@asynccontextmanager
async def counting() -> AsyncIterator[Clock]:
    clock = Clock()
    task = asyncio.create_task(clock.run())
    await asyncio.sleep(0)
    yield clock
    task.cancel()


def draft(characters: int) -> Draft:
    content = "".join(random.choices("abcdefgh ", k=characters))
    return Draft(Tier.LONG_TERM, content, (), Source.CHAT, "", None, "", None)


async def test_others_are_served_between_long_texts() -> None:
    async with counting() as clock:
        places = [(place, clock.turns) async for place, _ in paced([draft(20_000)] * 5)]
    assert [place for place, _ in places] == [0, 1, 2, 3, 4]
    assert len({turn for _, turn in places}) == len(places)


async def test_short_texts_are_read_at_once() -> None:
    async with counting() as clock:
        before = clock.turns
        assert len([place async for place, _ in paced([draft(10)] * 1000)]) == 1000
        assert clock.turns == before


async def test_an_import_of_long_texts_lets_others_be_served() -> None:
    drafts = [draft(20_000) for _ in range(20)]
    async with counting() as clock:
        before = clock.turns
        made = await make_terms(drafts, Language.ENGLISH)
        assert clock.turns - before >= len(drafts)
    assert len(made.terms) == len(drafts)


async def test_of_those_who_come_at_once_one_has_a_turn_at_a_time() -> None:
    turns, had = Turns(), []

    async def read(clock: Clock) -> None:
        await turns.next("long" * 5_000)
        had.append(clock.turns)

    async with counting() as clock:
        await asyncio.gather(*(read(clock) for _ in range(20)))
    assert len(set(had)) == len(had) == 20


def test_a_word_has_the_same_terms_by_itself_as_in_a_text() -> None:
    texts = ["the", "running", "rue d'Alger", "it's", "o'clock's", "x" * 100, "été", "日本語", "🙂"]
    for language in Language:
        for text in texts:
            assert terms(text, language) == [term_id(stem) for stem in stems(text, language)]
