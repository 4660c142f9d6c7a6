"""Prometheus itself beside a running mesh: every rule and panel reads what is really told.

It asks the mesh as observability/prometheus.yaml says, but for where the processes are.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import asyncpg
import httpx
import pytest
import pytest_asyncio
import yaml
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from deploy import tools
from deploy.gate import Refused, watch
from deploy.slos import OBSERVABILITY, RULES
from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import access, ids
from tests.deploy import expressions
from tests.deploy.expressions import Read
from tests.e2e.test_kimberly_status import rows, status
from tests.mesh import PASSWORD, User, eventually, sign_up
from tests.needs import needs_prometheus
from tests.transports import Refused as CallRefused

PROGRAM = tools.PROMETHEUS / "prometheus"
CONFIGURATION = OBSERVABILITY / "prometheus.yaml"

(KEPT,) = (
    re.compile(rule["regex"])
    for job in yaml.safe_load(CONFIGURATION.read_text())["scrape_configs"]
    for rule in job.get("metric_relabel_configs", ())
)
ITS_OWN: Final = {"ALERTS", "up"}
"""What Prometheus makes itself."""
SUFFIXES: Final[Mapping[str, tuple[str, ...]]] = {"histogram": ("_bucket", "_count", "_sum")}

FAILING: Final = {("code", "INTERNAL"), ("outcome", "dead"), ("envoy_response_code_class", "5")}
"""What does not happen either, as long as the mesh is well."""

pytestmark = needs_prometheus


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str
    http: httpx.AsyncClient

    async def get(self, path: str, **about: str) -> Any:
        answer = await self.http.get(f"{self.url}{path}", params=about)
        assert answer.status_code == httpx.codes.OK, answer.text
        return answer.json()["data"]

    async def targets(self) -> list[dict[str, Any]]:
        return list((await self.get("/api/v1/targets"))["activeTargets"])

    async def rules(self) -> list[dict[str, Any]]:
        groups = (await self.get("/api/v1/rules"))["groups"]
        return [rule for group in groups for rule in group["rules"]]


def configured(mesh: Mesh, directory: Path, address: str) -> Path:
    """Write our configuration, with addresses in place of the names that a cluster's DNS knows."""
    config = yaml.safe_load(CONFIGURATION.read_text())
    every = ("scrape_interval", "scrape_timeout", "evaluation_interval")
    config["global"] = dict.fromkeys(every, "1s")
    config["rule_files"] = [f"{RULES}/*.yaml"]
    del config["alerting"]
    for job in config["scrape_configs"]:
        found = job.pop("dns_sd_configs", ())
        names = [name for each in found for name in each["names"]]
        job["static_configs"] = [
            {"targets": [address_of(mesh, name)], "labels": {"__meta_dns_name": name}}
            for name in names
        ] or [{"targets": [address]}]
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def address_of(mesh: Mesh, name: str) -> str:
    """Return host and port of what stands behind a name such as worker-metrics."""
    process = name.removesuffix("-metrics")
    told: Mapping[str, list[str]] = mesh.describe()["metrics"]
    return next(
        urlsplit(urls[0]).netloc for each, urls in told.items() if each.partition("-")[0] == process
    )


@pytest_asyncio.fixture(scope="module")
async def used(mesh: Mesh, http: httpx.AsyncClient, channel: Any) -> None:
    """Have the mesh do a little of everything that is measured."""
    user = await sign_up(http, channel)
    call = user.grpc
    with pytest.raises(CallRefused):
        await user.rest(auth.LogInRequest(email=user.email, password="not the word"))
    await call(auth.LogInRequest(email=user.email, password=PASSWORD))
    await call(privacy.CreateExportRequest())
    for number in range(3):
        await call(pb.CreateMemoryRequest(memory=pb.Memory(content=f"{number} cups of tea")))
        await user.rest(pb.QueryMemoriesRequest(query="tea"))
    run = (await call(pb.MeditateRequest())).meditation

    async def look() -> Any:
        return (await call(pb.GetMeditationRequest(id=run.id))).meditation

    await eventually(look, lambda one: one.state == pb.MEDITATION_STATE_SUCCEEDED)
    owner = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    try:
        await compare_vectors(call, owner)
        await fill_a_tier(call)
        await call_too_often(await sign_up(http, channel), owner)
    finally:
        await owner.close()


async def compare_vectors(call: Any, owner: asyncpg.Connection) -> None:
    """Have a vector stored, then compared, then not compared in time."""
    await call(users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=True))
    kept = (await call(pb.CreateMemoryRequest(memory=pb.Memory(content="a boat")))).memory
    vector = pb.Embedding(memory_id=kept.id, model="m", values=[1, 0])
    await call(pb.UploadEmbeddingsRequest(embeddings=[vector]))
    near = pb.QueryEmbedding(model="m", values=[0.9, 0.1])
    await call(pb.QueryMemoriesRequest(query="ship", embedding=near))
    async with owner.transaction():
        await owner.execute("LOCK TABLE embeddings IN ACCESS EXCLUSIVE MODE")
        await call(pb.QueryMemoriesRequest(query="another ship", embedding=near))


async def fill_a_tier(call: Any) -> None:
    """Have a write refused that a quota has no room for."""
    quotas = users.Quotas(permanent_bytes=1)
    change = users.UpdateSettingsRequest(settings=users.Settings(quotas=quotas))
    change.update_mask.paths.append("quotas.permanent_bytes")
    await call(change)
    memory = pb.Memory(content="too long", tier=pb.TIER_PERMANENT)
    with pytest.raises(CallRefused):
        await call(pb.CreateMemoryRequest(memory=memory))


async def call_too_often(user: User, owner: asyncpg.Connection) -> None:
    """Have a user refused whose plan is one of few calls; nobody else has it."""
    await owner.execute(
        """
        INSERT INTO plans
        SELECT (jsonb_populate_record(plan, '{"name": "few", "calls_per_second": 1, "burst": 1}')).*
          FROM plans AS plan WHERE name = 'free'
        """
    )
    await owner.execute(
        "INSERT INTO subscriptions (tenant_id, user_id, plan) VALUES ($1, $2, 'few')",
        ids.parse(ids.TENANT, user.tenant_id, "tenant"),
        ids.parse(ids.USER, user.id, "user"),
    )

    async def call_on() -> None:
        # A local mesh lets everybody call fifty times as often; on a slow machine more flows in.
        while True:
            await asyncio.gather(*(user.grpc(pb.GetUsageRequest()) for _ in range(500)))

    with pytest.raises(CallRefused):
        await call_on()
    await owner.execute("DELETE FROM subscriptions WHERE plan = 'few'")
    await owner.execute("DELETE FROM plans WHERE name = 'few'")


@pytest_asyncio.fixture(scope="module")
async def prometheus(
    mesh: Mesh, used: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Prometheus]:
    """Prometheus, once it has asked every process and evaluated every rule."""
    directory = tmp_path_factory.mktemp("prometheus")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *(str(PROGRAM), f"--config.file={configured(mesh, directory, address)}"),
        *(f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address={address}"),
    ]
    with (directory / "log").open("wb") as log:
        child = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
    try:
        async with httpx.AsyncClient(timeout=60) as http:
            running = Prometheus(f"http://{address}", http)

            async def evaluated() -> bool:
                try:
                    targets, rules = await running.targets(), await running.rules()
                except (httpx.TransportError, AssertionError):
                    return False
                # At first it knows neither of any.
                healths = {each["health"] for each in (*targets, *rules)}
                return bool(targets) and healths == {"up", "ok"}

            await eventually(evaluated, bool, seconds=60)
            yield running
    finally:
        child.terminate()
        await child.wait()


async def told(prometheus: Prometheus) -> set[str]:
    """Return the names of all series that its targets tell, or would if there were any yet."""
    names: set[str] = set()
    for target in await prometheus.targets():
        text = (await prometheus.http.get(target["scrapeUrl"])).text
        names |= set(re.findall(r"(?m)^(\w+)[{ ]", text))
        for name, kind in re.findall(r"(?m)^# TYPE (\w+) (\w+)$", text):
            names |= {name + suffix for suffix in SUFFIXES.get(kind, ("",))}
    return names


async def test_every_process_is_asked(prometheus: Prometheus) -> None:
    labels = [each["labels"] for each in await prometheus.targets()]
    asked = {(each["job"], each.get("process")) for each in labels}
    processes = (*access.PROCESSES, access.WORKER)
    assert asked == {
        ("prometheus", None),
        *((process, None) for process in processes),
        *(("envoy", process) for process in (access.EDGE, *processes)),
    }


async def test_every_metric_of_rules_and_dashboards_is_one_that_is_told(
    prometheus: Prometheus,
) -> None:
    known = await told(prometheus) | expressions.recorded() | ITS_OWN
    read = expressions.everything_read()
    assert {each.metric for each in read if not expressions.has_name(each, known)} == set()


async def test_every_label_that_is_asked_for_is_one_that_its_metric_has(
    prometheus: Prometheus,
) -> None:
    unknown = []
    for read in expressions.everything_read():
        pattern = f'{{__name__=~"{read.metric}"}}'
        series = await prometheus.get("/api/v1/series", **{"match[]": pattern})
        labels = {label for each in series for label in each}
        # What has no series yet shows no labels either.
        if series and not {name for name, _, _ in read.labels} <= labels:
            unknown.append(read)
    assert unknown == []


def is_told_here(read: Read) -> bool:
    """Tell whether there must be series of a selector after what these tests did."""
    return (
        read.metric not in ITS_OWN | expressions.recorded()
        and not any(name == "outcome" and value == "hit" for name, _, value in read.labels)
        and not any(
            name == label and failing in value
            for name, _, value in read.labels
            for label, failing in FAILING
        )
    )


async def test_every_selector_finds_what_it_is_about(prometheus: Prometheus) -> None:
    """A label that has another value than we think reads as: all is quiet."""
    lost = [
        read.selector
        for read in filter(is_told_here, expressions.everything_read())
        if not await prometheus.get("/api/v1/series", **{"match[]": read.selector})
    ]
    assert lost == []


async def test_every_bound_that_is_asked_for_is_one_of_a_bucket(prometheus: Prometheus) -> None:
    """A bound that no bucket has would read as: nothing was ever in time."""
    for read in expressions.everything_read():
        bounds = [value for name, _, value in read.labels if name == "le"]
        for bound in bounds:
            selector = f'{read.metric}{{le="{bound}"}}'
            assert await prometheus.get("/api/v1/series", **{"match[]": selector}), selector


async def test_what_is_read_of_envoy_is_not_among_what_is_left_out(prometheus: Prometheus) -> None:
    """Of what Envoy tells the configuration keeps a part."""
    kept = set(await prometheus.get("/api/v1/label/__name__/values"))
    known = {name for name in await told(prometheus) if name.startswith("envoy_")}
    read = {each.metric for each in expressions.everything_read()}
    lost = {name for name in known - kept if any(re.fullmatch(one, name) for one in read)}
    # A counter that has not counted yet has no series.
    assert {name for name in lost if not KEPT.fullmatch(name)} == set()
    assert len(known & kept) < len(known)


async def test_every_panel_can_be_evaluated(prometheus: Prometheus) -> None:
    for expression in expressions.of_dashboards():
        await prometheus.get("/api/v1/query", query=expression)


async def test_what_was_done_is_seen_through_the_panels(prometheus: Prometheus) -> None:
    panels = json.loads((OBSERVABILITY / "dashboards" / "overview.json").read_text())["panels"]
    (calls,) = (each for each in panels if each["title"] == "Calls a second, by process")
    expression = expressions.filled(calls["targets"][0]["expr"]).replace("rate", "increase")

    async def look() -> list[Any]:
        return list((await prometheus.get("/api/v1/query", query=expression))["result"])

    def seen(series: list[Any]) -> set[str]:
        return {each["metric"]["job"] for each in series if float(each["value"][1]) > 0}

    # Each process is called at least by who asks for its health.
    await eventually(look, lambda series: seen(series) >= set(access.PROCESSES))


@pytest.mark.alone  # beside others a call may be slow, which is an alert
async def test_a_mesh_that_is_well_pages_nobody(prometheus: Prometheus) -> None:
    looked = await asyncio.to_thread(watch, prometheus.url, seconds=2, every_seconds=0.5)
    assert looked >= 1


async def test_a_release_whose_rules_are_not_watched_is_refused(
    prometheus: Prometheus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.gate.paging", lambda: {("Unheard", "")})
    with pytest.raises(Refused, match="not watched: Unheard"):
        await asyncio.to_thread(watch, prometheus.url, seconds=0)


# Last: a query that is slow while it is counted is an alert.


async def test_kimberly_status_asks_it_for_the_last_minutes(
    mesh: Mesh, prometheus: Prometheus, user: User
) -> None:
    there = ("--address", urlsplit(mesh.edge).netloc, "--ca", str(mesh.ca))

    async def said() -> dict[str, str]:
        await user.grpc(pb.QueryMemoriesRequest(query="what was said in the last minutes"))
        code, output, errors = await status(*there, "--prometheus", prometheus.url)
        assert code == 0, errors
        return rows(output, "of all")

    told = await eventually(said, lambda told: "of the last 5 min" in told["queries"])
    assert "of the last 5 min" in told["calls"]
    assert "1 workers" in told["queue"]
