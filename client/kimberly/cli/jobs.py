"""kimberly jobs: what the mesh does for you in the background, and a say in it."""

from collections.abc import Sequence
from datetime import UTC
from typing import Annotated, Final

import typer
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from kimberly.cli.connection import LOCAL_EDGE, Address, Ca, TokenFile, call
from kimberly.client import Client
from kimberly.jobs.v1 import jobs_pb2 as pb

NOT_SO: Final = 1
_PAGE: Final = 1000
_STATES: Final = {
    "waiting": pb.JOB_STATE_WAITING,
    "running": pb.JOB_STATE_RUNNING,
    "succeeded": pb.JOB_STATE_SUCCEEDED,
    "dead": pb.JOB_STATE_DEAD,
    "cancelled": pb.JOB_STATE_CANCELLED,
}
NAMES: Final = {state: name for name, state in _STATES.items()}

app = typer.Typer(
    help="What is done for you in the background: look at it, watch it, retry it, cancel it.",
    no_args_is_help=True,
)

JobId = Annotated[str, typer.Argument(metavar="JOB_ID", help="Such as job_0198c0f3….")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")]


@app.command("list")
def list_(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    state: Annotated[
        str | None, typer.Option(help=f"Only jobs in this state: {', '.join(_STATES)}.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many jobs at most.")] = 100,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """List your jobs, the newest first."""
    if state is not None and state not in _STATES:
        raise typer.BadParameter(f"must be one of {', '.join(_STATES)}", param_hint="--state")
    wanted = _STATES[state] if state else pb.JOB_STATE_UNSPECIFIED

    async def work(client: Client) -> list[pb.Job]:
        return await _newest(client, wanted, limit)

    _show(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def show(
    job_id: JobId,
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show one job, with its error and its result."""

    async def work(client: Client) -> pb.Job:
        return (await client.jobs.GetJob(pb.GetJobRequest(id=job_id))).job

    _tell(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def ask(
    kind: Annotated[
        str, typer.Argument(metavar="KIND", help="embedding.batch, meditation.run or user.export.")
    ],
    payload: Annotated[
        str, typer.Option(help="""What it is told: a JSON object, such as '{"dry_run": true}'.""")
    ] = "",
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
) -> None:
    """Ask for a job, or show the one of the same purpose that is not done yet."""

    async def work(client: Client) -> pb.Job:
        request = pb.CreateJobRequest(kind=kind, payload_json=payload)
        return (await client.jobs.CreateJob(request)).job

    _tell(call(work, address, ca, token_file), as_json=False)


@app.command()
def watch(
    job_id: JobId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Watch a job until it has ended: 0 it succeeded, 1 it did not."""

    async def work(client: Client) -> pb.Job:
        return await until_ended(client, job_id)

    job = call(work, address, ca, token_file)
    _tell(job, as_json=False)
    if job.state != pb.JOB_STATE_SUCCEEDED:
        raise typer.Exit(NOT_SO)


@app.command()
def retry(
    job_id: JobId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Have a job done again that was given up or cancelled."""

    async def work(client: Client) -> pb.Job:
        return (await client.jobs.RetryJob(pb.RetryJobRequest(id=job_id))).job

    _tell(call(work, address, ca, token_file), as_json=False)


@app.command()
def cancel(
    job_id: JobId, address: Address = LOCAL_EDGE, ca: Ca = None, token_file: TokenFile = None
) -> None:
    """Cancel a job. One that runs ends as soon as its worker has stopped."""

    async def work(client: Client) -> pb.Job:
        return (await client.jobs.CancelJob(pb.CancelJobRequest(id=job_id))).job

    _tell(call(work, address, ca, token_file), as_json=False)


async def _newest(client: Client, state: pb.JobState.ValueType, limit: int) -> list[pb.Job]:
    found: list[pb.Job] = []
    request = pb.ListJobsRequest(state=state)
    while len(found) < limit:
        request.page_size = min(limit - len(found), _PAGE)
        page = await client.jobs.ListJobs(request)
        found.extend(page.jobs)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    return found


async def until_ended(client: Client, job_id: str) -> pb.Job:
    """Show how a job goes on, and return it when it has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)
    with bars:
        return await _ended(client, job_id, bars)


async def _ended(client: Client, job_id: str, bars: Progress) -> pb.Job:
    """Show how a job goes on, stream after stream, and return it when it has ended."""
    job, bar = pb.Job(), bars.add_task(job_id, total=1.0)
    while True:
        async for seen in client.jobs.WatchJob(pb.WatchJobRequest(id=job_id)):
            if seen.end.reason == pb.WATCH_JOB_END_REASON_FINISHED:
                return job
            if seen.HasField("job"):
                job = seen.job
                told = f"{job.kind} {NAMES[job.state]}"
                bars.update(bar, description=told, completed=job.progress)


def _show(jobs: Sequence[pb.Job], *, as_json: bool) -> None:
    if as_json:
        for job in jobs:
            typer.echo(json_format.MessageToJson(job, indent=None))
        return
    table = Table("job", "kind", "state", "progress", "attempts", "made (UTC)", "error")
    for job in jobs:
        table.add_row(
            *(job.id, job.kind, NAMES[job.state], f"{job.progress:.0%}"),
            *(f"{job.attempts} of {job.max_attempts}", _time(job.create_time), job.error),
        )
    Console(soft_wrap=True).print(table)


def _tell(job: pb.Job, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json_format.MessageToJson(job, indent=None))
        return
    table = Table(show_header=False, box=None)
    table.add_row("job", job.id)
    table.add_row("kind", job.kind)
    table.add_row("state", _state(job))
    table.add_row("progress", f"{job.progress:.0%}")
    table.add_row("attempts", f"{job.attempts} of {job.max_attempts}")
    table.add_row("made", _time(job.create_time))
    if job.HasField("finish_time"):
        table.add_row("ended", _time(job.finish_time))
    elif job.state == pb.JOB_STATE_WAITING:
        table.add_row("not before", _time(job.run_time))
    if job.error:
        table.add_row("error", job.error)
    if job.result_json:
        table.add_row("result", job.result_json)
    Console(soft_wrap=True, markup=False).print(table)


def _state(job: pb.Job) -> str:
    is_ending = job.state == pb.JOB_STATE_RUNNING and job.HasField("cancel_time")
    return NAMES[job.state] + (", being cancelled" if is_ending else "")


def _time(instant: Timestamp) -> str:
    return instant.ToDatetime(tzinfo=UTC).isoformat(" ", "seconds").removesuffix("+00:00")
