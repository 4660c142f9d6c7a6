"""Finding the memories that answer a question."""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta

from server.caller import Caller
from server.clock import Clock
from server.memory import ranking
from server.memory.model import Filter, Found, Memory
from server.memory.search_store import SearchStore
from server.memory.short_term import ShortTermStore
from server.memory.words import stems, telling_words, words

_LEXICON_LIFETIME = timedelta(seconds=60)
_LEXICONS = 1_000
_NAMED_SPEAKER = 0.1
"""Bonus, in units of the best lexical match, for a turn of someone whom the question names."""
_MEMORY_SCORE = 0.05
_UNSCORED = 0.5
_WORDS_IN_REASON = 5
_CANDIDATES = 5
"""How many times the wanted number of memories is ranked: a bonus can lift the ones below."""


@dataclass(frozen=True, slots=True)
class Match:
    """A memory that answers a query, with what brought it here."""

    memory: Memory
    score: float
    """lexical + 0.1 if the query names the speaker + 0.05 · score of the memory (0.5 before its
    first meditation)."""
    lexical: float
    """BM25 relative to the best match of this answer, 0 to 1."""
    reason: str


class Retrieval:
    """Ranks the memories of all tiers by the words of a query."""

    def __init__(self, store: SearchStore, short_term: ShortTermStore, clock: Clock) -> None:
        self._store = store
        self._short_term = short_term
        self._lexicons = _Lexicons(clock)

    async def query(self, caller: Caller, text: str, which: Filter, limit: int) -> list[Match]:
        """Return at most `limit` memories that share words with the text, best first.

        Raises:
            ConsentMissing: The user has not consented to memory.store.
            StoreUnavailable: A store does not answer.
        """
        lexicon = self._lexicons.find(caller)
        if lexicon is None:
            lexicon = await self._store.lexicon(caller)
            self._lexicons.keep(caller, lexicon)
        terms = ranking.query_weights(text, lexicon)
        try:
            async with asyncio.TaskGroup() as group:
                wanted = limit * _CANDIDATES
                durable = group.create_task(self._store.query(caller, terms, which, wanted))
                short = group.create_task(self._short_term.query(caller, terms, which, wanted))
        except ExceptionGroup as failures:
            # A group of problems is no problem that anyone knows: it would be told as INTERNAL.
            raise failures.exceptions[0] from None
        found = [*durable.result(), *short.result()]
        return rank(found, text, limit)

    def forget(self, caller: Caller) -> None:
        """Count the words of the caller's memories anew at the next query."""
        self._lexicons.drop(caller)


def rank(found: list[Found], query: str, limit: int) -> list[Match]:
    """Order what the tiers found, best first, and say why each is there."""
    best = max((one.lexical for one in found), default=1.0)
    asked = dict(zip(stems(query), telling_words(query), strict=True))
    names = set(words(query))
    scored = [(_score(one, best, names), one) for one in found]
    scored.sort(key=lambda pair: (-pair[0], pair[1].memory.id))
    return [
        Match(one.memory, score, one.lexical / best, _reason(one.memory, asked))
        for score, one in scored[:limit]
    ]


def _score(found: Found, best: float, names: set[str]) -> float:
    memory = found.memory
    worth = _UNSCORED if memory.score is None else memory.score.value
    is_named = not names.isdisjoint(words(memory.speaker))
    return found.lexical / best + _NAMED_SPEAKER * is_named + _MEMORY_SCORE * worth


def _reason(memory: Memory, asked: dict[str, str]) -> str:
    said = set(stems(memory.content))
    shared = [word for stem, word in asked.items() if stem in said][:_WORDS_IN_REASON]
    if shared:
        return f"shares {', '.join(shared)}"
    return "was said next to turns that share words with the query"


class _Lexicons:
    """Word frequencies of the users who asked last. They drift slowly: a minute old is fresh."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: OrderedDict[Caller, tuple[datetime, ranking.Lexicon]] = OrderedDict()

    def find(self, caller: Caller) -> ranking.Lexicon | None:
        counted_at, lexicon = self._kept.get(caller, (None, None))
        if counted_at is None or self._clock() - counted_at > _LEXICON_LIFETIME:
            return None
        return lexicon

    def keep(self, caller: Caller, lexicon: ranking.Lexicon) -> None:
        self._kept[caller] = (self._clock(), lexicon)
        self._kept.move_to_end(caller)
        if len(self._kept) > _LEXICONS:
            self._kept.popitem(last=False)

    def drop(self, caller: Caller) -> None:
        self._kept.pop(caller, None)
