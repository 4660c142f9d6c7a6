"""What users do, over gRPC and over REST: the same calls with the same answers."""

from __future__ import annotations

import hashlib

import grpc
import httpx
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from tests.mesh import GRANT, PASSWORD, User, eventually, sign_up
from tests.refusals import Refusal
from tests.transports import Refused, Transport

FILE = b"what was said on the boat\n"
UNKNOWN = "0" * 32


async def refusal_of(call: Transport, *requests: Message) -> Refusal:
    with pytest.raises(Refused) as caught:
        await call(*requests)
    return caught.value.refusal


async def keep(call: Transport, content: str, **fields: object) -> pb.Memory:
    memory = pb.Memory(content=content, **fields)  # type: ignore[arg-type]
    response = await call(pb.CreateMemoryRequest(memory=memory))
    kept: pb.Memory = response.memory
    return kept


def update(memory: pb.Memory, *paths: str, **fields: object) -> pb.UpdateMemoryRequest:
    changed = pb.Memory(id=memory.id, etag=memory.etag, **fields)  # type: ignore[arg-type]
    return pb.UpdateMemoryRequest(memory=changed, update_mask=FieldMask(paths=paths))


def announcement(memory: pb.Memory, data: bytes = FILE) -> pb.CreateAttachmentRequest:
    return pb.CreateAttachmentRequest(
        memory_id=memory.id,
        file_name="boat notes.txt",
        content_type="text/plain",
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )


# --- accounts ----------------------------------------------------------------------------------


async def test_a_new_user_is_signed_in(call: Transport, user: User) -> None:
    seen = (await call(users.GetUserRequest())).user
    assert (seen.id, seen.tenant_id, seen.email) == (user.id, user.tenant_id, user.email)


async def test_a_user_logs_in_again(call_without_token: Transport, user: User) -> None:
    answer = await call_without_token(auth.LogInRequest(email=user.email, password=PASSWORD))
    assert answer.tokens.access_token not in {"", user.token}


async def test_a_wrong_password_opens_nothing(call_without_token: Transport, user: User) -> None:
    refusal = await refusal_of(
        call_without_token, auth.LogInRequest(email=user.email, password="wrong" * 3)
    )
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
    assert refusal.reason == "CREDENTIALS_INVALID"


async def test_an_email_signs_up_once(call_without_token: Transport, user: User) -> None:
    refusal = await refusal_of(
        call_without_token, auth.SignUpRequest(email=user.email.upper(), password=PASSWORD)
    )
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "RESOURCE_EXISTS")


async def test_a_call_without_a_token_is_refused(call_without_token: Transport) -> None:
    refusal = await refusal_of(call_without_token, users.GetUserRequest())
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED


async def test_a_session_moves_on_with_every_refresh(
    call_without_token: Transport, user: User
) -> None:
    async def refresh(token: str) -> str:
        answer = await call_without_token(auth.RefreshTokenRequest(refresh_token=token))
        return str(answer.tokens.refresh_token)

    first = user.tokens.refresh_token
    second = await refresh(first)
    third = await refresh(second)
    assert len({first, second, third}) == 3
    # Whoever still has the first is not the one who holds the third: the session ends for both.
    for token in (first, third):
        refusal = await refusal_of(
            call_without_token, auth.RefreshTokenRequest(refresh_token=token)
        )
        assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
        assert refusal.reason == "REFRESH_TOKEN_INVALID"


async def test_a_session_that_was_logged_out_is_over(
    call_without_token: Transport, user: User
) -> None:
    token = user.tokens.refresh_token
    await call_without_token(auth.LogOutRequest(refresh_token=token))
    refusal = await refusal_of(call_without_token, auth.RefreshTokenRequest(refresh_token=token))
    assert refusal.reason == "REFRESH_TOKEN_INVALID"


async def test_the_keys_of_tokens_are_public(call_without_token: Transport) -> None:
    keys = (await call_without_token(auth.GetJwksRequest())).keys
    assert [(key.kty, key.crv, key.alg, key.use) for key in keys] == [
        ("EC", "P-256", "ES256", "sig")
    ]


# --- consent -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["grpc", "rest"])
async def test_nothing_is_kept_without_consent(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, transport: str
) -> None:
    user = await sign_up(http, channel, consenting=False)
    call = user.transports[transport]
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="a secret"))
    refusal = await refusal_of(call, request)
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "CONSENT_MISSING"
    await call(GRANT)
    assert (await call(request)).created


async def test_a_withdrawn_consent_counts_at_once(call: Transport) -> None:
    withdrawal = users.RecordConsentRequest()
    withdrawal.CopyFrom(GRANT)
    withdrawal.granted = False
    recorded = (await call(withdrawal)).consent
    assert (recorded.granted, recorded.version) == (False, 2)
    listed = await call(users.ListConsentsRequest())
    assert list(listed.consents) == [recorded]
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="a secret"))
    assert (await refusal_of(call, request)).reason == "CONSENT_MISSING"


# --- memories ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT])
async def test_a_memory_is_kept_as_given(call: Transport, tier: pb.Tier.ValueType) -> None:
    kept = await keep(call, "Ann sails on Sundays", tier=tier, tags=["sea", "ann"], speaker="Bo")
    assert (await call(pb.GetMemoryRequest(id=kept.id))).memory == kept
    assert (kept.tier, kept.speaker, list(kept.tags)) == (tier, "Bo", ["ann", "sea"])
    assert kept.HasField("expire_time") is (tier == pb.TIER_SHORT_TERM)


async def test_both_transports_show_the_same_memory(user: User) -> None:
    kept = await keep(user.grpc, "Ann sails on Sundays", session_id="s", session_position=0)
    shown = await user.rest(pb.GetMemoryRequest(id=kept.id))
    assert shown.memory == kept


async def test_a_request_id_makes_one_memory(user: User) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="once"), request_id="one")
    first = await user.grpc(request)
    second = await user.rest(request)
    assert first.memory.id == second.memory.id
    refusal = await refusal_of(
        user.rest, pb.CreateMemoryRequest(memory=pb.Memory(content="twice"), request_id="one")
    )
    assert refusal.reason == "REQUEST_ID_REUSED"


async def test_memories_are_listed_page_by_page(call: Transport) -> None:
    kept = [(await keep(call, f"memory {number}", tags=["sea"])).id for number in range(5)]
    await keep(call, "of something else")
    seen: list[str] = []
    token = ""
    while not seen or token:
        page = await call(pb.ListMemoriesRequest(page_size=2, page_token=token, tags=["sea"]))
        seen += [memory.id for memory in page.memories]
        token = page.next_page_token
    assert seen == kept[::-1]


async def test_an_update_changes_what_its_mask_names(call: Transport) -> None:
    before = await keep(call, "Ann sails", tags=["ann"], speaker="Bo")
    changed = update(before, "content", "tags", content="Ann rows", tags=["boat"], speaker="Cy")
    after = (await call(changed)).memory
    assert (after.content, list(after.tags), after.speaker) == ("Ann rows", ["boat"], "Bo")
    assert (await call(pb.GetMemoryRequest(id=before.id))).memory == after


async def test_a_stale_etag_is_refused(call: Transport) -> None:
    stale = await keep(call, "Ann sails")
    await call(update(stale, "content", content="Ann rows"))
    refusal = await refusal_of(call, update(stale, "content", content="Ann swims"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")


async def test_a_deleted_memory_is_gone(call: Transport) -> None:
    kept = await keep(call, "forget this")
    await call(pb.DeleteMemoryRequest(id=kept.id))
    for request in (pb.GetMemoryRequest(id=kept.id), pb.DeleteMemoryRequest(id=kept.id)):
        refusal = await refusal_of(call, request)
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.NOT_FOUND,
            "RESOURCE_NOT_FOUND",
        )


async def test_a_question_finds_its_memory_first(call: Transport) -> None:
    answer = await keep(call, "The boat is called Marigold and leaks a little")
    await keep(call, "Tomatoes want sun and string")
    found = await call(pb.QueryMemoriesRequest(query="what is the boat called?", top_k=1))
    assert [match.memory.id for match in found.matches] == [answer.id]
    assert found.matches[0].reason


async def test_an_import_tells_what_became_of_every_memory(call: Transport) -> None:
    outcome = await call(
        pb.ImportMemoriesRequest(memories=[pb.Memory(content="one"), pb.Memory(content=" ")]),
        pb.ImportMemoriesRequest(
            first_index=2, memories=[pb.Memory(content="two"), pb.Memory(content="one")]
        ),
    )
    assert (outcome.created, outcome.existing, outcome.refused) == (2, 1, 1)
    assert [refusal.index for refusal in outcome.refusals] == [1]


# --- attachments -------------------------------------------------------------------------------


async def test_a_file_goes_up_and_comes_down(call: Transport) -> None:
    memory = await keep(call, "notes of the boat trip")
    announced = await call(announcement(memory))
    assert announced.attachment.state == pb.ATTACHMENT_STATE_PENDING
    async with httpx.AsyncClient(timeout=60) as s3:
        assert (await s3.put(announced.upload_url, content=FILE)).is_success
        await call(pb.CompleteAttachmentRequest(id=announced.attachment.id))
        shown = await call(pb.GetAttachmentRequest(id=announced.attachment.id))
        assert shown.attachment.state == pb.ATTACHMENT_STATE_COMPLETE
        down = await s3.get(shown.download_url)
    assert down.content == FILE
    assert down.headers["content-disposition"].startswith("attachment")


async def test_another_file_than_announced_is_not_taken(call: Transport) -> None:
    memory = await keep(call, "notes of the boat trip")
    announced = await call(announcement(memory))
    async with httpx.AsyncClient(timeout=60) as s3:
        await s3.put(announced.upload_url, content=FILE[::-1])
    complete = pb.CompleteAttachmentRequest(id=announced.attachment.id)
    refusal = await refusal_of(call, complete)
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "UPLOAD_MISMATCH"
    shown = await call(pb.GetAttachmentRequest(id=announced.attachment.id))
    assert shown.download_url == ""


# --- meditation, jobs, audit -------------------------------------------------------------------


async def meditated(call: Transport) -> pb.Meditation:
    """Start a meditation and return it when it is over."""
    run = (await call(pb.MeditateRequest(request_id="tonight"))).meditation

    async def look() -> pb.Meditation:
        seen: pb.Meditation = (await call(pb.GetMeditationRequest(id=run.id))).meditation
        return seen

    return await eventually(look, lambda seen: seen.state == pb.MEDITATION_STATE_SUCCEEDED)


async def test_a_meditation_scores_every_memory(call: Transport) -> None:
    kept = [await keep(call, text) for text in ("I love this boat", "I hate the rain")]
    run = await meditated(call)
    assert (run.scored, run.shards_done) == (len(kept), run.shards)
    scores = [(await call(pb.GetMemoryRequest(id=memory.id))).memory.score for memory in kept]
    assert all(0 < score.value <= 1 for score in scores)
    assert run.mean_score == pytest.approx(sum(score.value for score in scores) / len(scores))


async def test_a_user_sees_the_jobs_of_a_meditation(call: Transport) -> None:
    await keep(call, "something to score")
    await meditated(call)

    async def look() -> list[jobs.Job]:
        return list((await call(jobs.ListJobsRequest())).jobs)

    listed = await eventually(
        look, lambda seen: all(job.state == jobs.JOB_STATE_SUCCEEDED for job in seen)
    )
    assert {job.kind for job in listed} == {"meditation.shard"}
    assert (await call(jobs.GetJobRequest(id=listed[0].id))).job == listed[0]


async def test_the_audit_chain_of_a_users_writes_holds(call: Transport) -> None:
    kept = await keep(call, "remember this")
    await call(pb.DeleteMemoryRequest(id=kept.id))
    events = (await call(users.ListAuditEventsRequest())).events
    acts = [event.action for event in events if event.resource == kept.id]
    assert acts == ["memory.delete", "memory.create"]
    found = await call(users.VerifyAuditLogRequest())
    assert (found.intact, found.verified_events, found.problem) == (True, len(events), "")


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.CreateMemoryRequest(memory=pb.Memory(content="")), "memory.content"),
        (pb.CreateMemoryRequest(memory=pb.Memory(content="é" * 32769)), "memory.content"),
        (pb.CreateMemoryRequest(memory=pb.Memory(content="a\0b")), "memory.content"),
        (pb.CreateMemoryRequest(memory=pb.Memory(content="a", tier=99)), "memory.tier"),  # type: ignore[arg-type]
        (pb.CreateMemoryRequest(memory=pb.Memory(content="a", tags=[""])), "memory.tags"),
        (pb.CreateMemoryRequest(request_id="r" * 65), "request_id"),
        (pb.GetMemoryRequest(id="nonsense"), "id"),
        (pb.GetMemoryRequest(id=f"att_{UNKNOWN}"), "id"),
        (pb.ListMemoriesRequest(page_size=1001), "page_size"),
        (pb.ListMemoriesRequest(page_token="AAAA"), "page_token"),
        (pb.QueryMemoriesRequest(query="a", top_k=101), "top_k"),
        (update(pb.Memory(id=f"mem_{UNKNOWN}"), "score"), "update_mask"),
        (users.RecordConsentRequest(granted=True), "purpose"),
        (auth.SignUpRequest(email="nobody", password=PASSWORD), "email"),
        (auth.SignUpRequest(email="a@example.com", password="short"), "password"),
        (jobs.GetJobRequest(id=f"mem_{UNKNOWN}"), "id"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_bad_input_is_refused_with_the_field_at_fault(
    call: Transport, request_: Message, field: str
) -> None:
    refusal = await refusal_of(call, request_)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == (field,)
    assert refusal.reason == ("PAGE_TOKEN_INVALID" if field == "page_token" else "FIELD_INVALID")


async def test_a_page_token_of_another_list_is_refused(call: Transport) -> None:
    for number in range(2):
        await keep(call, f"memory {number}")
    page = await call(pb.ListMemoriesRequest(page_size=1))
    for other in (
        pb.ListMemoriesRequest(page_token=page.next_page_token, tags=["sea"]),
        pb.ListMemoriesRequest(page_token=page.next_page_token, shared=True),
        users.ListAuditEventsRequest(page_token=page.next_page_token),
    ):
        assert (await refusal_of(call, other)).reason == "PAGE_TOKEN_INVALID"
