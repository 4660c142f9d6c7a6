"""What becomes of memories: the same over gRPC and over REST."""

from __future__ import annotations

from datetime import timedelta

import grpc
import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.e2e.test_both_transports import keep, refusal_of, update
from tests.mesh import User, join
from tests.transports import Refused, Transport

HOUR = timedelta(hours=1)
EMBED = users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=True)


async def listed(call: Transport, **fields: object) -> list[str]:
    """List memories and return their contents."""
    page = await call(pb.ListMemoriesRequest(**fields))  # type: ignore[arg-type]
    return [memory.content for memory in page.memories]


async def found(call: Transport, query: str, **fields: object) -> list[str]:
    """Ask a question and return the contents that answer it."""
    request = pb.QueryMemoriesRequest(query=query, **fields)  # type: ignore[arg-type]
    return [match.memory.content for match in (await call(request)).matches]


# --- away and back -----------------------------------------------------------------------------


async def test_an_archived_memory_is_not_found_until_it_is_restored(call: Transport) -> None:
    kept = await keep(call, "Ann sails")
    away = (await call(pb.ArchiveMemoryRequest(id=kept.id, etag=kept.etag))).memory
    assert (away.state, away.version) == (pb.MEMORY_STATE_ARCHIVED, 2)
    grace = away.delete_time.ToDatetime() - away.archive_time.ToDatetime()
    assert grace == timedelta(days=30)
    assert await listed(call) == await found(call, "sails") == []
    assert await listed(call, state=pb.MEMORY_STATE_ARCHIVED) == ["Ann sails"]
    assert (await call(pb.GetMemoryRequest(id=kept.id))).memory == away
    back = (await call(pb.RestoreMemoryRequest(id=kept.id, etag=away.etag))).memory
    assert (back.state, back.HasField("delete_time")) == (pb.MEMORY_STATE_ACTIVE, False)
    assert await listed(call) == await found(call, "sails") == ["Ann sails"]
    assert await listed(call, state=pb.MEMORY_STATE_ARCHIVED) == []


async def test_a_memory_is_deleted_with_a_grace_or_at_once(call: Transport) -> None:
    kept = await keep(call, "Ann sails")
    request = pb.DeleteMemoryRequest(id=kept.id, grace=Duration(seconds=3600))
    away = (await call(request)).memory
    assert away.delete_time.ToDatetime() - away.archive_time.ToDatetime() == HOUR
    await call(pb.RestoreMemoryRequest(id=kept.id))
    for grace in (None, Duration()):
        gone = (await keep(call, "Ann rows")).id
        answer = await call(pb.DeleteMemoryRequest(id=gone, grace=grace))
        assert not answer.HasField("memory")
        for refused in (pb.GetMemoryRequest(id=gone), pb.RestoreMemoryRequest(id=gone)):
            assert (await refusal_of(call, refused)).code is grpc.StatusCode.NOT_FOUND
    assert await listed(call) == ["Ann sails"]


async def test_a_protected_memory_says_so(call: Transport) -> None:
    kept = await keep(call, "Ann sails")
    for protected in (True, False):
        request = pb.ProtectMemoryRequest(id=kept.id, protected=protected)
        assert (await call(request)).memory.protected is protected


async def test_a_stale_etag_is_refused_whatever_is_asked(call: Transport) -> None:
    stale = await keep(call, "Ann sails")
    await call(update(stale, "content", content="Ann rows"))
    for request in (
        pb.ArchiveMemoryRequest(id=stale.id, etag=stale.etag),
        pb.RestoreMemoryRequest(id=stale.id, etag=stale.etag),
        pb.ProtectMemoryRequest(id=stale.id, etag=stale.etag, protected=True),
        pb.ArchiveMemoryRequest(id=stale.id, etag="nonsense"),
    ):
        refusal = await refusal_of(call, request)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


async def test_a_short_term_memory_is_neither_archived_nor_protected(call: Transport) -> None:
    kept = await keep(call, "Ann naps", tier=pb.TIER_SHORT_TERM)
    for request in (
        pb.ArchiveMemoryRequest(id=kept.id),
        pb.ProtectMemoryRequest(id=kept.id, protected=True),
        pb.DeleteMemoryRequest(id=kept.id, grace=Duration(seconds=60)),
    ):
        refusal = await refusal_of(call, request)
        assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
        assert refusal.reason == "STATE_CONFLICT"


# --- worth, versions, usage --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opinion", "worth"),
    [
        (pb.GiveFeedbackRequest(thumbs_up=True), 0.8),
        (pb.GiveFeedbackRequest(thumbs_down=True, useful=True), 0.2),
        (pb.GiveFeedbackRequest(rating=3), 0.6),
        (pb.GiveFeedbackRequest(useful=True), None),
    ],
)
async def test_a_user_says_what_a_memory_is_worth(
    call: Transport, opinion: pb.GiveFeedbackRequest, worth: float | None
) -> None:
    request = pb.GiveFeedbackRequest()
    request.CopyFrom(opinion)
    request.id = (await keep(call, "Ann sails")).id
    rated = (await call(request)).memory
    assert (rated.feedback if rated.HasField("feedback") else None) == pytest.approx(worth)


async def test_the_versions_of_a_memory_are_listed_page_by_page(call: Transport) -> None:
    memory = await keep(call, "Ann sails")
    for content in ("Ann rows", "Ann swims", "Ann dives"):
        memory = (await call(update(memory, "content", content=content))).memory
    seen: list[tuple[int, str]] = []
    token = ""
    while not seen or token:
        request = pb.ListMemoryVersionsRequest(id=memory.id, page_size=3, page_token=token)
        page = await call(request)
        seen += [(version.version, version.content) for version in page.versions]
        token = page.next_page_token
    assert seen == [(4, "Ann dives"), (3, "Ann swims"), (2, "Ann rows"), (1, "Ann sails")]


async def test_a_user_sees_how_much_is_kept(call: Transport) -> None:
    await keep(call, "12345", tags=["67"])
    await keep(call, "123", tier=pb.TIER_PERMANENT)
    await keep(call, "1", tier=pb.TIER_SHORT_TERM)
    away = await keep(call, "1234567890")
    await call(pb.ArchiveMemoryRequest(id=away.id))
    usage = await call(pb.GetUsageRequest())
    assert {tier.tier: (tier.used_bytes, tier.count) for tier in usage.tiers} == {
        pb.TIER_SHORT_TERM: (1, 1),
        pb.TIER_LONG_TERM: (7, 1),
        pb.TIER_PERMANENT: (3, 1),
    }
    assert (usage.plan, usage.archived_bytes, usage.archived_count) == ("free", 10, 1)
    assert all(tier.limit_bytes > tier.used_bytes for tier in usage.tiers)


async def test_a_memory_moves_to_another_tier_under_its_id(call: Transport) -> None:
    short = await keep(call, "Ann sails", tier=pb.TIER_SHORT_TERM)
    moved = (await call(update(short, "tier", tier=pb.TIER_PERMANENT))).memory
    assert (moved.id, moved.tier) == (short.id, pb.TIER_PERMANENT)
    versions = (await call(pb.ListMemoryVersionsRequest(id=short.id))).versions
    assert [version.tier for version in versions] == [pb.TIER_PERMANENT, pb.TIER_SHORT_TERM]


# --- many at once ------------------------------------------------------------------------------


async def test_a_batch_is_stored_whole_or_not_at_all(call: Transport) -> None:
    memories = [pb.Memory(content=content) for content in ("one", "two", "one")]
    request = pb.BatchCreateMemoriesRequest(memories=memories, request_id="batch")
    results = (await call(request)).results
    assert [(each.memory.content, each.created) for each in results] == [
        ("one", True),
        ("two", True),
        ("one", False),
    ]
    again = (await call(request)).results
    assert [each.memory.id for each in again] == [each.memory.id for each in results]
    refusal = await refusal_of(
        call,
        pb.BatchCreateMemoriesRequest(memories=[pb.Memory(content="three"), pb.Memory()]),
    )
    assert refusal.fields == ("memories[1].content",)
    assert sorted(await listed(call)) == ["one", "two"]


async def test_vectors_of_a_model_are_kept_compared_and_dropped(call: Transport) -> None:
    boat, tomato = await keep(call, "Marigold"), await keep(call, "string")
    vectors = [
        pb.Embedding(memory_id=boat.id, model="m", values=[1, 0]),
        pb.Embedding(memory_id=tomato.id, model="m", values=[0, 1]),
        pb.Embedding(memory_id=f"mem_{'0' * 32}", model="m", values=[1, 1]),
    ]
    request = pb.UploadEmbeddingsRequest(embeddings=vectors)
    assert (await refusal_of(call, request)).reason == "CONSENT_MISSING"
    await call(EMBED)
    outcome = await call(request)
    assert (outcome.stored, [each.index for each in outcome.refusals]) == (2, [2])
    near = pb.QueryEmbedding(model="m", values=[0.9, 0.1])
    assert (await found(call, "ship", embedding=near, top_k=1)) == ["Marigold"]
    drop = pb.DeleteEmbeddingsRequest(model="m")
    assert [(await call(drop)).deleted for _ in range(2)] == [2, 0]
    assert await found(call, "ship", embedding=near) == []


# --- streams -----------------------------------------------------------------------------------


async def test_an_export_is_all_memories_and_an_end(call: Transport) -> None:
    kept = [await keep(call, f"memory {number}") for number in range(3)]
    await keep(call, "for ever", tier=pb.TIER_PERMANENT)
    request = pb.ExportMemoriesRequest(tier=pb.TIER_LONG_TERM)
    *memories, last = [part async for part in call.stream(request)]
    assert [part.memory for part in memories] == kept
    assert last.end.count == len(kept)


async def test_changes_are_told_in_order_from_where_a_reader_stopped(call: Transport) -> None:
    *_, last = [part async for part in call.stream(pb.ExportMemoriesRequest())]
    kept = await keep(call, "Ann sails")
    await call(pb.ArchiveMemoryRequest(id=kept.id))
    await call(pb.DeleteMemoryRequest(id=kept.id))
    told, cursor = await changes(call, last.end.cursor, 2)
    assert told == [pb.CHANGE_KIND_CREATED, pb.CHANGE_KIND_ARCHIVED]
    told, _ = await changes(call, cursor, 1)
    assert told == [pb.CHANGE_KIND_DELETED]


async def changes(
    call: Transport, cursor: str, count: int
) -> tuple[list[pb.ChangeKind.ValueType], str]:
    """Watch for so many changes and return them, and where they end."""
    told = []
    async for message in call.stream(pb.WatchMemoriesRequest(cursor=cursor)):
        told.append(message.change.kind)
        if len(told) == count:
            return told, message.cursor
    raise AssertionError(f"the stream ended after {told}")


async def test_a_stream_is_refused_with_the_field_at_fault(call: Transport) -> None:
    with pytest.raises(Refused) as caught:
        _ = [message async for message in call.stream(pb.WatchMemoriesRequest(cursor="rubbish"))]
    refusal = caught.value.refusal
    assert (refusal.code, refusal.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ("cursor",))


# --- what a tenant shares ----------------------------------------------------------------------


async def test_what_is_shared_is_listed_found_and_read_by_a_colleague(
    mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel, user: User
) -> None:
    colleague = await join(mesh, http, channel, user)
    memory = await keep(user.grpc, "the door code is 7", scope=pb.SCOPE_SHARED)
    await keep(user.grpc, "the door squeaks")
    for call in colleague.transports.values():
        assert (await call(users.GetUserRequest())).user.tenant_id == user.tenant_id
        assert await listed(call, shared=True) == ["the door code is 7"]
        assert await found(call, "door", include_shared=True) == ["the door code is 7"]
        assert await listed(call) == await found(call, "door") == []
        shown = (await call(pb.GetMemoryRequest(id=memory.id))).memory
        assert (shown.content, shown.user_id) == ("the door code is 7", user.id)
    await user.rest(update(memory, "scope", scope=pb.SCOPE_PRIVATE))
    for call in colleague.transports.values():
        assert await listed(call, shared=True) == []
        refusal = await refusal_of(call, pb.GetMemoryRequest(id=memory.id))
        assert refusal.code is grpc.StatusCode.NOT_FOUND


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.DeleteMemoryRequest(grace=Duration(seconds=-1)), "grace"),
        (pb.DeleteMemoryRequest(grace=Duration(seconds=366 * 86_400)), "grace"),
        (pb.GiveFeedbackRequest(rating=6), "rating"),
        (pb.GiveFeedbackRequest(thumbs_up=False), "thumbs_up"),
        (pb.ListMemoryVersionsRequest(page_size=1001), "page_size"),
        (pb.ListMemoryVersionsRequest(page_token="AAAA"), "page_token"),
        (pb.BatchCreateMemoriesRequest(), "memories"),
        (pb.UploadEmbeddingsRequest(), "embeddings"),
        (pb.DeleteEmbeddingsRequest(), "model"),
        (pb.AppendToSessionRequest(session_id="s"), "turns"),
        (pb.EndSessionRequest(session_id="s", keep=99), "keep"),  # type: ignore[arg-type]
        (pb.MeditateRequest(request_id="a\0b"), "request_id"),
        (pb.GetImportRequest(request_id="r" * 65), "request_id"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_bad_input_is_refused_with_the_field_at_fault(
    call: Transport, request_: Message, field: str
) -> None:
    if "id" in request_.DESCRIPTOR.fields_by_name:
        request_ = _about(request_, (await keep(call, "Ann sails")).id)
    refusal = await refusal_of(call, request_)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == (field,)


def _about(request: Message, memory_id: str) -> Message:
    copied = type(request)()
    copied.CopyFrom(request)
    copied.id = memory_id  # type: ignore[attr-defined]
    return copied
