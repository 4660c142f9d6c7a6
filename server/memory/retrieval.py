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

_PROFILE_LIFETIME = timedelta(seconds=60)
_PROFILES = 1_000
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
        self._profiles = _Profiles(clock)
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
        profile = await self._profile(caller)
        terms = ranking.query_weights(question.text, profile.lexicon)
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
        matches = fuse(found, near or (), question, profile.weights, wanted=wanted)
        return Answer(matches, semantic_late=near is None)

    def forget(self, caller: Caller) -> None:
        """Count the words of the caller's memories anew at the next query."""
        self._profiles.drop(caller)

    async def _profile(self, caller: Caller) -> "_Profile":
        profile = self._profiles.find(caller)
        if profile is None:
            lexicon, chosen = await self._store.profile(caller)
            profile = _Profile(lexicon, self._weights.changed_by(chosen))
            self._profiles.keep(caller, profile)
        return profile

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


@dataclass(frozen=True, slots=True)
class _Profile:
    """What ranking needs to know of a user."""

    lexicon: ranking.Lexicon
    weights: Weights


class _Profiles:
    """Profiles of the users who asked last. They drift slowly: a minute old is fresh."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kept: OrderedDict[Caller, tuple[datetime, _Profile]] = OrderedDict()

    def find(self, caller: Caller) -> _Profile | None:
        read_at, profile = self._kept.get(caller, (None, None))
        if read_at is None or self._clock() - read_at > _PROFILE_LIFETIME:
            return None
        return profile

    def keep(self, caller: Caller, profile: _Profile) -> None:
        self._kept[caller] = (self._clock(), profile)
        self._kept.move_to_end(caller)
        if len(self._kept) > _PROFILES:
            self._kept.popitem(last=False)

    def drop(self, caller: Caller) -> None:
        self._kept.pop(caller, None)
