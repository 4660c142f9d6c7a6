"""Finding the memories that answer a question."""

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import structlog

from server.caller import Caller
from server.clock import Clock
from server.errors import ConsentMissing, InvalidArgument, StoreUnavailable
from server.memory import ranking
from server.memory.embedding_search import EmbeddingSearch, Nearest
from server.memory.embeddings import Embedding
from server.memory.fusion import Match, Weights, candidate_of, explain, rank
from server.memory.legs import Legs, timed
from server.memory.metrics import LATENCY
from server.memory.model import Candidate, Filter, Found, Memory
from server.memory.pacing import Turns
from server.memory.question_vectors import QuestionVectors
from server.memory.questions import Question
from server.memory.search_store import SearchStore, Versions, Words
from server.memory.sensitive import Opener
from server.memory.shared_store import SharedStore
from server.memory.short_term import ShortTermStore
from server.preferences import Language

_PROFILE_LIFETIME = timedelta(seconds=60)
_PROFILES = 1_000
_CANDIDATES = 5
"""How many times the wanted number of memories is ranked: a bonus can lift the ones below."""
_FUSED_CANDIDATES = 100
"""At least as many come from each leg when there are two: one may lift what the other ranks low."""
_GROUPED_CANDIDATES = 500
"""As many come when the answer may hold only a few turns of each conversation."""
_MOST_WHOLE = 20
"""So many of the best by their words come whole: of an answer of ten, all are among them in 96 of
100 questions, which spares those a second look at the database."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What was found, and what that depends on."""

    matches: Sequence[Match]
    semantic_model: str
    """Whose vectors had a say in the order; empty: none."""
    semantic_late: bool
    """Whether the vectors could not be compared in time."""
    short_term_late: bool
    """Whether the short-term memories could not be looked at in time."""
    shared_late: bool
    """Whether what others share could not be looked at in time."""
    versions: Versions
    """What it was made of, or older: of a later change it may hold a part."""
    expires_at: datetime | None
    """When the first of the memories that were compared expires; None: they last."""

    @property
    def is_whole(self) -> bool:
        """Whether all was looked at that was asked for."""
        return not (self.semantic_late or self.short_term_late or self.shared_late)

    @property
    def is_sensitive(self) -> bool:
        """Whether it holds a sensitive memory."""
        return any(match.memory.is_sensitive for match in self.matches)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the legs of a query brought."""

    words: Words
    whole: Mapping[UUID, Found]
    """What came with its text: short-term memories, and what others share."""
    near: Nearest | None
    """None: not asked for, not allowed, or too late."""
    semantic_late: bool
    short_term_late: bool
    shared_late: bool

    @property
    def candidates(self) -> list[Candidate]:
        """What the words brought, wherever it was."""
        return [*self.words.candidates, *map(candidate_of, self.whole.values())]

    @property
    def versions(self) -> Versions:
        """The older ones, where the legs saw different data."""
        versions = self.words.versions
        if self.near is None:
            return versions
        return versions._replace(data=min(versions.data, self.near.data_version))


class _ProfileOutdated(Exception):
    """The user changed the settings after their profile was read."""


class Retrieval:
    """Ranks the memories of all tiers by the words and the meaning of a question.

    Numbers decide the order; of the many candidates, only those in the answer are read.
    """

    def __init__(
        self,
        store: SearchStore,
        embeddings: EmbeddingSearch,
        short_term: ShortTermStore,
        shared: SharedStore,
        opener: Opener,
        clock: Clock,
        *,
        vectors: QuestionVectors | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._store = store
        self._embeddings = embeddings
        self._short_term = short_term
        self._shared = shared
        self._opener = opener
        self._profiles = _Profiles(clock)
        self._vectors = vectors or QuestionVectors()
        self._legs = Legs()
        self._turns = Turns()
        self._weights = weights or Weights()

    async def query(self, caller: Caller, question: Question, until: float) -> Answer:
        """Return the memories that share words or meaning with the question, best first.

        One that is archived or deleted meanwhile is missing, without another in its place.

        Args:
            caller: Who asks.
            question: What is asked for.
            until: When the legs are given up that the answer can do without, by the clock of the
                event loop: all of them at that instant, whenever they began.

        Raises:
            ConsentMissing: The user has not consented to memory.store, or brings a vector and has
                not consented to memory.embed.
            InvalidArgument: The vector has another dimension than those of its model.
            ContentUnreadable: A sensitive memory of the answer does not open.
            StoreUnavailable: A store does not answer.
        """
        started = time.perf_counter()
        profile, found = await self._profile_and_finds(caller, question, until)
        model = self._model(question, profile)
        near = found.near.candidates if found.near else ()
        order = rank(
            found.candidates,
            near,
            question,
            profile.weights,
            wanted=_candidates(question, with_vectors=bool(model)),
        )
        whole = {memory_id: one.memory for memory_id, one in found.whole.items()}
        ours = [one.id for _, one in order.places if one.id not in whole]
        read = found.words.memories(ours)
        read |= await self._store.fetch(caller, [one for one in ours if one not in read])
        for memory in await self._opener.opened(caller, read.values()):
            whole[memory.id] = memory
        LATENCY.labels("total").observe(time.perf_counter() - started)
        expiries = [memory.expires_at for memory in whole.values() if memory.expires_at]
        return Answer(
            explain(order, whole, question, profile.language),
            semantic_model=model if near else "",
            semantic_late=found.semantic_late,
            short_term_late=found.short_term_late,
            shared_late=found.shared_late,
            versions=found.versions,
            expires_at=min(expiries, default=None),
        )

    async def versions(self, caller: Caller, *, with_vectors: bool) -> Versions:
        """Return what an answer would be made of now.

        Args:
            caller: Who asks.
            with_vectors: Whether by meaning too.

        Raises:
            ConsentMissing: As from `query`.
            StoreUnavailable: The database does not answer.
        """
        return await self._store.versions(caller, with_vectors=with_vectors)

    def forget(self, caller: Caller) -> None:
        """Count the words of the caller's memories anew at the next query."""
        self._profiles.drop(caller)

    async def _profile_and_finds(
        self, caller: Caller, question: Question, until: float
    ) -> tuple["_Profile", _Found]:
        while True:
            profile = await self._profile(caller)
            try:
                return profile, await self._find(caller, question, profile, until)
            except _ProfileOutdated:
                self._profiles.drop(caller)

    async def _profile(self, caller: Caller) -> "_Profile":
        profile = self._profiles.find(caller)
        if profile is None:
            lexicon, chosen = await self._store.profile(caller)
            weights = self._weights.changed_by(chosen.retrieval_weights)
            profile = _Profile(
                lexicon, weights, chosen.language, chosen.embedding_model, chosen.version
            )
            self._profiles.keep(caller, profile)
        return profile

    async def _find(
        self, caller: Caller, question: Question, profile: "_Profile", until: float
    ) -> _Found:
        await self._turns.next(question.text)
        terms = ranking.query_weights(question.text, profile.lexicon, profile.language)
        model = self._model(question, profile)
        limit = _candidates(question, with_vectors=bool(model))
        asked = caller, terms, question.which, limit
        # Read before their order is known, only where the words alone decide it.
        whole = 0 if model else _whole(question)
        with self._legs.of_a_query() as legs:
            short = legs.begin("short_term", self._short_term.query(*asked, profile.language))
            meant = (
                legs.begin("vector", self._meant(caller, question, model, limit)) if model else None
            )
            shown = (
                legs.begin("shared", self._shared.query(*asked, profile.language))
                if question.include_shared
                else None
            )
            durable = await self._said(asked, whole, profile)
            kept = await short.by(until)
            if kept and durable.versions.data < kept.left_by:
                # What became durable between the two looks was in neither.
                durable = await self._said(asked, whole, profile)
            near = await meant.by(until) if meant else _Meant(None)
            shared = await shown.by(until) if shown else ()
        if kept is None and not question.which.durable_tiers:
            raise StoreUnavailable("the short-term store")
        return _Found(
            durable,
            _beside(durable, (*(kept.found if kept else ()), *(shared or ())), question.as_of),
            near.near if near else None,
            semantic_late=near is None,
            short_term_late=kept is None,
            shared_late=shared is None,
        )

    async def _said(
        self,
        asked: tuple[Caller, Mapping[int, float], Filter, int],
        whole: int,
        profile: "_Profile",
    ) -> Words:
        """Return what the words bring of the durable tiers."""
        words = await timed("lexical", self._store.query(*asked, whole))
        if words.versions.settings != profile.settings_version:
            # The other legs are let go, so that there is time left for them to begin anew.
            raise _ProfileOutdated
        return words

    def _model(self, question: Question, profile: "_Profile") -> str:
        """Return the model whose vectors are to be compared with a question; empty: none."""
        if question.embedding is not None:
            return question.embedding.model
        is_told_apart = question.text and question.which.durable_tiers
        chosen = profile.embedding_model
        return chosen if is_told_apart and self._vectors.has(chosen) else ""

    async def _meant(self, caller: Caller, question: Question, model: str, limit: int) -> "_Meant":
        """Return what is near in meaning, where that can be told."""
        if question.embedding is not None:
            return await self._near(caller, question.embedding, question, limit)
        embedding = await timed("embedding", self._vectors.of(model, question.text))
        if embedding is None:
            return _Meant(None)
        try:
            return await self._near(caller, embedding, question, limit)
        except (ConsentMissing, InvalidArgument) as problem:
            # Nobody asked for it: without consent, or with vectors that were made by another model
            # of this name, the words decide.
            log.info("question compared by words alone", reason=problem.reason)
            return _Meant(None)

    async def _near(
        self, caller: Caller, embedding: Embedding, question: Question, limit: int
    ) -> "_Meant":
        return _Meant(await self._embeddings.nearest(caller, embedding, question.which, limit))


@dataclass(frozen=True, slots=True)
class _Meant:
    """What the meaning of a question brought in time."""

    near: Nearest | None
    """None: it was not asked for, or cannot be compared."""


def _beside(words: Words, found: Iterable[Found], as_of: datetime) -> dict[UUID, Found]:
    """Return what was found elsewhere and lasts, without what is among the durable memories too.

    What was promoted between two legs is in both; the later place is the right one.
    """
    durable = {candidate.id for candidate in words.candidates}
    return {
        one.memory.id: one
        for one in found
        if one.memory.id not in durable and _lasts(one.memory, as_of)
    }


def _lasts(memory: Memory, as_of: datetime) -> bool:
    return memory.expires_at is None or memory.expires_at > as_of


def _candidates(question: Question, *, with_vectors: bool) -> int:
    if question.max_per_session is not None:
        return _GROUPED_CANDIDATES
    fewest = _FUSED_CANDIDATES if with_vectors else 0
    return max(question.limit * _CANDIDATES, fewest)


def _whole(question: Question) -> int:
    """Return how many of the best by their words are worth reading before the order is known."""
    whole = 2 * question.limit
    return whole if question.max_per_session is None and whole <= _MOST_WHOLE else 0


@dataclass(frozen=True, slots=True)
class _Profile:
    """What ranking needs to know of a user."""

    lexicon: ranking.Lexicon
    weights: Weights
    language: Language
    embedding_model: str
    settings_version: int


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
