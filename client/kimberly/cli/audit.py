"""kimberly audit: what was done with a user's data, and whether the log of it is what it was."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Final

import typer
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from kimberly import audit
from kimberly.cli.connection import (
    COULD_NOT_TELL,
    LOCAL_EDGE,
    Address,
    Ca,
    TokenFile,
    call,
    give_up,
)
from kimberly.client import Client
from kimberly.users.v1 import users_pb2 as pb

BROKEN: Final = 1
_RECEIPTS: Final = Path(typer.get_app_dir("kimberly")) / "audit"
_PAGE: Final = 1000

app = typer.Typer(
    help="What was done with your data, by whom, and whether that log is what it was.",
    no_args_is_help=True,
)

Receipts = Annotated[
    Path,
    typer.Option(
        envvar="KIMBERLY_RECEIPTS",
        file_okay=False,
        help="Directory to remember in what was seen of each log.",
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key",
        metavar="KEY_ID",
        help="Only believe checkpoints that this key signed; can be given several times. Get the "
        "id from somebody other than this mesh.",
    ),
]


@app.command()
def verify(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    receipts: Receipts = _RECEIPTS,
    key: Keys = None,
) -> None:
    """Verify your audit log: 0 intact, 1 broken, 2 could not tell.

    The server verifies the log, and so does this command, by itself: it fetches every event,
    computes the hash chain, checks the signatures of the checkpoints that were put out of the
    database's reach, and compares. It also remembers where the chain ended: from then on nothing
    that was seen can be changed, removed or reordered unnoticed, whoever does it.

    What it cannot tell: changes that came before the first look and before the first checkpoint,
    or behind the newest one, if whoever made them computed the whole chain anew; and whether the
    events of other users of your tenant are unchanged, which are not shown to you.
    """

    async def work(client: Client) -> audit.Report:
        user = (await client.users.GetUser(pb.GetUserRequest())).user
        last = _last(receipts / f"{user.tenant_id}.json")
        return await audit.verify(client.users, last=last, trusted=key or ())

    report = call(work, address, ca, token_file)
    _show(report)
    if report.broken:
        raise typer.Exit(BROKEN)
    if not report.is_comparable:
        raise typer.Exit(COULD_NOT_TELL)
    _remember(receipts / f"{report.receipt.tenant_id}.json", report.receipt)


@app.command()
def events(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    limit: Annotated[int, typer.Option(min=1, help="How many events at most.")] = 100,
    as_json: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--json", help="Print a JSON object a line.")
    ] = False,
) -> None:
    """List what was done with your data, the newest first."""

    async def work(client: Client) -> list[pb.AuditEvent]:
        return await _newest(client, limit)

    found = call(work, address, ca, token_file)
    if as_json:
        for event in found:
            typer.echo(json_format.MessageToJson(event, indent=None))
        return
    table = Table("place", "time (UTC)", "actor", "action", "resource")
    for event in found:
        place = str(event.chain_position) if event.HasField("chain_position") else "-"
        instant = event.event_time.ToDatetime().isoformat(" ", "milliseconds")
        actor = f"{event.actor} {event.agent_name}".rstrip()
        table.add_row(place, instant, actor, event.action, event.resource)
    Console().print(table)


async def _newest(client: Client, limit: int) -> list[pb.AuditEvent]:
    found: list[pb.AuditEvent] = []
    request = pb.ListAuditEventsRequest()
    while len(found) < limit:
        request.page_size = min(limit - len(found), _PAGE)
        page = await client.users.ListAuditEvents(request)
        found.extend(page.events)
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    return found


def _show(report: audit.Report) -> None:
    receipt, checkpoint, broken = report.receipt, report.checkpoint, report.broken
    table = Table(show_header=False, box=None)
    table.add_row("events", f"{receipt.position}, computed anew here")
    if report.withheld:
        table.add_row("", f"{report.withheld} of them are other users' and were taken as given")
    table.add_row("head", receipt.hash)
    table.add_row("checkpoint", _told(report))
    if checkpoint:
        table.add_row("", f"signed at {checkpoint.time} by key {checkpoint.key_id}")
    if report.new_key_ids:
        table.add_row("new key", f"{', '.join(report.new_key_ids)} had signed nothing before")
    console = Console(soft_wrap=True)
    console.print(table)
    if broken:
        console.print(f"BROKEN at position {broken.position}: {broken.problem}", style="red")
    elif not report.is_comparable:
        console.print("could not tell: the checkpoints cannot be read now", style="yellow")
    else:
        console.print("intact", style="green")


def _told(report: audit.Report) -> str:
    if report.checkpoint is None:
        return "none to compare with: rewriting the whole log could not be told"
    later = report.receipt.position - report.checkpoint.position
    return f"position {report.checkpoint.position}; {max(later, 0)} events came later"


def _last(file: Path) -> audit.Receipt | None:
    """Return what was seen of a log the last time; None if it is seen for the first time."""
    try:
        kept = json.loads(file.read_text())
        return audit.Receipt(**{**kept, "key_ids": tuple(kept["key_ids"])})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        give_up(f"{file}: cannot be read: {error}; it says what was seen of this log before")


def _remember(file: Path, receipt: audit.Receipt) -> None:
    """Keep what was seen, in one step: half a receipt would be none."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    written = file.with_suffix(".new")
    written.write_text(json.dumps(dataclasses.asdict(receipt)))
    written.replace(file)
