"""Bad input gets a status with a reason and the field."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import UTC, datetime

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from tests.conftest import bearer
from tests.refusals import refusal_of

ID = "mem_" + "0" * 32
FAR = Timestamp(seconds=int(datetime(9999, 1, 1, tzinfo=UTC).timestamp()))

BAD_MEMORIES = {
    "memory.content": [
        pb.Memory(),
        pb.Memory(content=" \n\t"),
        pb.Memory(content="x" * (64 * 1024 + 1)),
        pb.Memory(content="é" * (32 * 1024 + 1)),
        pb.Memory(content="a\0b"),
    ],
    "memory.tier": [pb.Memory(content="x", tier=99)],  # type: ignore[arg-type]
    "memory.source": [pb.Memory(content="x", source=99)],  # type: ignore[arg-type]
    "memory.tags": [
        pb.Memory(content="x", tags=[""]),
        pb.Memory(content="x", tags=["t" * 65]),
        pb.Memory(content="x", tags=[str(n) for n in range(33)]),
        pb.Memory(content="x", tags=["a\0"]),
    ],
    "memory.session_id": [pb.Memory(content="x", session_id="s" * 129)],
    "memory.session_position": [
        pb.Memory(content="x", session_position=1),
        pb.Memory(content="x", session_id="s", session_position=-1),
    ],
    "memory.speaker": [pb.Memory(content="x", speaker="s" * 129)],
    "memory.occur_time": [
        pb.Memory(content="x", occur_time=FAR),
        pb.Memory(content="x", occur_time=Timestamp(seconds=1 << 60)),
    ],
}


@pytest.mark.parametrize(
    ("field", "memory"),
    [(field, memory) for field, memories in BAD_MEMORIES.items() for memory in memories],
)
async def test_memory_that_cannot_be_kept_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, field: str, memory: pb.Memory
) -> None:
    request = pb.CreateMemoryRequest(memory=memory)
    refusal = await refusal_of(memories.CreateMemory(request, metadata=bearer(caller)))
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


@pytest.mark.parametrize(
    "bad", ["", "mem_", "mem_xyz", ID.upper(), ID + "0", ID[:-1] + "g", "usr_" + "0" * 32, "'; --"]
)
async def test_malformed_id_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, bad: str
) -> None:
    metadata = bearer(caller)
    calls: list[tuple[Awaitable[object], str]] = [
        (memories.GetMemory(pb.GetMemoryRequest(id=bad), metadata=metadata), "id"),
        (memories.DeleteMemory(pb.DeleteMemoryRequest(id=bad), metadata=metadata), "id"),
        (
            memories.UpdateMemory(
                pb.UpdateMemoryRequest(
                    memory=pb.Memory(id=bad, content="x"), update_mask=FieldMask(paths=["content"])
                ),
                metadata=metadata,
            ),
            "memory.id",
        ),
    ]
    for call, field in calls:
        refusal = await refusal_of(call)
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.fields == (field,)


async def test_page_token_of_another_list_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    metadata = bearer(caller)
    for content in ("one", "two"):
        await memories.CreateMemory(
            pb.CreateMemoryRequest(memory=pb.Memory(content=content)), metadata=metadata
        )
    page = await memories.ListMemories(pb.ListMemoriesRequest(page_size=1), metadata=metadata)
    for request in (
        pb.ListMemoriesRequest(page_token=page.next_page_token, tags=["other"]),
        pb.ListMemoriesRequest(page_token="garbage"),
        pb.ListMemoriesRequest(page_token="ÿ"),
    ):
        refusal = await refusal_of(memories.ListMemories(request, metadata=metadata))
        assert (refusal.reason, refusal.fields) == ("PAGE_TOKEN_INVALID", ("page_token",))


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.ListMemoriesRequest(page_size=-1), "page_size"),
        (pb.ListMemoriesRequest(page_size=1001), "page_size"),
        (pb.ListMemoriesRequest(tier=42), "tier"),  # type: ignore[arg-type]
        (pb.ListMemoriesRequest(tags=[""]), "tags"),
    ],
)
async def test_list_that_cannot_exist_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub,
    caller: Caller,
    request_: pb.ListMemoriesRequest,
    field: str,
) -> None:
    refusal = await refusal_of(memories.ListMemories(request_, metadata=bearer(caller)))
    assert refusal.fields == (field,)


@pytest.mark.parametrize("paths", [[], ["id"], ["content", "version"], ["memory.content"]])
async def test_update_mask_names_changeable_fields_only(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller, paths: list[str]
) -> None:
    request = pb.UpdateMemoryRequest(
        memory=pb.Memory(id=ID, content="x"), update_mask=FieldMask(paths=paths)
    )
    refusal = await refusal_of(memories.UpdateMemory(request, metadata=bearer(caller)))
    assert refusal.fields == ("update_mask",)


async def test_query_of_impossible_size_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    for request, field in [
        (pb.QueryMemoriesRequest(query="x", top_k=101), "top_k"),
        (pb.QueryMemoriesRequest(query="x", top_k=-1), "top_k"),
        (pb.QueryMemoriesRequest(query="x" * (256 * 1024 + 1)), "query"),
        (pb.QueryMemoriesRequest(query="x", tiers=[7]), "tiers"),  # type: ignore[list-item]
    ]:
        refusal = await refusal_of(memories.QueryMemories(request, metadata=bearer(caller)))
        assert refusal.fields == (field,)


async def test_attachment_that_cannot_be_kept_is_refused_by_field(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    good = {
        "memory_id": ID,
        "file_name": "a.txt",
        "content_type": "text/plain",
        "size_bytes": 1,
        "sha256": "0" * 64,
    }
    for field, bad in [
        ("memory_id", "x"),
        ("file_name", ""),
        ("file_name", "a\r\nb"),
        ("content_type", "x" * 256),
        ("size_bytes", 0),
        ("size_bytes", 100 * 1024 * 1024 + 1),
        ("sha256", "0" * 63),
        ("sha256", "zz" * 32),
    ]:
        request = pb.CreateAttachmentRequest(**{**good, field: bad})  # type: ignore[arg-type]
        refusal = await refusal_of(memories.CreateAttachment(request, metadata=bearer(caller)))
        assert refusal.fields == (field,)


async def test_too_long_request_id_is_refused(
    memories: rpc.MemoryServiceAsyncStub, caller: Caller
) -> None:
    request = pb.CreateMemoryRequest(memory=pb.Memory(content="x"), request_id="r" * 65)
    refusal = await refusal_of(memories.CreateMemory(request, metadata=bearer(caller)))
    assert refusal.fields == ("request_id",)
