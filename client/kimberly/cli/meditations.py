"""kimberly meditate, kimberly meditations: runs that score a user's memories and tidy them up."""

import asyncio
import json
from contextlib import AbstractContextManager
from typing import Annotated, Final

import typer
from google.protobuf import json_format
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kimberly.cli.connection import LOCAL_EDGE, Address, Ca, TokenFile, call
from kimberly.client import Client
from kimberly.memory.v1 import memory_pb2 as pb

_POLL_SECONDS: Final = 0.2

app = typer.Typer(
    help="What meditations did to your memories, and how to undo it.", no_args_is_help=True
)

Json = Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")]
Watch = Annotated[bool, typer.Option("--watch", help="Show how far it is, until it has ended.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="Of a meditation: med_…")]


def meditate(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    *,
    watch: Watch = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done, and change nothing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Store every score anew, not only those that moved.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Score your memories anew and tidy up: promote, archive what a quota has no room for, delete.

    If a meditation is running already, it is the one that is shown.
    """
    request = pb.MeditateRequest(dry_run=dry_run, full=full)

    async def work(client: Client) -> pb.Meditation:
        run = (await client.memory.Meditate(request)).meditation
        return await _watched(client, run) if watch else run

    _show([call(work, address, ca, token_file)], as_json=as_json)


@app.command()
def show(
    id: Id,  # noqa: A002 - the name of the argument
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    *,
    watch: Watch = False,
    as_json: Json = False,
) -> None:
    """Show what a meditation did."""

    async def work(client: Client) -> pb.Meditation:
        run = (await client.memory.GetMeditation(pb.GetMeditationRequest(id=id))).meditation
        return await _watched(client, run) if watch else run

    _show([call(work, address, ca, token_file)], as_json=as_json)


@app.command("list")
def list_(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    *,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 20,
    as_json: Json = False,
) -> None:
    """List your meditations, newest first, and nightly ones that did something to yours."""

    async def work(client: Client) -> list[pb.Meditation]:
        request = pb.ListMeditationsRequest(page_size=limit)
        return list((await client.memory.ListMeditations(request)).meditations)

    _show(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def undo(
    id: Id,  # noqa: A002 - the name of the argument
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
) -> None:
    """Bring back what a meditation archived. Scores stay as they are."""

    async def work(client: Client) -> pb.UndoMeditationResponse:
        return await client.memory.UndoMeditation(pb.UndoMeditationRequest(id=id))

    undone = call(work, address, ca, token_file)
    typer.echo(f"{undone.restored} memories are back")
    if undone.kept_archived:
        typer.echo(
            f"{undone.kept_archived} stay archived: you keep the same text again, or withdrew the "
            "consent that they need"
        )


async def _watched(client: Client, run: pb.Meditation) -> pb.Meditation:
    """Show how far a meditation is until it has ended."""
    with _bars() as bars:
        task = bars.add_task("meditating", total=run.total or None)
        while run.state == pb.MEDITATION_STATE_RUNNING:
            bars.update(task, completed=run.processed)
            await asyncio.sleep(_POLL_SECONDS)
            request = pb.GetMeditationRequest(id=run.id)
            run = (await client.memory.GetMeditation(request)).meditation
        bars.update(task, completed=run.processed)
    return run


def _bars() -> AbstractContextManager[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Not where the table goes, which may be a file.
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True)


def _show(runs: list[pb.Meditation], *, as_json: bool) -> None:
    if as_json:
        for run in runs:
            typer.echo(json.dumps(json_format.MessageToDict(run)))
        return
    console = Console()
    if len(runs) == 1:
        console.print(_report(runs[0]))
        return
    table = Table("id", "as of (UTC)", "kind", "state", *_FIGURES, "undone")
    for run in runs:
        undone = "yes" if run.HasField("undo_time") else ""
        table.add_row(run.id, _as_of(run), _kind(run), _state(run), *_figures(run), undone)
    console.print(table)


_FIGURES: Final = ("processed", "scored", "archived", "promoted", "deleted")
_OF_EVERYBODY: Final = ("processed", "scored")


def _figures(run: pb.Meditation) -> list[str]:
    """Return what a run did; of a nightly one what is the user's own."""
    figures = [str(getattr(run, name)) for name in _FIGURES]
    return [
        "-" if run.nightly and name in _OF_EVERYBODY else figure
        for name, figure in zip(_FIGURES, figures, strict=True)
    ]


def _report(run: pb.Meditation) -> Table:
    table = Table(title="Meditation", title_justify="left", show_header=False)
    table.add_row("run", run.id)
    table.add_row("kind", _kind(run))
    table.add_row("state", _state(run))
    table.add_row("as of", f"{_as_of(run)} UTC")
    would = "would be " if run.dry_run else ""
    for name, figure in zip(_FIGURES, _figures(run), strict=True):
        table.add_row(name if name == "processed" else would + name, figure)
    if run.HasField("mean_score"):
        table.add_row("mean score", f"{run.mean_score:.3f}")
    if run.scorer_version:
        table.add_row("scorer version", str(run.scorer_version))
    table.add_row("duration", f"{run.duration.ToTimedelta().total_seconds():.2f} s")
    if run.HasField("undo_time"):
        table.add_row("undone", run.undo_time.ToDatetime().isoformat(" ", "seconds") + " UTC")
    return table


def _kind(run: pb.Meditation) -> str:
    if run.nightly:
        return "nightly, of everybody"
    if run.dry_run:
        return "dry run"
    return "full" if run.full else "what moved"


def _state(run: pb.Meditation) -> str:
    return "running" if run.state == pb.MEDITATION_STATE_RUNNING else "succeeded"


def _as_of(run: pb.Meditation) -> str:
    return run.as_of_time.ToDatetime().isoformat(" ", "seconds")
