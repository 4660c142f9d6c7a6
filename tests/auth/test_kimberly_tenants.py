"""`kimberly tenants`, `kimberly invitations`: joining, switching, leaving at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids
from server.auth.member_store import MemberStore
from server.auth.service import AuthService
from server.auth.tenant_service import TenantService
from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, Invite, Person
from tests.commands import Command, Ended, command_of
from tests.conftest import FakeClock, Serve


@pytest_asyncio.fixture
async def kimberly(
    serve: Serve, service: AuthService, members: MemberStore, clock: FakeClock, tmp_path: Path
) -> Command:
    tenants = TenantService(members, clock=clock)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_AuthServiceServicer_to_server(service, server)
        rpc.add_TenantServiceServicer_to_server(tenants, server)

    return await command_of(serve, tmp_path, register)


def token_of(person: Person) -> str:
    ((_, value),) = person.as_
    return value.removeprefix("Bearer ")


def lines(ended: Ended) -> list[dict[str, object]]:
    assert ended.status == 0, ended.error
    return [json.loads(line) for line in ended.output.splitlines()]


async def test_somebody_joins_a_tenant_switches_to_it_and_leaves_it(
    kimberly: Command,
    ada: Person,
    bob: Person,
    invite: Invite,
    verifier: TokenVerifier,
    tmp_path: Path,
) -> None:
    me, secrets = token_of(bob), tmp_path / "secrets"
    secrets.write_text(await invite(ada, bob.email, "auditor") + "\n")
    accepted = await kimberly("invitations", "accept", "--invitation-file", str(secrets), token=me)
    assert accepted.status == 0, accepted.error
    assert ada.tenant_id in accepted.output
    listed = lines(await kimberly("tenants", "list", "--json", token=me))
    assert [each["tenantId"] for each in listed] == [bob.tenant_id, ada.tenant_id]
    shown = (await kimberly("tenants", "list", token=me)).output
    for part in ("owner", "auditor", "home, current"):
        assert part in shown
    switched = await kimberly("tenants", "switch", ada.tenant_id, token=me)
    credentials = await verifier.verify(switched.output.strip())
    assert ids.show(ids.USER, credentials.caller.user_id) == listed[1]["userId"]
    (whole,) = lines(await kimberly("tenants", "switch", ada.tenant_id, "--json", token=me))
    assert "refreshToken" in str(whole)
    secrets.write_text(PASSWORD)
    leave = ("tenants", "leave", ada.tenant_id, "--password-file", str(secrets))
    left = await kimberly(*leave, token=me)
    assert left.output.startswith("rcp_")
    assert len(lines(await kimberly("tenants", "list", "--json", token=me))) == 1


async def test_what_cannot_be_told_ends_with_two(
    kimberly: Command, ada: Person, bob: Person, tmp_path: Path
) -> None:
    me, secrets = token_of(bob), tmp_path / "secrets"
    secrets.write_text("wrong")
    for arguments, reason in (
        (("invitations", "accept", "--invitation-file", str(secrets)), "MAILED_TOKEN_INVALID"),
        (("tenants", "switch", ada.tenant_id), "RESOURCE_NOT_FOUND"),
        (("tenants", "leave", bob.tenant_id, "--password-file", str(secrets)), "PROOF_INVALID"),
    ):
        ended = await kimberly(*arguments, token=me)
        assert (ended.status, ended.output) == (2, "")
        assert reason in ended.error
