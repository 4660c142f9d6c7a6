"""What the chain does for every kind of RPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import grpc
import pytest
from kimberly.memory.v1 import memory_pb2, memory_pb2_grpc
from kimberly.scoring.v1 import scoring_pb2, scoring_pb2_grpc
from prometheus_client import REGISTRY

from server import access, ids
from server.caller import Caller, current_caller
from server.errors import NotFound, StoreUnavailable
from server.rpc.interceptors import STREAMS, chain
from server.rpc.serving import Server, UnsafeSocketDirectory
from tests.conftest import WORKER_ID, PlainTokens, Serve, as_worker, bearer
from tests.refusals import refusal_of

CALLER = Caller(tenant_id=ids.new_id(), user_id=ids.new_id())
GET = "/kimberly.memory.v1.MemoryService/GetMemory"
WATCH = "/kimberly.memory.v1.MemoryService/WatchMemories"
IMPORT = "/kimberly.memory.v1.MemoryService/ImportMemories"
SCORE = "/kimberly.scoring.v1.ScoringService/Score"
MALFORMED = b"\xff\xff\xff"


class Memories(memory_pb2_grpc.MemoryServiceServicer):
    """Does what the id of the request says."""

    async def GetMemory(
        self, request: memory_pb2.GetMemoryRequest, context: Any
    ) -> memory_pb2.GetMemoryResponse:
        match request.id:
            case "raise":
                raise NotFound("memory")
            case "bug":
                raise ZeroDivisionError("secret text of a failure")
            case "away":
                raise StoreUnavailable("the database")
            case "hang":
                await asyncio.Event().wait()
        return memory_pb2.GetMemoryResponse(
            memory=memory_pb2.Memory(id=ids.show(ids.USER, current_caller().user_id))
        )

    async def WatchMemories(
        self, request: memory_pb2.WatchMemoriesRequest, context: Any
    ) -> AsyncIterator[memory_pb2.WatchMemoriesResponse]:
        yield memory_pb2.WatchMemoriesResponse(cursor="begun")
        await asyncio.Event().wait()

    async def ImportMemories(
        self, request_iterator: AsyncIterator[memory_pb2.ImportMemoriesRequest], context: Any
    ) -> memory_pb2.ImportMemoriesResponse:
        chunks = [chunk async for chunk in request_iterator]
        return memory_pb2.ImportMemoriesResponse(created=len(chunks))


class Scoring(scoring_pb2_grpc.ScoringServiceServicer):
    """Answers each message, and fails at the third."""

    async def Score(
        self, request_iterator: AsyncIterator[scoring_pb2.ScoreRequest], context: Any
    ) -> AsyncIterator[scoring_pb2.ScoreResponse]:
        count = 0
        async for _ in request_iterator:
            count += 1
            if count == 3:
                raise NotFound("batch")
            yield scoring_pb2.ScoreResponse(done=scoring_pb2.Done(scored=count))


# Only the methods that are called are there.
def memories() -> memory_pb2_grpc.MemoryServiceServicer:
    return Memories()  # type: ignore[abstract] # see above


def scoring() -> scoring_pb2_grpc.ScoringServiceServicer:
    return Scoring()  # type: ignore[abstract] # see above


@pytest.fixture
def private(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    tmp_path.chmod(0o755)
    return tmp_path


@pytest.fixture
async def channel(serve: Serve) -> grpc.aio.Channel:
    def register(server: grpc.aio.Server) -> None:
        memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories(), server)
        scoring_pb2_grpc.add_ScoringServiceServicer_to_server(scoring(), server)

    return await serve(register)


def get(channel: grpc.aio.Channel, memory_id: str, **options: Any) -> Any:
    stub = memory_pb2_grpc.MemoryServiceStub(channel)
    options.setdefault("metadata", bearer(CALLER))
    return stub.GetMemory(memory_pb2.GetMemoryRequest(id=memory_id), **options)


async def until(holds: Callable[[], bool]) -> None:
    """Return when something holds that tells nobody."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - nobody sets an event
            await asyncio.sleep(0.005)


async def test_call_with_a_token_knows_its_user(channel: grpc.aio.Channel) -> None:
    answer = await get(channel, "fine")
    assert answer.memory.id == ids.show(ids.USER, CALLER.user_id)


async def test_call_without_a_valid_token_is_unauthenticated(channel: grpc.aio.Channel) -> None:
    for metadata in [
        (),
        (("authorization", "Bearer nonsense"),),
        (("authorization", "Basic YTpi"),),
        (("x-user-id", str(CALLER.user_id)), ("x-tenant-id", str(CALLER.tenant_id))),
    ]:
        refusal = await refusal_of(get(channel, "fine", metadata=metadata))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "TOKEN_INVALID",
        )


async def test_problem_becomes_a_status_with_its_reason(channel: grpc.aio.Channel) -> None:
    refusal = await refusal_of(get(channel, "raise"))
    assert (refusal.code, refusal.reason, refusal.message) == (
        grpc.StatusCode.NOT_FOUND,
        "RESOURCE_NOT_FOUND",
        "there is no such memory",
    )
    away = await refusal_of(get(channel, "away"))
    assert (away.code, away.reason) == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")


async def test_only_what_may_pass_by_itself_says_when_to_come_back(
    channel: grpc.aio.Channel,
) -> None:
    for request, delay in (("away", "1"), ("raise", None), ("bug", None)):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(channel, request)
        trailing: Any = dict(cast("Any", caught.value.trailing_metadata()))
        assert trailing.get("retry-after") == delay


async def test_unforeseen_failure_tells_the_caller_nothing(channel: grpc.aio.Channel) -> None:
    refusal = await refusal_of(get(channel, "bug"))
    assert (refusal.code, refusal.message) == (grpc.StatusCode.INTERNAL, "internal error")


async def test_call_ends_at_the_deadline_of_its_client(channel: grpc.aio.Channel) -> None:
    started = asyncio.get_running_loop().time()
    refusal = await refusal_of(get(channel, "hang", timeout=0.2))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    # Ours would come after ten seconds.
    assert asyncio.get_running_loop().time() - started < 5


async def test_calls_are_counted_as_they_ended(channel: grpc.aio.Channel) -> None:
    def counted(code: str) -> float:
        labels = {"method": "MemoryService/GetMemory", "code": code}
        return REGISTRY.get_sample_value("kimberly_rpc_seconds_count", labels) or 0

    codes = ("OK", "NOT_FOUND", "UNAUTHENTICATED", "INTERNAL", "CANCELLED")
    before = [counted(code) for code in codes]
    await get(channel, "fine")
    await refusal_of(get(channel, "raise"))
    await refusal_of(get(channel, "fine", metadata=()))
    await refusal_of(get(channel, "bug"))
    hanging = get(channel, "hang")
    await until(lambda: REGISTRY.get_sample_value("kimberly_rpcs_in_flight") == 1)
    hanging.cancel()
    await until(lambda: REGISTRY.get_sample_value("kimberly_rpcs_in_flight") == 0)
    assert [counted(code) for code in codes] == [each + 1 for each in before]


async def test_call_without_a_deadline_gets_ours(private: Path) -> None:
    layers = chain(PlainTokens(), worker_id=WORKER_ID, unary_seconds=0.1, stream_seconds=0.1)
    server = Server(private / "s", layers, services=())
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories(), server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{private / 's'}") as channel:
        refusal = await refusal_of(get(channel, "hang"))
    await server.grpc.stop(None)
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "DEADLINE_EXCEEDED",
    )


async def test_bytes_that_are_no_message_are_refused(channel: grpc.aio.Channel) -> None:
    unary = channel.unary_unary(GET, None, None)(MALFORMED, metadata=bearer(CALLER))
    stream = channel.stream_unary(IMPORT, None, None)(iter([MALFORMED]), metadata=bearer(CALLER))
    for call in (unary, stream):
        refusal = await refusal_of(call)
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "MESSAGE_MALFORMED",
        )
    both = channel.stream_stream(SCORE, None, None)(iter([b"", MALFORMED]), metadata=as_worker())
    await both.read()
    assert (await refusal_of(both.read())).reason == "MESSAGE_MALFORMED"


async def test_stream_is_answered_and_refused_like_a_unary_call(channel: grpc.aio.Channel) -> None:
    stub = scoring_pb2_grpc.ScoringServiceStub(channel)
    call = stub.Score(iter([scoring_pb2.ScoreRequest()] * 3), metadata=as_worker())
    answers: list[Any] = [await call.read(), await call.read()]
    assert [answer.done.scored for answer in answers] == [1, 2]
    assert (await refusal_of(call.read())).reason == "RESOURCE_NOT_FOUND"


async def test_user_has_a_few_streams_at_once_and_room_again_when_one_ends(
    channel: grpc.aio.Channel,
) -> None:
    stub = memory_pb2_grpc.MemoryServiceStub(channel)
    request = memory_pb2.WatchMemoriesRequest()

    def watch(caller: Caller) -> Any:
        return stub.WatchMemories(request, metadata=bearer(caller))

    async def has_begun(call: Any) -> bool:
        return isinstance(await call.read(), memory_pb2.WatchMemoriesResponse)

    async def comes_again() -> bool:
        try:
            return await has_begun(watch(CALLER))
        except grpc.aio.AioRpcError:
            return False

    watches = [watch(CALLER) for _ in range(STREAMS)]
    assert all([await has_begun(each) for each in watches])
    refusal = await refusal_of(watch(CALLER).read())
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "QUOTA_EXCEEDED",
    )
    imported = stub.ImportMemories(iter([]), metadata=bearer(CALLER))
    assert (await refusal_of(imported)).reason == "QUOTA_EXCEEDED"
    assert await has_begun(watch(Caller(CALLER.tenant_id, ids.new_id())))
    assert (await get(channel, "fine")).memory.id
    watches[0].cancel()
    async with asyncio.timeout(30):
        while not await comes_again():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def test_worker_method_is_for_workers_only(channel: grpc.aio.Channel) -> None:
    stub = scoring_pb2_grpc.ScoringServiceStub(channel)
    for metadata in [
        (),
        bearer(CALLER),
        as_worker("spiffe://kimberly.local/ns/test/sa/edge"),
        as_worker("spiffe://other.domain/ns/test/sa/worker"),
        as_worker(WORKER_ID + "x"),
    ]:
        # Nothing is sent: to grpc.aio, what it cannot write any more is an error of its own.
        call = stub.Score(metadata=metadata)  # type: ignore[call-arg]
        refusal = await refusal_of(call.read())
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "METHOD_NOT_ALLOWED",
        )


async def test_method_without_a_row_is_denied(
    channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {method: row for method, row in access.METHODS.items() if method != GET}
    monkeypatch.setattr("server.rpc.interceptors.METHODS", rows)
    assert (await refusal_of(get(channel, "fine"))).code is grpc.StatusCode.PERMISSION_DENIED


def test_every_method_of_the_contract_has_a_row() -> None:
    generated = Path(memory_pb2.__file__).parents[2].glob("*/v1/*_pb2.py")
    modules = [import_module(f"kimberly.{path.parts[-3]}.v1.{path.stem}") for path in generated]
    methods = {
        f"/{service.full_name}/{method.name}"
        for module in modules
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    ours = {method for method in access.METHODS if method.startswith("/kimberly.")}
    assert methods == ours


async def test_server_refuses_a_directory_that_others_can_enter(shared: Path) -> None:
    with pytest.raises(UnsafeSocketDirectory):
        await Server(shared / "s", (), services=()).start()


async def test_whoever_was_erased_opens_nothing_with_a_token_that_is_still_good(
    private: Path,
) -> None:
    layers = chain(
        PlainTokens(),
        worker_id=WORKER_ID,
        unary_seconds=10,
        stream_seconds=60,
        erased={CALLER.user_id},
    )
    server = Server(private / "s", layers, services=())
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories(), server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{private / 's'}") as channel:
        stub = memory_pb2_grpc.MemoryServiceStub(channel)
        request = memory_pb2.GetMemoryRequest(id="any")
        refusal = await refusal_of(stub.GetMemory(request, metadata=bearer(CALLER)))
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.UNAUTHENTICATED,
            "ACCOUNT_ERASED",
        )
        other = Caller(CALLER.tenant_id, ids.new_id())
        assert (await stub.GetMemory(request, metadata=bearer(other))).memory.id
    await server.grpc.stop(None)


@pytest.fixture
async def ended(private: Path) -> AsyncIterator[tuple[grpc.aio.Channel, set[UUID]]]:
    """A server, and the sessions and keys that it knows to have ended."""
    ended: set[UUID] = set()
    layers = chain(
        PlainTokens(), worker_id=WORKER_ID, unary_seconds=10, stream_seconds=60, ended=ended
    )
    server = Server(private / "socket", layers, services=())
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(memories(), server.grpc)
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{private / 'socket'}") as channel:
        yield channel, ended
    await server.grpc.stop(None)


@pytest.mark.parametrize("method", [WATCH, IMPORT])
async def test_stream_ends_with_the_session_or_key_that_opened_it(
    ended: tuple[grpc.aio.Channel, set[UUID]], method: str
) -> None:
    channel, grants = ended
    stub: Any = memory_pb2_grpc.MemoryServiceStub(channel)
    begun = asyncio.Event()

    async def requests() -> AsyncIterator[memory_pb2.ImportMemoriesRequest]:
        yield memory_pb2.ImportMemoriesRequest()
        begun.set()
        await asyncio.Event().wait()

    async def watch(grant_id: UUID) -> None:
        metadata = bearer(CALLER, grant_id=grant_id)
        if method == IMPORT:
            await stub.ImportMemories(requests(), metadata=metadata, timeout=30)
        request = memory_pb2.WatchMemoriesRequest()
        async for _ in stub.WatchMemories(request, metadata=metadata, timeout=30):
            begun.set()

    one, other = ids.new_id(), ids.new_id()
    async with asyncio.timeout(20):
        going_on = asyncio.create_task(watch(other))
        ending = asyncio.create_task(refusal_of(watch(one)))
        await begun.wait()
        grants.add(one)
        refusal = await ending
    assert refusal.code is grpc.StatusCode.UNAUTHENTICATED
    assert refusal.reason == "TOKEN_INVALID"
    assert not going_on.done()
    going_on.cancel()
    await asyncio.wait([going_on])
