"""`kimberly audit` through the edge: the services sign checkpoints without being asked."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.mesh import User, address_of, eventually
from tests.transports import Transport

CHECKOUT = Path(__file__).parent.parent.parent


async def test_a_user_verifies_the_log_of_what_they_did(
    mesh: Mesh, user: User, tmp_path: Path
) -> None:
    draft = memory.Memory(content="remember this")
    await user.grpc(memory.CreateMemoryRequest(memory=draft))

    async def look() -> users.VerifyAuditLogResponse:
        answer: users.VerifyAuditLogResponse = await user.grpc(users.VerifyAuditLogRequest())
        return answer

    signed = await eventually(
        look, lambda seen: seen.newest_checkpoint.position == seen.verified_events
    )
    assert signed.intact
    request = auth.CreateApiKeyRequest(name="an auditor", scopes=["audit.read", "profile.read"])
    key = (await user.grpc(request)).secret
    for secret in ({"KIMBERLY_TOKEN": user.token}, {"KIMBERLY_API_KEY": key}):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "kimberly.cli", "audit", "verify"),
            *("--address", address_of(mesh), "--ca", str(mesh.ca), "--receipts", str(tmp_path)),
            env={
                "PATH": os.defpath,
                "PYTHONPATH": str(CHECKOUT / "client"),
                "COLUMNS": "200",
                **secret,
            },
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert signed.newest_checkpoint.key_id in output.decode()


async def test_links_and_checkpoints_are_the_same_over_both_transports(call: Transport) -> None:
    await call(memory.CreateMemoryRequest(memory=memory.Memory(content="remember this")))
    found = await call(users.VerifyAuditLogRequest())
    links = (await call(users.ListAuditLinksRequest(page_size=1000))).links
    assert [link.position for link in links] == list(range(1, found.verified_events + 1))
    assert links[-1].hash == found.head_hash
    assert all(link.transaction > 0 for link in links)
