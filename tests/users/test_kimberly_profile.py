"""`kimberly profile`: who one is, at the command line."""

from __future__ import annotations

import json
from pathlib import Path

import asyncpg
from kimberly.users.v1 import users_pb2_grpc as rpc

from server.caller import Caller
from server.database import Database, SystemDatabase
from server.users.audit_log import AuditLog
from server.users.consent_store import ConsentStore
from server.users.service import UserService
from server.users.store import UserStore
from server.users.tenant_audits import TenantAudits
from server.users.withdrawal_archive import WithdrawalArchive
from tests.commands import command_of, token_of
from tests.conftest import Serve
from tests.users.test_account import named


async def test_a_user_is_shown_and_called_something_else(
    serve: Serve,
    database: Database,
    system_database: SystemDatabase,
    consents: ConsentStore,
    withdrawals: WithdrawalArchive,
    audit_log: AuditLog,
    owner: asyncpg.Connection,
    caller: Caller,
    tmp_path: Path,
) -> None:
    await named(owner, caller, "ada@example.com")
    service = UserService(
        UserStore(database), consents, withdrawals, TenantAudits(system_database), audit_log
    )
    kimberly = await command_of(
        serve, tmp_path, lambda server: rpc.add_UserServiceServicer_to_server(service, server)
    )
    me = token_of(caller)
    shown = json.loads((await kimberly("profile", "show", "--json", token=me)).output)
    assert (shown["email"], shown["displayName"]) == ("ada@example.com", "Ada")
    changed = await kimberly("profile", "rename", "Countess", "--json", token=me)
    assert json.loads(changed.output)["displayName"] == "Countess"
    assert "Countess" in (await kimberly("profile", "show", token=me)).output
    refused = await kimberly("profile", "rename", "A" * 101, token=me)
    assert (refused.status, "FIELD_INVALID" in refused.error) == (2, True)
