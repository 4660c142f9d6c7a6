"""`kimberly meditate` and `kimberly meditations` through the edge, done by a real worker."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.mesh import User, address_of

CHECKOUT = Path(__file__).parent.parent.parent
SIZE = 10


async def kimberly(mesh: Mesh, user: User, *arguments: str) -> tuple[int | None, str, str]:
    """Run a command; return its exit status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kimberly.cli", *arguments),
        *("--address", address_of(mesh), "--ca", str(mesh.ca)),
        env={
            "PATH": os.defpath,
            "PYTHONPATH": str(CHECKOUT / "client"),
            "KIMBERLY_TOKEN": user.token,
            "COLUMNS": "200",
        },
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def remember(user: User, count: int) -> None:
    for n in range(count):
        draft = memory.Memory(content=f"{n:0{SIZE}}")
        await user.grpc(memory.CreateMemoryRequest(memory=draft))


async def keep_at_most(user: User, memories: int) -> None:
    quotas = users.Quotas(long_term_bytes=memories * SIZE)
    request = users.UpdateSettingsRequest(settings=users.Settings(quotas=quotas))
    request.update_mask.paths.append("quotas.long_term_bytes")
    await user.grpc(request)


async def test_a_user_tries_a_meditation_lets_it_happen_and_undoes_it(
    mesh: Mesh, user: User
) -> None:
    await remember(user, 6)
    await keep_at_most(user, 4)
    status, output, errors = await kimberly(mesh, user, "meditate", "--dry-run", "--watch")
    assert status == 0, errors
    told = [line for line in output.splitlines() if "would be archived" in line]
    assert "2" in told[0]
    status, output, errors = await kimberly(mesh, user, "meditate", "--watch", "--json")
    assert status == 0, errors
    done = json.loads(output)
    assert (done["processed"], done["scored"], done["archived"]) == ("6", "6", "2")
    shown = await kimberly(mesh, user, "meditations", "show", done["id"])
    assert shown[0] == 0
    assert done["id"] in shown[1]
    status, output, _ = await kimberly(mesh, user, "meditations", "list")
    assert status == 0
    assert [kind in output for kind in ("dry run", "what moved", done["id"])] == [True] * 3
    assert (await kimberly(mesh, user, "meditations", "undo", done["id"]))[1] == (
        "2 memories are back\n"
    )
    left = await user.grpc(memory.ListMemoriesRequest())
    assert len(left.memories) == 6


async def test_a_meditation_that_is_none_ends_the_command_with_2(mesh: Mesh, user: User) -> None:
    for command in ("show", "undo"):
        missing = f"med_{'0' * 32}"
        status, _, errors = await kimberly(mesh, user, "meditations", command, missing)
        assert status == 2
        assert "RESOURCE_NOT_FOUND" in errors
    status, _, errors = await kimberly(mesh, user, "meditations", "show", "nonsense")
    assert status == 2
    assert "FIELD_INVALID" in errors
