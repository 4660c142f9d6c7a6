"""What is another's looks exactly like what does not exist, for every method that takes an id."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import grpc
import pytest
import pytest_asyncio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from tests.mesh import User
from tests.transports import path_of, public_methods, to_http

SHA256 = hashlib.sha256(b"x").hexdigest()
# What a request needs beside the id, so that nothing else is wrong with it.
FILLED: Mapping[str, Message] = {
    "UpdateMemory": pb.UpdateMemoryRequest(
        memory=pb.Memory(content="mine now"), update_mask=FieldMask(paths=["content"])
    ),
    "CreateAttachment": pb.CreateAttachmentRequest(
        file_name="a", content_type="text/plain", size_bytes=1, sha256=SHA256
    ),
}
RESOURCES = ("Memory", "Attachment", "Meditation", "Job")


Property = Mapping[str, str]
"""Ids of what somebody has, by the name of the resource."""


@pytest_asyncio.fixture(scope="module")
async def anns(ann: User) -> Property:
    memory = pb.Memory(content="Ann's own")
    made = await ann.grpc(pb.CreateMemoryRequest(memory=memory))
    announced = await ann.grpc(request_for(CREATE_ATTACHMENT, made.memory.id))
    run = await ann.grpc(pb.MeditateRequest())
    (job, *_) = (await ann.grpc(jobs.ListJobsRequest())).jobs
    owned = (made.memory.id, announced.attachment.id, run.meditation.id, job.id)
    return dict(zip(RESOURCES, owned, strict=True))


def path_to_id(method: MethodDescriptor) -> str:
    """Return where in a request the id of an existing resource stands; empty if nowhere."""
    fields = method.input_type.fields_by_name
    if "id" in fields:
        return "id"
    if method.name.startswith("Update") and "memory" in fields:
        return "memory.id"
    return next((name for name in fields if name.endswith("_id") and name in OWNED_BY), "")


OWNED_BY = {"memory_id": "Memory"}
TAKES_ID = {path_of(each): each for each in public_methods() if path_to_id(each)}
CREATE_ATTACHMENT = TAKES_ID["/kimberly.memory.v1.MemoryService/CreateAttachment"]


def resource_of(method: MethodDescriptor) -> str:
    owner = OWNED_BY.get(path_to_id(method))
    return owner or next(each for each in RESOURCES if method.name.endswith(each))


def request_for(method: MethodDescriptor, resource_id: str) -> Message:
    request = message_factory.GetMessageClass(method.input_type)()
    if method.name in FILLED:
        request.CopyFrom(FILLED[method.name])
    *parents, last = path_to_id(method).split(".")
    holder = request
    for parent in parents:
        holder = getattr(holder, parent)
    setattr(holder, last, resource_id)
    return request


def missing_like(resource_id: str) -> str:
    """Return an id of the same kind that nobody has."""
    return ids.show(resource_id.partition("_")[0], ids.new_id())


def test_every_method_that_takes_an_id_is_asked() -> None:
    assert {path.rpartition("/")[2] for path in TAKES_ID} == {
        "GetMemory",
        "UpdateMemory",
        "DeleteMemory",
        "CreateAttachment",
        "CompleteAttachment",
        "GetAttachment",
        "GetMeditation",
        "GetJob",
    }


def without_number(headers: Mapping[str, object]) -> dict[str, object]:
    """Return what does not tell one call from the next."""
    return {name: value for name, value in headers.items() if name not in {"date", "x-request-id"}}


async def over_grpc(user: User, method: MethodDescriptor, request: Message) -> dict[str, object]:
    """Return all that a refused gRPC call says."""
    call = user.grpc.channel.unary_unary(path_of(method), bytes, bytes)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call(request.SerializeToString(), metadata=user.grpc.metadata, timeout=5)
    error = refused.value
    trailers = dict(cast("Any", error.trailing_metadata() or ()))
    return {"code": error.code(), "message": error.details(), **without_number(trailers)}


async def over_rest(user: User, method: MethodDescriptor, request: Message) -> dict[str, object]:
    """Return all that a refused REST call says."""
    response = await user.rest.raw(*to_http(method, request))
    told = without_number(dict(response.headers))
    return {"code": response.status_code, "body": response.text, **told}


@pytest.mark.parametrize("path", TAKES_ID)
async def test_anothers_is_as_good_as_missing_over_grpc(
    bob: User, anns: Property, path: str
) -> None:
    method = TAKES_ID[path]
    foreign = anns[resource_of(method)]
    told = await over_grpc(bob, method, request_for(method, foreign))
    assert told["code"] is grpc.StatusCode.NOT_FOUND
    assert told == await over_grpc(bob, method, request_for(method, missing_like(foreign)))


@pytest.mark.parametrize("path", TAKES_ID)
async def test_anothers_is_as_good_as_missing_over_rest(
    bob: User, anns: Property, path: str
) -> None:
    method = TAKES_ID[path]
    foreign = anns[resource_of(method)]
    told = await over_rest(bob, method, request_for(method, foreign))
    assert told["code"] == 404
    assert told == await over_rest(bob, method, request_for(method, missing_like(foreign)))


@pytest.mark.parametrize("path", TAKES_ID)
async def test_an_id_of_another_kind_is_no_id(bob: User, anns: Property, path: str) -> None:
    method = TAKES_ID[path]
    others = [anns[each] for each in RESOURCES if each != resource_of(method)]
    for other in (*others, "", "*", missing_like(bob.id)):
        told = await over_grpc(bob, method, request_for(method, other))
        assert told["code"] is grpc.StatusCode.INVALID_ARGUMENT
        assert str(told["message"]).startswith(f"{path_to_id(method)}: must be ")


async def test_ann_still_has_what_is_hers(ann: User, anns: Property) -> None:
    # And the ids were the right ones: what Bob was refused is there.
    memory = (await ann.grpc(pb.GetMemoryRequest(id=anns["Memory"]))).memory
    assert (memory.content, memory.version) == ("Ann's own", 1)
    shown = await ann.grpc(pb.GetAttachmentRequest(id=anns["Attachment"]))
    assert shown.attachment.state == pb.ATTACHMENT_STATE_PENDING
    await ann.grpc(pb.GetMeditationRequest(id=anns["Meditation"]))
    await ann.grpc(jobs.GetJobRequest(id=anns["Job"]))


async def test_bob_lists_and_finds_nothing_of_anns(bob: User, anns: Property) -> None:
    listed = await bob.grpc(pb.ListMemoriesRequest(page_size=1000))
    found = await bob.grpc(pb.QueryMemoriesRequest(query="Ann's own", top_k=100))
    seen = {memory.id for memory in listed.memories} | {m.memory.id for m in found.matches}
    assert anns["Memory"] not in seen
    assert not (await bob.grpc(jobs.ListJobsRequest())).jobs


async def test_anns_page_token_shows_bob_nothing(ann: User, bob: User) -> None:
    for number in range(2):
        memory = pb.Memory(content=f"Ann's {number}")
        await ann.grpc(pb.CreateMemoryRequest(memory=memory))
    token = (await ann.grpc(pb.ListMemoriesRequest(page_size=1))).next_page_token
    response = await bob.rest.raw("GET", "/v1/memories", params={"pageToken": token})
    assert response.status_code == 400
    assert "PAGE_TOKEN_INVALID" in response.text


async def test_anns_request_id_is_bobs_to_use(ann: User, bob: User) -> None:
    memory = pb.Memory(content="the same words")
    request = pb.CreateMemoryRequest(memory=memory, request_id="shared")
    anns, bobs = (await ann.grpc(request)).memory, (await bob.grpc(request)).memory
    assert anns.id != bobs.id
    await bob.grpc(pb.DeleteMemoryRequest(id=bobs.id))


async def test_bob_cannot_put_another_file_under_anns_url(
    ann: User, bob: User, anns: Property
) -> None:
    memory = pb.Memory(content="Bob's own")
    kept = (await bob.grpc(pb.CreateMemoryRequest(memory=memory))).memory
    file = request_for(CREATE_ATTACHMENT, kept.id)
    announced = await bob.grpc(file)
    mine, hers = announced.attachment.id[4:], anns["Attachment"][4:]
    assert mine in announced.upload_url
    url = announced.upload_url.replace(mine, hers)
    for bobs, anns_own in ((bob.id, ann.id), (bob.tenant_id, ann.tenant_id)):
        url = url.replace(bobs[4:], anns_own[4:])
    assert (await bob.rest.http.put(url, content=b"x")).status_code == 403
    await bob.grpc(pb.DeleteMemoryRequest(id=kept.id))
