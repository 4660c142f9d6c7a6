"""What the heartbeats of a watch are for: without them the edge cuts it."""

import asyncio
import ssl
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import httpx
import pytest
from kimberly.jobs.v1 import jobs_pb2 as jobs

from local.fleet import EDGE_LIMITS, Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from tests.faults.conftest import COMMANDS
from tests.faults.figures import Figures
from tests.faults.reach import signed_up
from tests.mesh import bearer
from tests.transports import Grpc, Refused, Rest, Transport

IDLE_SECONDS = 5


@pytest.fixture
def silent_mesh() -> Iterator[Mesh]:
    """A mesh whose watches say nothing while nothing changes."""
    service = (*COMMANDS.service[:-1], "tests.faults.silent_service")
    limits = replace(EDGE_LIMITS, stream_idle_seconds=IDLE_SECONDS)
    with TemporaryDirectory(prefix="kimberly-faults-") as state:
        Path(state).chmod(0o755)
        described = Mesh(
            Layout(Path(state)),
            # None that does the job: it is watched while it waits.
            workers=0,
            durable=False,
            commands=Commands(service=service),
            edge_limits=limits,
        )
        with in_background(described) as running:
            yield running


async def watched(transport: Transport, job_id: str) -> tuple[Counter[str], float, str]:
    """Watch a job until that breaks; return what was shown, for how long, and what broke it."""
    started, shown = time.monotonic(), Counter[str]()
    try:
        async for response in transport.stream(jobs.WatchJobRequest(id=job_id)):
            shown[str(response.WhichOneof("message"))] += 1
    except (Refused, httpx.HTTPError) as error:
        return shown, time.monotonic() - started, type(error).__name__
    return shown, time.monotonic() - started, ""


@pytest.mark.timeout(180)
async def test_without_heartbeats_the_edge_cuts_the_watch_of_a_job_that_stands_still(
    silent_mesh: Mesh, figures: Figures
) -> None:
    """With them it outlasts the edge's patience: see test_rolling_restart."""
    trust = ssl.create_default_context(cafile=silent_mesh.ca)
    credentials = grpc.ssl_channel_credentials(silent_mesh.ca.read_bytes())
    address = silent_mesh.edge.removeprefix("https://")
    async with (
        signed_up(silent_mesh, "silent") as user,
        httpx.AsyncClient(base_url=silent_mesh.edge, verify=trust, timeout=60) as http,
        grpc.aio.secure_channel(address, credentials) as channel,
    ):
        token = user.client.access_token
        transports: tuple[Transport, ...] = (Grpc(channel, bearer(token)), Rest(http, token))
        asked = jobs.CreateJobRequest(kind="user.export")
        job_id = (await user.client.jobs.CreateJob(asked)).job.id
        ends = await asyncio.gather(*(watched(each, job_id) for each in transports))
    sys.stdout.write(f"{ends}\n")
    for shown, seconds, broken in ends:
        assert shown == {"job": 1}
        assert broken
        assert IDLE_SECONDS - 1 < seconds < IDLE_SECONDS + 5
    figures.guards.append(
        f"watch without heartbeats: cut by the edge after {max(end[1] for end in ends):.1f} s"
        f" (patience {IDLE_SECONDS} s) over {len(ends)}/{len(transports)} transports"
    )
