"""One call, one tree: from the edge to the worker that finishes its job."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence

import yaml
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from deploy.slos import OBSERVABILITY
from local.mesh import Mesh
from local.postgres import SYSTEM
from server.database import SystemDatabase, open_pool
from server.enqueue import NewJob, enqueue_all
from server.jobs.own_schedules import OwnSchedules
from server.settings import Settings
from tests.mesh import User, eventually
from tests.telemetry.receiver import Receiver, Seen
from tests.telemetry.test_metrics import meditate
from workers.housekeeping import SWEEP_MEMORIES

QUERY = "kimberly.memory.v1.MemoryService/QueryMemories"
MEDITATE = "kimberly.memory.v1.MemoryService/Meditate"
PLAN = "kimberly.scoring.v1.ScoringService/PlanMeditation"
SCORE = "kimberly.scoring.v1.ScoringService/Score"
WORK = "WorkerService/Work"
WATCH = "kimberly.memory.v1.MemoryService/WatchMemories"

SHARDS = Settings.model_fields["meditation_shards"].default

Trace = Sequence[Seen]


def is_one_tree(trace: Trace) -> bool:
    """Tell whether all spans hang on one, and that one on none."""
    ids = {span.id for span in trace}
    roots = [span for span in trace if not span.parent]
    return len(ids) == len(trace) and len(roots) == 1 and {s.parent for s in trace} - ids == {b""}


async def trace_with(
    receiver: Receiver, name: str, is_whole: Callable[[Trace], bool], known: set[bytes]
) -> Trace:
    """Return the only new trace that has a span of this name, once it is whole."""

    async def look() -> list[Trace]:
        return [
            spans
            for trace, spans in receiver.traces().items()
            if trace not in known and any(span.name == name for span in spans)
        ]

    (found,) = await eventually(look, lambda traces: any(map(is_whole, traces)))
    return found


def services(trace: Trace) -> set[str]:
    return {span.service for span in trace}


def ancestors(trace: Trace, span: Seen) -> list[Seen]:
    by_id = {each.id: each for each in trace}
    found = []
    while span.parent:
        span = by_id[span.parent]
        found.append(span)
    return found


def depicted(trace: Trace) -> str:
    """Return a trace as a tree to look at."""

    def lines(parent: bytes, depth: int) -> list[str]:
        return [
            line
            for span in trace
            if span.parent == parent
            for line in (f"{'  ' * depth}{span.service}: {span.name}", *lines(span.id, depth + 1))
        ]

    return "\n".join(lines(b"", 0))


async def test_a_query_over_rest_is_one_tree_from_the_edge_to_the_stores(
    mesh: Mesh, user: User, receiver: Receiver
) -> None:
    await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="tea at five")))
    known = set(receiver.traces())
    await user.rest(pb.QueryMemoriesRequest(query="tea"))

    def is_whole(trace: Trace) -> bool:
        return is_one_tree(trace) and {"edge", "memory-sidecar", "memory"} == services(trace)

    trace = await trace_with(receiver, QUERY, is_whole, known)
    stores = Counter(span.attributes.get("db.system") for span in trace)
    assert stores["postgresql"] >= 1, depicted(trace)
    assert stores["redis"] >= 1, depicted(trace)
    for span in trace:
        if "db.system" in span.attributes:
            above = [each.service for each in ancestors(trace, span)]
            assert above[-2:] == ["memory-sidecar", "edge"], depicted(trace)


async def test_a_meditation_is_one_tree_from_the_edge_to_the_worker(
    mesh: Mesh, user: User, receiver: Receiver
) -> None:
    await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="to be thought about")))
    known = set(receiver.traces())
    await meditate(user)

    def is_whole(trace: Trace) -> bool:
        names = {span.name for span in trace}
        return is_one_tree(trace) and {MEDITATE, SCORE, "score batch", "store batch"} <= names

    trace = await trace_with(receiver, MEDITATE, is_whole, known)
    assert services(trace) >= {"edge", "memory-sidecar", "memory", "worker", "worker-sidecar"}
    (job,) = [span for span in trace if span.name == "job meditation.shard"]
    asked = [span.name for span in ancestors(trace, job)]
    assert MEDITATE in asked, depicted(trace)
    (stored,) = [span for span in trace if span.name == "store batch"]
    assert job in ancestors(trace, stored), depicted(trace)
    (opening,) = [span for span in trace if span.name == SCORE]
    # It does not last as long as the stream, in which all the rest happens.
    (scored,) = [span for span in trace if span.name == "score batch"]
    assert opening.ended <= scored.began, depicted(trace)
    # Those of Envoys end with the stream, and so with the job; streams of leases have none.
    above = ancestors(trace, opening)
    streams = above[: above.index(job)]
    assert {span.service for span in streams} == {"worker-sidecar", "memory-sidecar"}
    assert all(span.seconds < job.seconds + 10 for span in streams), depicted(trace)
    assert not [span for span in receiver.spans if WORK in span.name and span.service != "jobs"]


async def test_a_batch_of_leases_is_a_trace_of_its_own_linked_to_its_stream_and_its_jobs(
    mesh: Mesh, receiver: Receiver
) -> None:
    asked = {(bytes([number]) * 16, bytes([number]) * 8) for number in (1, 2)}
    async with await open_pool(mesh.stores.dsn(SYSTEM), size=1, name="test") as pool:
        for name in ("lease batch", "settle batch"):

            async def of_both(name: str = name) -> list[Seen]:
                # Again and again: a worker that has little room may lease them one by one.
                await enqueue_two(SystemDatabase(pool), asked)
                return [s for s in receiver.spans if s.name == name and s.links > asked]

            batch, *_ = await eventually(of_both, bool)
            assert (batch.service, batch.parent) == ("jobs", b"")
            assert int(batch.attributes["messaging.batch.message_count"]) >= len(asked)
            assert [span.name for span in receiver.traces()[batch.trace]] == [name]
            openings = {(s.trace, s.id): s for s in receiver.spans if s.name.endswith(WORK)}
            (stream,) = batch.links & openings.keys()
            assert openings[stream].service == "jobs"
            assert openings[stream].ended <= batch.began

    async def begun() -> set[tuple[bytes, bytes]]:
        jobs = [span for span in receiver.spans if span.name == f"job {SWEEP_MEMORIES}"]
        return {(span.trace, span.parent) for span in jobs if span.service == "worker"}

    assert await eventually(begun, lambda begun: begun >= asked)


async def test_changes_that_are_watched_are_a_trace_of_their_own_linked_to_their_stream(
    user: User, receiver: Receiver
) -> None:
    watching = rpc.MemoryServiceStub(user.grpc.channel).WatchMemories(
        pb.WatchMemoriesRequest(), metadata=user.grpc.metadata
    )
    messages = aiter(watching)
    assert (await anext(messages)).HasField("caught_up")
    created = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="to be told")))
    assert (await anext(messages)).change.memory_id == created.memory.id

    async def told() -> list[Seen]:
        return [span for span in receiver.spans if span.name == "watch batch"]

    batch, *_ = await eventually(told, bool)
    watching.cancel()
    assert (batch.service, batch.parent) == ("memory", b"")
    assert batch.attributes["messaging.batch.message_count"] == "1"
    (opening,) = [s for s in receiver.spans if {(s.trace, s.id)} == batch.links]
    assert (opening.name, opening.service) == (WATCH, "memory")
    assert opening.ended <= batch.began


async def enqueue_two(database: SystemDatabase, asked: Collection[tuple[bytes, bytes]]) -> None:
    """Enqueue jobs at once, each asked for by the span of another trace."""
    async with database.transaction() as connection:
        jobs = await enqueue_all(connection, [NewJob(SWEEP_MEMORIES) for _ in asked])
        for job, (trace, span) in zip(jobs, asked, strict=True):
            parent = f"00-{trace.hex()}-{span.hex()}-01"
            await connection.execute("UPDATE jobs SET trace = $2 WHERE id = $1", job, parent)


async def test_a_night_is_one_tree_from_the_planner_to_every_shard(
    mesh: Mesh, user: User, receiver: Receiver
) -> None:
    await user.grpc(
        pb.CreateMemoryRequest(memory=pb.Memory(content="to be thought about at night"))
    )
    known = set(receiver.traces())
    async with await open_pool(mesh.stores.dsn(SYSTEM), size=1, name="test") as pool:
        await OwnSchedules(SystemDatabase(pool)).run("meditation.nightly")

    def is_whole(trace: Trace) -> bool:
        shards = [span for span in trace if span.name == "job meditation.shard"]
        return is_one_tree(trace) and len(shards) == SHARDS

    trace = await trace_with(receiver, "job meditation.plan", is_whole, known)
    (root,) = [span for span in trace if not span.parent]
    assert (root.service, root.name) == ("worker", "job meditation.plan"), depicted(trace)
    (planned,) = [span for span in trace if span.name == PLAN and span.service == "memory"]
    for job in (span for span in trace if span.name == "job meditation.shard"):
        assert planned in ancestors(trace, job), depicted(trace)
    assert services(trace) >= {"worker", "worker-sidecar", "memory-sidecar", "memory"}


async def test_a_client_does_not_choose_what_is_traced_nor_where(
    mesh: Mesh, user: User, receiver: Receiver
) -> None:
    forged = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
    known = set(receiver.traces())
    await user.rest.http.get(
        "/v1/memories",
        headers={"authorization": f"Bearer {user.token}", "traceparent": forged},
    )
    name = "kimberly.memory.v1.MemoryService/ListMemories"
    trace = await trace_with(receiver, name, is_one_tree, known)
    assert [span.service for span in trace if not span.parent] == ["edge"]
    assert bytes.fromhex("ab" * 16) not in receiver.traces()


async def test_logs_say_which_trace_they_belong_to(
    mesh: Mesh, user: User, receiver: Receiver
) -> None:
    known = set(receiver.traces())
    await user.rest(pb.GetUsageRequest())
    name = "kimberly.memory.v1.MemoryService/GetUsage"
    trace = await trace_with(receiver, name, is_one_tree, known)
    wanted = trace[0].trace.hex()
    spans = {span.id.hex() for span in trace}

    def lines_of(process: str) -> list[dict[str, str]]:
        text = (mesh.layout.logs / f"{process}.log").read_text()
        # The last one may be half written.
        whole = text[: text.rfind("\n") + 1].splitlines()
        lines = [json.loads(line) for line in whole if wanted in line]
        return [line for line in lines if line["trace_id"] == wanted]

    assert all(line["span_id"] in spans for line in lines_of("memory"))
    # By which Grafana leads from a line to its trace.
    loki = yaml.safe_load((OBSERVABILITY / "full" / "datasources.yaml").read_text())["datasources"]
    (field,) = loki[0]["jsonData"]["derivedFields"]
    text = (mesh.layout.logs / "memory.log").read_text()
    assert wanted in re.findall(field["matcherRegex"], text)
    assert lines_of("memory")

    async def at_the_edge() -> list[dict[str, str]]:
        return lines_of("edge")

    assert await eventually(at_the_edge, bool)
