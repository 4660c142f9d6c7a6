"""kimberly profile: who you are to the mesh, and what it calls you."""

from typing import Annotated

import typer
from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask
from rich.console import Console
from rich.table import Table

from kimberly.cli.connection import LOCAL_EDGE, Address, Ca, TokenFile, call
from kimberly.client import Client
from kimberly.users.v1 import users_pb2 as pb

app = typer.Typer(
    help="Who you are to the mesh, and what it calls you.",
    no_args_is_help=True,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object.")]


@app.command()
def show(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Show your account."""

    async def work(client: Client) -> pb.User:
        return (await client.users.GetUser(pb.GetUserRequest())).user

    _print(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def rename(
    name: Annotated[str, typer.Argument(help="What to call you: 1 to 100 characters.")],
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Have the mesh call you something else. Your email stays: it is the account."""
    request = pb.UpdateUserRequest(
        user=pb.User(display_name=name), update_mask=FieldMask(paths=["display_name"])
    )

    async def work(client: Client) -> pb.User:
        return (await client.users.UpdateUser(request)).user

    _print(call(work, address, ca, token_file), as_json=as_json)


def _print(user: pb.User, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json_format.MessageToJson(user, indent=None))
        return
    table = Table("id", "tenant", "email", "called", "since (UTC)")
    since = user.create_time.ToDatetime().isoformat(" ", "seconds")
    table.add_row(user.id, user.tenant_id, user.email, user.display_name, since)
    Console().print(table)
