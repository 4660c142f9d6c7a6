"""Once a withdrawal of consent is acknowledged, nothing is kept or looked up."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping

import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from server.access import METHODS, Scope, scope_of
from tests.abuse.estates import aim, archive, keep, talk
from tests.abuse.meanings import FIELDS, Means, put, request_of
from tests.abuse.meanings import METHODS as DESCRIPTORS
from tests.mesh import GRANT, User, eventually, sign_up
from tests.transports import Refused, path_of

WITHDRAWAL = users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=False)
LETS_GO = {
    "ArchiveMemory",
    "DeleteMemory",
    "DeleteEmbeddings",
    "DeleteAttachment",
    "DeleteTranscript",
    "DeleteGoal",
}
"""What users may do with what is still theirs."""
NEEDS_MORE = {
    # Nobody has something of which this would be true.
    "CompleteAttachment": "tests/memory/test_attachments",
    "UndoMeditation": "tests/memory/test_tidying",
    # Without a transcript it lets go.
    "EndSession": "tests/memory/test_transcripts",
}
WRITERS = 8
ENOUGH = 10 * WRITERS
"""Writes that are acknowledged before the withdrawal."""
REFUSALS = 5


def uses() -> set[str]:
    """Return the methods that keep something, or look something up for its user."""
    writes = {method for method in METHODS if scope_of(method) is Scope.MEMORY_WRITE}
    names = {method.rpartition("/")[2] for method in writes} | {"QueryMemories"}
    return names - LETS_GO - NEEDS_MORE.keys()


@pytest_asyncio.fixture(scope="module")
async def una(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Somebody who consented to everything."""
    user = await sign_up(http, channel)
    await user.grpc(
        users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=True)
    )
    return user


@pytest_asyncio.fixture(scope="module")
async def kept(una: User) -> Mapping[str, str]:
    """What she has, by the method that would use it; she withdrew after keeping it."""
    memory, away, goal, session = await asyncio.gather(keep(una), archive(una), aim(una), talk(una))
    # Asked twice, the second answer comes from Valkey.
    for _ in range(2):
        assert (await una.grpc(request_of(DESCRIPTORS["QueryMemories"]))).matches
    await una.grpc(WITHDRAWAL)
    return {"RestoreMemory": away, "UpdateGoal": goal, "AppendToSession": session, "": memory}


@pytest.mark.parametrize("transport", ["grpc", "rest"])
@pytest.mark.parametrize("method", sorted(uses()))
async def test_what_needs_consent_is_refused_at_once(
    una: User, kept: Mapping[str, str], method: str, transport: str
) -> None:
    request = request_of(DESCRIPTORS[method])
    for path, means in FIELDS.get(method, {}).items():
        if means in {Means.MEMORY, Means.GOAL, Means.SESSION}:
            put(request, path, kept.get(method, kept[""]))
    with pytest.raises(Refused) as refused:
        await una.transports[transport](request)
    answer = refused.value.refusal
    assert (answer.code, answer.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "CONSENT_MISSING",
    ), answer


def test_every_method_that_keeps_something_is_asked() -> None:
    assert {path_of(DESCRIPTORS[name]) for name in uses()} <= METHODS.keys()
    assert len(uses()) >= 13


async def test_nothing_is_kept_by_writes_in_flight_that_begin_after_the_withdrawal(
    http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> None:
    user = await sign_up(http, channel)
    begun_and_kept: list[float] = []
    reasons: set[str] = set()

    async def write(number: int) -> None:
        """Write until that was refused a few times."""
        call, refusals = list(user.transports.values())[number % 2], 0
        while refusals < REFUSALS:
            began = time.monotonic()
            memory = pb.Memory(content=f"in flight {secrets.token_hex(8)}")
            request: Message = pb.CreateMemoryRequest(memory=memory)
            try:
                await call(request)
                begun_and_kept.append(began)
            except Refused as refused:
                reasons.add(refused.refusal.reason)
                refusals += 1

    async def kept() -> int:
        return len(begun_and_kept)

    async with asyncio.timeout(60), asyncio.TaskGroup() as writers:
        for number in range(WRITERS):
            writers.create_task(write(number))
        await eventually(kept, lambda count: count >= ENOUGH)
        await user.grpc(WITHDRAWAL)
        acknowledged = time.monotonic()
    assert reasons == {"CONSENT_MISSING"}
    assert max(begun_and_kept) < acknowledged
    # And nothing else is there than what was acknowledged.
    listed = await user.grpc(pb.ListMemoriesRequest(page_size=1000))
    assert len(listed.memories) == len(begun_and_kept)
    await user.grpc(GRANT)
    assert (await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="again")))).created


async def test_who_withdrew_may_still_see_it_take_it_along_and_let_go_of_it(
    una: User, kept: Mapping[str, str]
) -> None:
    for call in una.transports.values():
        assert (await call(pb.GetMemoryRequest(id=kept[""]))).memory.id == kept[""]
    exported = [answer async for answer in una.grpc.stream(pb.ExportMemoriesRequest())]
    assert exported
    asked = (await una.rest(privacy.CreateExportRequest())).export

    async def look() -> privacy.Export:
        shown: privacy.Export = (await una.rest(privacy.GetExportRequest(id=asked.id))).export
        return shown

    ready = await eventually(look, lambda seen: seen.state != privacy.EXPORT_STATE_PENDING, 60)
    assert ready.state == privacy.EXPORT_STATE_READY
    gone = await una.rest(pb.DeleteMemoryRequest(id=kept[""]))
    assert gone == pb.DeleteMemoryResponse()
