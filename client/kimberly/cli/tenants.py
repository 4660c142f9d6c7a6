"""kimberly tenants, kimberly invitations: where your account belongs, joins and leaves."""

import uuid
from collections.abc import Sequence
from datetime import UTC
from pathlib import Path
from typing import Annotated, Final

import typer
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table

from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.cli.connection import LOCAL_EDGE, Address, Ca, TokenFile, call
from kimberly.client import Client

_ROLES: Final = {
    pb.ROLE_OWNER: "owner",
    pb.ROLE_ADMIN: "admin",
    pb.ROLE_MEMBER: "member",
    pb.ROLE_AUDITOR: "auditor",
}

app = typer.Typer(
    help="The tenants that your account belongs to: list them, switch to them, leave them.",
    no_args_is_help=True,
)
invitations = typer.Typer(help="Join the tenants that you are asked into.", no_args_is_help=True)

TenantId = Annotated[str, typer.Argument(metavar="TENANT_ID", help="Such as ten_0198c0f3….")]
AsJson = Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        exists=True, dir_okay=False, help="File that holds your password. Without it you are asked."
    ),
]


@invitations.command()
def accept(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    invitation_file: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="File that holds the token of the invitation, from the mail. Without it you are "
            "asked.",
        ),
    ] = None,
) -> None:
    """Join the tenant of an invitation that was mailed to you, with the account that you have."""
    secret = _secret(invitation_file, "Token of the invitation")
    request = pb.AcceptInvitationRequest(invitation=secret)

    async def work(client: Client) -> pb.Membership:
        return (await client.auth.AcceptInvitation(request)).membership

    _show([call(work, address, ca, token_file)], as_json=False)


@app.command("list")
def list_(
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    as_json: AsJson = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """List the tenants that you belong to, the one that your account is at home in first."""

    async def work(client: Client) -> Sequence[pb.Membership]:
        return (await client.auth.ListTenants(pb.ListTenantsRequest())).memberships

    _show(call(work, address, ca, token_file), as_json=as_json)


@app.command()
def switch(
    tenant_id: TenantId,
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the refresh token as well, as a JSON object.")
    ] = False,
) -> None:
    """Begin a session in another of your tenants, and print its access token.

    Further commands act there with it: export KIMBERLY_TOKEN=$(kimberly tenants switch ten_…)
    """

    async def work(client: Client) -> pb.SwitchTenantResponse:
        return await client.switch_tenant(tenant_id)

    switched = call(work, address, ca, token_file)
    if as_json:
        typer.echo(json_format.MessageToJson(switched, indent=None))
    else:
        typer.echo(switched.tokens.access_token)


@app.command()
def leave(
    tenant_id: TenantId,
    address: Address = LOCAL_EDGE,
    ca: Ca = None,
    token_file: TokenFile = None,
    password_file: PasswordFile = None,
) -> None:
    """Leave a tenant for good: what you kept there is erased. Prints the id of the receipt."""
    password = _secret(password_file, "Password")
    request = pb.LeaveTenantRequest(
        tenant_id=tenant_id, password=password, request_id=uuid.uuid4().hex
    )

    async def work(client: Client) -> pb.LeaveTenantResponse:
        return await client.auth.LeaveTenant(request)

    typer.echo(call(work, address, ca, token_file).receipt_id)


def _secret(file: Path | None, prompt: str) -> str:
    """Read what must not stand on the command line, where it would show among the processes."""
    if file:
        return file.read_text().strip("\r\n")
    asked: str = typer.prompt(prompt, hide_input=True, err=True)
    return asked


def _show(memberships: Sequence[pb.Membership], *, as_json: bool) -> None:
    if as_json:
        for membership in memberships:
            typer.echo(json_format.MessageToJson(membership, indent=None))
        return
    table = Table("tenant", "as", "role", "since (UTC)", "")
    for membership in memberships:
        table.add_row(
            *(membership.tenant_id, membership.user_id, _ROLES[membership.role]),
            *(_since(membership), _remark(membership)),
        )
    Console(soft_wrap=True, markup=False).print(table)


def _since(membership: pb.Membership) -> str:
    joined = membership.join_time.ToDatetime(tzinfo=UTC)
    return joined.isoformat(" ", "seconds").removesuffix("+00:00")


def _remark(membership: pb.Membership) -> str:
    remarks = {
        "home": membership.home,
        "current": membership.current,
        "disabled": membership.HasField("disable_time"),
    }
    return ", ".join(remark for remark, holds in remarks.items() if holds)
