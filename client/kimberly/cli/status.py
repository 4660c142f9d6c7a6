"""kimberly status: whether a mesh is well, what it has to do, and how much of yours it keeps."""

import asyncio
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import grpc
import typer
from rich.console import Console
from rich.table import Table

from kimberly.cli import figures
from kimberly.cli.connection import LOCAL_EDGE, Ca, TokenFile, call, give_up, knows_a_user
from kimberly.client import Client
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory

NOT_WELL: Final = 1
_ANSWER_SECONDS: Final = 5.0
_PAGE: Final = 1000
_LOCAL_MESH: Final = Path(".mesh/mesh.json")
_TIERS: Final = {
    memory.TIER_SHORT_TERM: "short-term",
    memory.TIER_LONG_TERM: "long-term",
    memory.TIER_PERMANENT: "permanent",
}
_UNDONE: Final = {
    "waiting": jobs.JOB_STATE_WAITING,
    "running": jobs.JOB_STATE_RUNNING,
    "dead": jobs.JOB_STATE_DEAD,
}
_UNSEEN: Final = (
    "queue, latencies, quotas of all: not seen from here; --prometheus URL, where you run the mesh"
)
_NOBODY: Final = "your jobs, meditations, quota: not seen without an access token or an API key"

Rows = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a mesh is asked."""

    address: str
    """Host and port of its edge."""
    ca: Path | None
    processes: Sequence[str] = ()
    """Where its processes tell what they measure, if they do to us."""
    prometheus: str | None = None


def status(
    address: Annotated[
        str | None,
        typer.Option(
            envvar="KIMBERLY_ADDRESS",
            help=f"Host and port of the mesh's edge; {LOCAL_EDGE} unless a mesh runs here.",
        ),
    ] = None,
    ca: Ca = None,
    token_file: TokenFile = None,
    mesh: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="What a mesh on this machine tells of itself. Without it, and without an "
            f"address, {_LOCAL_MESH} if it is there.",
        ),
    ] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(
            envvar="KIMBERLY_PROMETHEUS",
            help="URL of the Prometheus that watches the mesh, for those who run it.",
        ),
    ] = None,
) -> None:
    """Show whether the mesh is well, what waits, the last meditation, quotas, p50 and p99.

    What is yours is asked through the edge; what is of all users, of the processes where they are
    on this machine, else of Prometheus. Ends with 0 if the mesh is well, 1 if its edge does not
    reach every service, 2 if there is no answer.
    """
    if mesh is None and address is None and _LOCAL_MESH.exists():
        mesh = _LOCAL_MESH
    place = _place(address, ca, mesh, prometheus)
    is_well, health = _health(place)
    now = time.time()
    mine = (
        call(lambda client: _of_user(client, now), place.address, place.ca, token_file)
        if is_well and knows_a_user(token_file)
        else {}
    )
    sections = {"": {"health": health}, "yours": mine, "of all": _of_all(place, now)}
    Console(soft_wrap=True, markup=False, highlight=False).print(_table(sections))
    if not mine:
        typer.echo(_NOBODY)
    if not sections["of all"]:
        typer.echo(_UNSEEN)
    raise typer.Exit(0 if is_well else NOT_WELL)


def _place(
    address: str | None, ca: Path | None, mesh: Path | None, prometheus: str | None
) -> Place:
    if mesh is None:
        return Place(address or LOCAL_EDGE, ca, prometheus=prometheus)
    told: dict[str, Any] = json.loads(mesh.read_text())
    return Place(
        address or f"{told['host']}:{told['port']}",
        ca or Path(told["ca"]),
        metrics_of(told),
        prometheus or told["prometheus"],
    )


def metrics_of(mesh: Mapping[str, Any]) -> list[str]:
    """Return where the processes of a mesh on this machine tell what they measure.

    Args:
        mesh: What it tells of itself in mesh.json.
    """
    return [url for urls in mesh["metrics"].values() for url in urls if url.endswith("/metrics")]


def _health(place: Place) -> tuple[bool, str]:
    """Ask the edge whether it reaches every service."""
    url = f"https://{place.address}/healthz"
    began = time.perf_counter()
    try:
        trust = ssl.create_default_context(cafile=place.ca)
        with urllib.request.urlopen(url, timeout=_ANSWER_SECONDS, context=trust):
            took = (time.perf_counter() - began) * 1000
            return True, f"well: the edge reaches every service, and said so in {took:.0f} ms"
    except urllib.error.HTTPError as error:
        return False, f"not well: the edge does not reach every service (HTTP {error.code})"
    except OSError as error:
        give_up(f"{place.address}: {error}")


async def _of_user(client: Client, now: float) -> Rows:
    """Return what the user who asks has there; of what cannot be told, why."""
    rows = {
        "jobs": _jobs(client),
        "meditation": _meditation(client, now),
        "quota": _quota(client),
    }
    told = await asyncio.gather(*(_told(row) for row in rows.values()))
    return dict(zip(rows, told, strict=True))


async def _told(row: Awaitable[str]) -> str:
    try:
        return await row
    except grpc.aio.AioRpcError as error:
        return f"not seen: {error.details()}"


async def _jobs(client: Client) -> str:
    counted = []
    for name, state in _UNDONE.items():
        request = jobs.ListJobsRequest(state=state, page_size=_PAGE)
        page = await client.jobs.ListJobs(request, timeout=_ANSWER_SECONDS)
        more = "+" if page.next_page_token else ""
        counted.append(f"{len(page.jobs)}{more} {name}")
    return ", ".join(counted)


async def _meditation(client: Client, now: float) -> str:
    request = memory.ListMeditationsRequest(page_size=1)
    runs = (await client.memory.ListMeditations(request, timeout=_ANSWER_SECONDS)).meditations
    if not runs:
        return "none yet"
    run = runs[0]
    if run.state == memory.MEDITATION_STATE_RUNNING:
        return f"{run.id} runs: {run.processed} of {run.total} processed"
    ended = figures.ago(run.finish_time.ToNanoseconds() / 1e9, now)
    seconds = run.duration.ToNanoseconds() / 1e9
    return f"{run.id} ended {ended} ago, took {seconds:.1f} s, archived {run.archived}"


async def _quota(client: Client) -> str:
    usage = await client.memory.GetUsage(memory.GetUsageRequest(), timeout=_ANSWER_SECONDS)
    return ", ".join(
        f"{_TIERS[tier.tier]} {tier.used_bytes / 1024:.0f} of {tier.limit_bytes / 1024:.0f} KiB"
        for tier in usage.tiers
        if tier.tier in _TIERS
    )


def _of_all(place: Place, now: float) -> Rows:
    """Return what is of all users; nothing if it is not to be seen from here."""
    if place.processes:
        told = figures.told_by_processes(place.processes)
    elif place.prometheus:
        told = figures.told_by_prometheus(place.prometheus)
    else:
        return {}
    return figures.summed_up(told, now=now)


def _table(sections: Mapping[str, Rows]) -> Table:
    table = Table.grid(padding=(0, 2))
    for section, rows in sections.items():
        for number, (title, text) in enumerate(rows.items()):
            table.add_row("" if number else section, title, text)
    return table
