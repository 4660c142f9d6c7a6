"""Between the contract's messages and the model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.errors import EtagMismatch, InvalidArgument
from server.memory import drafts
from server.memory.embeddings import BATCH, Upload, read_embedding
from server.memory.fusion import Match
from server.memory.meditation_store import Meditation, MeditationState
from server.memory.model import Author, Change, Draft, Filter, Memory, Scope, Source, Tier
from server.memory.questions import (
    Question,
    check_limit,
    check_max_per_session,
    check_min_score,
    check_text,
    check_window,
)
from server.memory.retrieval import Answer
from server.memory.usage_store import Usage

TIERS: Mapping[int, Tier] = {
    pb.TIER_SHORT_TERM: Tier.SHORT_TERM,
    pb.TIER_LONG_TERM: Tier.LONG_TERM,
    pb.TIER_PERMANENT: Tier.PERMANENT,
}
SOURCES: Mapping[int, Source] = {
    pb.SOURCE_CHAT: Source.CHAT,
    pb.SOURCE_AGENT: Source.AGENT,
    pb.SOURCE_IMPORT: Source.IMPORT,
    pb.SOURCE_UPLOAD: Source.UPLOAD,
}
SCOPES: Mapping[int, Scope] = {
    pb.SCOPE_PRIVATE: Scope.PRIVATE,
    pb.SCOPE_SHARED: Scope.SHARED,
    pb.SCOPE_PUBLIC: Scope.PUBLIC,
}
_AUTHORS_TO_PROTO = {
    Author.USER: pb.AUTHOR_USER,
    Author.AGENT: pb.AUTHOR_AGENT,
    Author.SYSTEM: pb.AUTHOR_SYSTEM,
}
_SCOPES_TO_PROTO = {scope: pb.Scope.ValueType(number) for number, scope in SCOPES.items()}
_TIERS_TO_PROTO = {tier: pb.Tier.ValueType(number) for number, tier in TIERS.items()}
_SOURCES_TO_PROTO = {source: pb.Source.ValueType(number) for number, source in SOURCES.items()}
_MEDITATION_STATES_TO_PROTO = {
    MeditationState.RUNNING: pb.MEDITATION_STATE_RUNNING,
    MeditationState.SUCCEEDED: pb.MEDITATION_STATE_SUCCEEDED,
}

_REFUSALS = {
    "memory_id": "there is no such memory in a durable tier, or it is sensitive",
    "content_hash": "the memory has another text now",
}
_SHA256_DIGITS = 64
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_SECONDS = 86_400
_LONGEST_GRACE = timedelta(days=365)
_BEST_RATING = 5

_InstantField = Literal["occurred_after", "occurred_before", "as_of_time"]


def draft_from(message: pb.Memory, path: str) -> Draft:
    """Read a memory to keep.

    Args:
        message: What the caller sent.
        path: Where it stands in the request, such as "memory" or "memories[3]".

    Raises:
        InvalidArgument: A field cannot be kept; the violation names it under the path.
    """
    session_id = drafts.check_name(message.session_id, f"{path}.session_id")
    tier = tier_from(message.tier, f"{path}.tier") or Tier.LONG_TERM
    scope = scope_from(message.scope, f"{path}.scope")
    if message.sensitive:
        drafts.check_sensitive(tier, scope, path)
    return Draft(
        tier=tier,
        content=drafts.check_content(message.content, f"{path}.content"),
        tags=drafts.check_tags(message.tags, f"{path}.tags"),
        source=_source_from(message.source, f"{path}.source"),
        session_id=session_id,
        session_position=drafts.check_position(
            message.session_position, session_id, f"{path}.session_position"
        )
        if message.HasField("session_position")
        else None,
        speaker=drafts.check_name(message.speaker, f"{path}.speaker"),
        occurred_at=_occurred_from(message, path),
        channels=drafts.check_channels(message.channels, f"{path}.channels"),
        scope=scope,
        is_protected=message.protected,
        is_sensitive=message.sensitive,
    )


def change_from(message: pb.Memory, mask: Iterable[str]) -> Change:
    """Read the fields of a memory that the mask names.

    Raises:
        InvalidArgument: The mask is empty or names a field that cannot be changed, or a new
            value cannot be kept.
    """
    paths = set(mask)
    if not paths or paths - _READERS.keys():
        raise InvalidArgument("update_mask", f"must name some of {', '.join(sorted(_READERS))}")
    values = {name: read(message) for path in paths for name, read in [_READERS[path]]}
    return Change(**values, expected_version=version_from(message.etag))


_READERS: Mapping[str, tuple[str, Callable[[pb.Memory], Any]]] = {
    "content": ("content", lambda memory: drafts.check_content(memory.content, "memory.content")),
    "tags": ("tags", lambda memory: drafts.check_tags(memory.tags, "memory.tags")),
    "channels": (
        "channels",
        lambda memory: drafts.check_channels(memory.channels, "memory.channels"),
    ),
    "speaker": ("speaker", lambda memory: drafts.check_name(memory.speaker, "memory.speaker")),
    "occur_time": ("occurred_at", lambda memory: _occurred_from(memory, "memory")),
    "scope": ("scope", lambda memory: scope_from(memory.scope, "memory.scope")),
    "tier": ("tier", lambda memory: _new_tier_from(memory.tier)),
    "sensitive": ("is_sensitive", lambda memory: memory.sensitive),
}
"""What a mask may name: the field of a change, and how its new value is read."""


def filter_from(tiers: Iterable[int], tags: Iterable[str], session_id: str, path: str) -> Filter:
    """Read which memories are asked for; `path` names the tier field.

    Raises:
        InvalidArgument: A tier is unknown, or a tag or the session id cannot exist.
    """
    wanted = {tier for number in tiers if (tier := tier_from(number, path))}
    return Filter(
        tiers=frozenset(wanted or Tier),
        tags=drafts.check_tags(tags, "tags"),
        session_id=drafts.check_name(session_id, "session_id"),
    )


def tier_from(number: int, field: str) -> Tier | None:
    """Read a tier; None when none is named.

    Raises:
        InvalidArgument: There is no such tier.
    """
    if number == pb.TIER_UNSPECIFIED:
        return None
    if number not in TIERS:
        raise InvalidArgument(field, f"there is no tier {number}")
    return TIERS[number]


def scope_from(number: int, field: str) -> Scope:
    """Read a scope; private when none is named.

    Raises:
        InvalidArgument: There is no such scope.
    """
    if number == pb.SCOPE_UNSPECIFIED:
        return Scope.PRIVATE
    if number not in SCOPES:
        raise InvalidArgument(field, f"there is no scope {number}")
    return SCOPES[number]


def list_filter_from(request: pb.ListMemoriesRequest) -> Filter:
    """Read which memories a list is of.

    Raises:
        InvalidArgument: A field asks for what cannot be.
    """
    after = _instant_in(request, "occurred_after")
    before = _instant_in(request, "occurred_before")
    check_window(after, before)
    if request.state not in pb.MemoryState.values():
        raise InvalidArgument("state", f"there is no state {request.state}")
    archived = request.state == pb.MEMORY_STATE_ARCHIVED
    if archived and request.shared:
        raise InvalidArgument("state", "archived memories are not shared")
    which = filter_from([request.tier], request.tags, request.session_id, "tier")
    return replace(
        which,
        occurred_after=after,
        occurred_before=before,
        archived=archived,
    )


def grace_from(request: pb.DeleteMemoryRequest) -> timedelta | None:
    """Read for how long a deleted memory can be restored; None: not at all.

    Raises:
        InvalidArgument: It is negative or longer than a year.
    """
    if not request.HasField("grace"):
        return None
    try:
        grace = request.grace.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InvalidArgument("grace", "is not a duration") from error
    if not timedelta() <= grace <= _LONGEST_GRACE:
        raise InvalidArgument("grace", f"must be 0 to {_LONGEST_GRACE.days} days")
    return grace or None


def opinion_from(request: pb.GiveFeedbackRequest) -> float | None:
    """Read what a memory is worth to its user, 0 to 1; None: nothing is said.

    Raises:
        InvalidArgument: A thumb is false, or the rating is not 1 to 5, or nothing is said at all.
    """
    match request.WhichOneof("opinion"):
        case None if request.useful:
            return None
        case "thumbs_up" if request.thumbs_up:
            return 0.8
        case "thumbs_down" if request.thumbs_down:
            return 0.2
        case "rating" if 1 <= request.rating <= _BEST_RATING:
            return request.rating / _BEST_RATING
        case "rating":
            raise InvalidArgument("rating", f"must be 1 to {_BEST_RATING}")
        case thumb:
            raise InvalidArgument(thumb or "opinion", "must be given")


def question_from(request: pb.QueryMemoriesRequest, now: datetime) -> Question:
    """Read a query.

    Raises:
        InvalidArgument: A field asks for what cannot be, or two fields contradict each other.
    """
    after = _instant_in(request, "occurred_after")
    before = _instant_in(request, "occurred_before")
    check_window(after, before)
    which = filter_from(request.tiers, request.tags, request.session_id, "tiers")
    max_tokens = request.max_tokens if request.HasField("max_tokens") else None
    return Question(
        text=check_text(request.query),
        which=replace(which, occurred_after=after, occurred_before=before),
        as_of=_instant_in(request, "as_of_time") or now,
        embedding=read_embedding(request.embedding.model, request.embedding.values, "embedding")
        if request.HasField("embedding")
        else None,
        limit=check_limit(request.top_k, max_tokens),
        min_score=check_min_score(request.min_score),
        max_tokens=max_tokens,
        max_per_session=check_max_per_session(request.max_per_session)
        if request.HasField("max_per_session")
        else None,
        include_shared=request.include_shared,
    )


def uploads_from(request: pb.UploadEmbeddingsRequest) -> list[Upload]:
    """Read vectors to keep.

    Raises:
        InvalidArgument: There are none or too many, or a field of one cannot be kept.
    """
    if not 1 <= len(request.embeddings) <= BATCH:
        raise InvalidArgument("embeddings", f"must be 1 to {BATCH}")
    return [
        _upload_from(message, f"embeddings[{place}]")
        for place, message in enumerate(request.embeddings)
    ]


def memory_to(memory: Memory) -> pb.Memory:
    """Return a memory as the contract shows it. What is sealed must have been opened."""
    if memory.sealed is not None:
        raise RuntimeError("a sealed memory was to be shown")
    message = pb.Memory(
        id=ids.show(ids.MEMORY, memory.id),
        tier=_TIERS_TO_PROTO[memory.tier],
        content=memory.content,
        tags=memory.tags,
        source=_SOURCES_TO_PROTO[memory.source],
        session_id=memory.session_id,
        session_position=memory.session_position,
        speaker=memory.speaker,
        occur_time=timestamp(memory.occurred_at),
        size_bytes=memory.size_bytes,
        use_count=memory.use_count,
        create_time=timestamp(memory.created_at),
        update_time=timestamp(memory.updated_at),
        last_seen_time=timestamp(memory.last_seen_at),
        expire_time=timestamp(memory.expires_at) if memory.expires_at else None,
        # Of a sensitive one it is no SHA-256, and one would tell what the content is.
        content_hash="" if memory.is_sensitive else memory.content_hash.hex(),
        version=memory.version,
        etag=f"v{memory.version}",
        channels=memory.channels,
        scope=_SCOPES_TO_PROTO[memory.scope],
        state=pb.MEMORY_STATE_ARCHIVED if memory.archived_at else pb.MEMORY_STATE_ACTIVE,
        protected=memory.is_protected,
        author=_AUTHORS_TO_PROTO[memory.created_by],
        consent_version=memory.consent_version or 0,
        feedback=memory.feedback,
        archive_time=timestamp(memory.archived_at) if memory.archived_at else None,
        delete_time=timestamp(memory.delete_after) if memory.delete_after else None,
        user_id=ids.show(ids.USER, memory.owner_id) if memory.owner_id else "",
        sensitive=memory.is_sensitive,
    )
    if memory.score:
        message.score.CopyFrom(
            pb.Score(
                value=memory.score.value,
                relevance_to_goals=memory.score.relevance_to_goals,
                emotional_weight=memory.score.emotional_weight,
                predictive_value=memory.score.predictive_value,
                recency_frequency=memory.score.recency_frequency,
                scorer_version=memory.score.scorer_version,
                score_time=timestamp(memory.score.scored_at),
            )
        )
    return message


def match_to(match: Match) -> pb.Match:
    """Return a match as the contract shows it."""
    return pb.Match(
        memory=memory_to(match.memory),
        score=match.score,
        lexical=match.lexical,
        reason=match.reason,
        semantic=match.semantic,
        memory_score=match.memory_score,
        freshness=match.freshness,
        speaker=match.speaker,
        session=match.session,
    )


def answer_to(answer: Answer) -> pb.QueryMemoriesResponse:
    """Return the answer to a query as the contract shows it."""
    return pb.QueryMemoriesResponse(
        matches=map(match_to, answer.matches),
        semantic_late=answer.semantic_late,
        short_term_late=answer.short_term_late,
        shared_late=answer.shared_late,
        semantic_model=answer.semantic_model,
    )


def kept_to(uploads: Sequence[Upload], refused: Mapping[int, str]) -> pb.UploadEmbeddingsResponse:
    """Return what became of vectors: where one was not kept stands the field at fault."""
    return pb.UploadEmbeddingsResponse(
        stored=len(uploads) - len(refused),
        refusals=[
            pb.EmbeddingRefusal(
                index=place, field=f"embeddings[{place}].{field}", message=_REFUSALS[field]
            )
            for place, field in sorted(refused.items())
        ],
    )


def meditation_to(run: Meditation) -> pb.Meditation:
    """Return a meditation as the contract shows it."""
    message = pb.Meditation(
        id=ids.show(ids.MEDITATION, run.id),
        state=_MEDITATION_STATES_TO_PROTO[run.state],
        as_of_time=timestamp(run.as_of),
        shards=run.shards,
        shards_done=run.shards_done,
        scored=run.scored,
        mean_score=run.mean_score,
        scorer_version=run.scorer_version,
        create_time=timestamp(run.created_at),
        finish_time=timestamp(run.finished_at) if run.finished_at else None,
        full=run.full_run,
        dry_run=run.dry_run,
        nightly=run.nightly,
        total=run.total,
        processed=run.processed,
        archived=run.archived,
        promoted=run.promoted,
        deleted=run.deleted,
        undo_time=timestamp(run.undone_at) if run.undone_at else None,
    )
    message.duration.FromTimedelta(run.duration)
    return message


def timestamp(instant: datetime) -> Timestamp:
    """Return an instant as the contract shows it."""
    # FromDatetime goes through the calendar and takes ten times as long.
    since = instant - _EPOCH
    return Timestamp(
        seconds=since.days * _DAY_SECONDS + since.seconds, nanos=since.microseconds * 1000
    )


def usage_to(usage: Usage) -> pb.GetUsageResponse:
    """Return what a user keeps as the contract shows it."""
    return pb.GetUsageResponse(
        plan=usage.plan,
        tiers=[
            pb.TierUsage(
                tier=_TIERS_TO_PROTO[tier],
                used_bytes=kept.used_bytes,
                limit_bytes=kept.limit_bytes,
                count=kept.count,
            )
            for tier, kept in usage.tiers.items()
        ],
        archived_bytes=usage.archived_bytes,
        archived_count=usage.archived_count,
    )


def _new_tier_from(number: int) -> Tier:
    tier = tier_from(number, "memory.tier")
    if tier is None:
        raise InvalidArgument("memory.tier", "must name a tier")
    return tier


def _source_from(number: int, field: str) -> Source:
    if number == pb.SOURCE_UNSPECIFIED:
        return Source.CHAT
    if number not in SOURCES:
        raise InvalidArgument(field, f"there is no source {number}")
    return SOURCES[number]


def _occurred_from(message: pb.Memory, path: str) -> datetime | None:
    if not message.HasField("occur_time"):
        return None
    return _instant_from(message.occur_time, f"{path}.occur_time")


def _instant_in(request: Message, field: _InstantField) -> datetime | None:
    return _instant_from(getattr(request, field), field) if request.HasField(field) else None


def _instant_from(message: Timestamp, field: str) -> datetime:
    try:
        instant = message.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError) as error:
        raise InvalidArgument(field, "is not an instant") from error
    return drafts.check_instant(instant, field)


def _upload_from(message: pb.Embedding, path: str) -> Upload:
    return Upload(
        memory_id=ids.parse(ids.MEMORY, message.memory_id, f"{path}.memory_id"),
        embedding=read_embedding(message.model, message.values, path),
        content_hash=sha256_from(message.content_hash, f"{path}.content_hash")
        if message.content_hash
        else None,
    )


def version_from(etag: str) -> int | None:
    """Read the version that a caller expects; None: any.

    Raises:
        EtagMismatch: It is an etag of nothing.
    """
    if not etag:
        return None
    if not (etag.startswith("v") and etag[1:].isdecimal() and len(etag) <= len("v") + 18):
        raise EtagMismatch
    return int(etag[1:])


def sha256_from(text: str, field: str) -> bytes:
    """Read a SHA-256.

    Raises:
        InvalidArgument: It is not 64 hexadecimal digits.
    """
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(text) != _SHA256_DIGITS or len(digest) != _SHA256_DIGITS // 2:
        raise InvalidArgument(field, "must be a SHA-256 in hexadecimal")
    return digest
