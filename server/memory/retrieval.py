"""Finding the memories that answer a question."""

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from server.caller import Caller
from server.clock import Clock
from server.errors import StoreUnavailable
from server.memory import ranking
from server.memory.embedding_search import EmbeddingSearch
from server.memory.fusion import Match, Weights, fuse
from server.memory.model import Near
from server.memory.questions import Question
from server.memory.search_store import SearchStore
from server.memory.short_term import ShortTermStore

_LEXICON_LIFETIME = timedelta(seconds=60)
_LEXICONS = 1_000
_CANDIDATES = 5
"""How many times the wanted number of memories is ranked: a bonus can lift the ones below."""
_FUSED_CANDIDATES = 100
"""At least as many come from each leg when there are two: one may lift what the other ranks low."""
_GROUPED_CANDIDATES = 500
"""As many come when the answer may hold only a few turns of each conversation."""
_PATIENCE_SECONDS = 1.0
_MARGIN_SECONDS = 0.1
"""Of the time of a call: what is left to answer in when the semantic leg is given up."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found."""

    matches: Sequence[Match]
    semantic_late: bool
    """Whether the vectors could not be compared in time."""


class Retrieval:
    """Ranks the memories of all tiers by the words and the meaning of a question."""

    def __init__(
        self,
        store: SearchStore,
        embeddings: EmbeddingSearch,
        short_term: ShortTermStore,
        clock: Clock,
        weights: Weights | None = None,
    ) -> None:
        self._store = store
        self._embeddings = embeddings
        self._short_term = short_term
        self._lexicons = _Lexicons(clock)
        self._weights = weights or Weights()

    async def query(
        self, caller: Caller, question: Question, seconds_left: float | None = None
    ) -> Answer:
        """Return the memories that share words or meaning with the question, best first.

        Args:
            caller: Who asks.
            question: What is asked for.
            seconds_left: Until the caller gives up; None: nobody waits for long anyway.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or brings a vector and has
                not consented to memory.embed.
            InvalidArgument: The vector has another dimension than those of its model.
            StoreUnavailable: A store does not answer.
        """
        wanted = _candidates(question)
        terms = ranking.query_weights(question.text, await self._lexicon(caller))
        try:
            async with asyncio.TaskGroup() as group:
                durable = group.create_task(
                    self._store.query(caller, terms, question.which, wanted)
                )
                short = group.create_task(
                    self._short_term.query(caller, terms, question.which, wanted)
                )
                semantic = group.create_task(self._nearest(caller, question, wanted, seconds_left))
        except ExceptionGroup as failures:
            # A group of problems is no problem that anyone knows: it would be told as INTERNAL.
            raise failures.exceptions[0] from None
        near = semantic.result()
        found = [*durable.result(), *short.result()]
        matches = fuse(found, near or (), question, self._weights, wanted=wanted)
        return Answer(matches, semantic_late=near is None)

    def forget(self, caller: Caller) -> None:
        """Count the words of the caller's memories anew at the next query."""
        self._lexicons.drop(caller)

    async def _lexicon(self, caller: Caller) -> ranking.Lexicon:
        lexicon = self._lexicons.find(caller)
        if lexicon is None:
            lexicon = await self._store.lexicon(caller)
            self._lexicons.keep(caller, lexicon)
        return lexicon

    async def _nearest(
        self, caller: Caller, question: Question, wanted: int, seconds_left: float | None
    ) -> list[Near] | None:
        """Return what is near in meaning; None if that takes too long."""
        if question.embedding is None:
            return []
        patience = _PATIENCE_SECONDS
        if seconds_left is not None:
            patience = min(patience, seconds_left - _MARGIN_SECONDS)
        try:
            async with asyncio.timeout(patience):
                return await self._embeddings.nearest(
                    caller, question.embedding, question.which, wanted
                )
        except (TimeoutError, StoreUnavailable) as failure:
            log.warning("semantic leg given up", error=repr(failure))
            return None


def _candidates(question: Question) -> int:
    if question.max_per_session is not None:
        return _GROUPED_CANDIDATES
    fewest = _FUSED_CANDIDATES if question.embedding else 0
    return max(question.limit * _CANDIDATES, fewest)


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
