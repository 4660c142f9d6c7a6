"""What Prometheus finds where the mesh tells what it measures."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import pytest
from kimberly.memory.v1 import memory_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from local.mesh import Mesh
from server.access import EDGE, PROCESSES
from tests.mesh import User, eventually
from tests.transports import Refused

EXPECTED: Mapping[str, frozenset[str]] = {
    "auth": frozenset(
        {
            "auth_tokens_issued_total",
            "auth_mails_waiting",
            "audit_seal_lag_seconds",
            "audit_unsigned_seconds",
            "billing_usage_users",
        }
    ),
    "memory": frozenset(
        {
            "memory_items",
            "memory_bytes",
            "memory_items_changed_total",
            "memory_quota_usage_users",
            "memory_meditation_runs_total",
            "memory_meditation_items_total",
            "memory_meditation_last_success_timestamp_seconds",
            "memory_meditation_last_duration_seconds",
            "memory_meditation_running",
            "memory_meditation_interrupted",
            "retrieval_latency_seconds_bucket",
            "embedding_waiting",
            "vector_index_bytes",
            "vector_index_vectors",
        }
    ),
    "jobs": frozenset(
        {
            "jobs_waiting",
            "jobs_oldest_waiting_seconds",
            "jobs_running",
            "jobs_finished_total",
            "jobs_start_delay_seconds_bucket",
            "job_seconds_bucket",
            "workers_connected",
        }
    ),
    "worker-1": frozenset({"worker_jobs_seconds_bucket", "worker_reconnects_total"}),
}
OF_SERVICES = frozenset(
    {
        "kimberly_rpc_seconds_bucket",
        "kimberly_rpcs_in_flight",
        "kimberly_database_connections",
        "process_resident_memory_bytes",
    }
)


async def samples_of(url: str) -> list[Sample]:
    async with httpx.AsyncClient(timeout=60) as client:
        answer = await client.get(url)
    assert answer.status_code == 200, answer.text
    return [
        sample
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    ]


async def value(mesh: Mesh, process: str, name: str, **labels: str) -> float:
    """Return the sum of what a process tells of a metric, where its labels are these."""
    return sum(
        sample.value
        for sample in await samples_of(mesh.describe()["metrics"][process][0])
        if sample.name == name and labels.items() <= sample.labels.items()
    )


async def meditate(user: User) -> None:
    started = (await user.rest(pb.MeditateRequest())).meditation

    async def look() -> pb.Meditation:
        found: pb.Meditation = (await user.grpc(pb.GetMeditationRequest(id=started.id))).meditation
        return found

    await eventually(look, lambda one: one.state == pb.MEDITATION_STATE_SUCCEEDED)


async def test_every_process_tells_what_it_measures(mesh: Mesh, user: User) -> None:
    await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="tea at five")))
    await user.rest(pb.QueryMemoriesRequest(query="tea"))
    await meditate(user)
    for process, expected in EXPECTED.items():
        url = mesh.describe()["metrics"][process][0]

        async def missing(
            url: str = url,
            expected: frozenset[str] = expected | (OF_SERVICES if process in PROCESSES else set()),
        ) -> frozenset[str]:
            return expected - {sample.name for sample in await samples_of(url)}

        assert await eventually(missing, lambda names: not names) == set()


async def test_nobody_exports_what_belongs_to_another_process(mesh: Mesh) -> None:
    for process in EXPECTED:
        names = {each.name for each in await samples_of(mesh.describe()["metrics"][process][0])}
        strangers = {name for other in EXPECTED if other != process for name in EXPECTED[other]}
        assert names & (strangers - EXPECTED[process]) == set()


async def test_a_call_is_counted_once_with_its_status(mesh: Mesh, user: User) -> None:
    async def counted(code: str) -> float:
        return await value(
            mesh,
            "memory",
            "kimberly_rpc_seconds_count",
            method="MemoryService/GetMemory",
            code=code,
        )

    before = await counted("OK"), await counted("INVALID_ARGUMENT")
    created = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="one call")))
    await user.rest(pb.GetMemoryRequest(id=created.memory.id))
    with pytest.raises(Refused):
        await user.grpc(pb.GetMemoryRequest(id="no id"))
    assert await counted("OK") == before[0] + 1
    assert await counted("INVALID_ARGUMENT") == before[1] + 1


async def test_what_a_user_keeps_is_in_the_sums(mesh: Mesh, user: User) -> None:
    async def kept() -> float:
        return await value(mesh, "memory", "memory_items", tier="permanent", state="active")

    async def created() -> float:
        return await value(mesh, "memory", "memory_items_changed_total", change="created")

    before = await kept(), await created()
    for number in range(3):
        memory = pb.Memory(content=f"to be counted {number}", tier=pb.TIER_PERMANENT)
        await user.grpc(pb.CreateMemoryRequest(memory=memory))
    assert await created() == before[1] + 3
    assert await eventually(kept, lambda now: now >= before[0] + 3) >= before[0] + 3


async def test_a_meditation_is_counted_by_queue_and_worker(mesh: Mesh, user: User) -> None:
    async def done() -> tuple[float, ...]:
        shard = {"kind": "meditation.shard"}
        return (
            await value(mesh, "memory", "memory_meditation_runs_total", outcome="done"),
            await value(mesh, "jobs", "jobs_finished_total", outcome="succeeded", **shard),
            await value(mesh, "jobs", "jobs_start_delay_seconds_count", **shard),
            await value(
                mesh, "worker-1", "worker_jobs_seconds_count", outcome="completed", **shard
            ),
        )

    # A run is over before its job is settled: that of a test before is to be counted by all first.
    before = await eventually(done, lambda now: now[1] == now[2] == now[3])
    await meditate(user)
    wanted = tuple(each + 1 for each in before)
    assert await eventually(done, lambda now: now == wanted) == wanted


async def test_no_id_is_a_label(mesh: Mesh, user: User) -> None:
    created = await user.grpc(pb.CreateMemoryRequest(memory=pb.Memory(content="nobody's name")))
    seen = [created.memory.id, user.id, user.tenant_id, user.email]
    for urls in mesh.describe()["metrics"].values():
        async with httpx.AsyncClient(timeout=60) as client:
            for url in urls:
                text = (await client.get(url)).text
                assert not [each for each in seen if each in text], url


async def test_envoys_tell_their_figures_and_nothing_else_of_their_admin(mesh: Mesh) -> None:
    for process, urls in mesh.describe()["metrics"].items():
        samples = await samples_of(urls[-1])
        assert any(each.name == "envoy_server_days_until_first_cert_expiring" for each in samples)
        base = urls[-1].removesuffix("/stats/prometheus")
        async with httpx.AsyncClient(timeout=60) as client:
            for path in ("/stats", "/config_dump", "/certs", "/quitquitquit", "/clusters", "/"):
                assert (await client.get(f"{base}{path}")).status_code == 404, (process, path)
            answer = await client.post(f"{base}/stats/prometheus")
            assert answer.status_code == 404
            expected = 404 if process == EDGE else 200
            assert (await client.get(f"{base}/metrics")).status_code == expected
