"""The README's tour with grpcurl: list, describe, a unary call, a stream."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from local.mesh import Mesh
from server.access import REFLECTION, public_services
from tests.mesh import User, address_of

MEMORY = "kimberly.memory.v1.MemoryService"


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a command."""

    code: int
    output: str
    error: str


@dataclass(frozen=True, slots=True)
class Grpcurl:
    """The command line of one user."""

    mesh: Mesh
    token: str

    async def __call__(self, *what: str, sent: str | None = None) -> Ended:
        """Run it; `sent` is the message, or messages, that it reads from its input."""
        header = ("-H", f"authorization: Bearer {self.token}") if self.token else ()
        data = () if sent is None else ("-d", "@")
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("grpcurl")),
            *("-max-time", "10", "-cacert", str(self.mesh.ca)),
            *(*header, *data, address_of(self.mesh), *what),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, error = await process.communicate((sent or "").encode())
        return Ended(process.returncode or 0, output.decode(), error.decode())


@pytest.fixture
def grpcurl(mesh: Mesh, user: User) -> Grpcurl:
    return Grpcurl(mesh, user.token)


async def test_it_lists_every_public_service(grpcurl: Grpcurl) -> None:
    listed = await grpcurl("list")
    assert listed.output.split() == sorted([*public_services(), REFLECTION])
    assert len(public_services()) == 8


async def test_it_does_not_list_the_services_of_workers(grpcurl: Grpcurl) -> None:
    listed = await grpcurl("list")
    assert "WorkerService" not in listed.output
    assert "ScoringService" not in listed.output


@pytest.mark.parametrize("service", public_services())
async def test_it_describes_a_service(grpcurl: Grpcurl, service: str) -> None:
    described = await grpcurl("describe", service)
    assert f"service {service.rpartition('.')[2]} {{" in described.output, described.error


async def test_it_describes_a_message(grpcurl: Grpcurl) -> None:
    described = await grpcurl("describe", "kimberly.memory.v1.Memory")
    assert ".kimberly.memory.v1.Tier tier = 2;" in described.output


async def test_it_makes_a_unary_call(grpcurl: Grpcurl, user: User) -> None:
    memory = {"memory": {"content": "Ann sails on Sundays"}}
    made = await grpcurl(f"{MEMORY}/CreateMemory", sent=json.dumps(memory))
    assert json.loads(made.output)["created"] is True, made.error
    who = await grpcurl("kimberly.users.v1.UserService/GetUser")
    assert json.loads(who.output)["user"]["id"] == user.id


async def test_it_sends_a_stream_of_two_messages(grpcurl: Grpcurl) -> None:
    chunks = (
        {"first_index": 0, "memories": [{"content": "one"}, {"content": "two"}]},
        {"first_index": 2, "memories": [{"content": "three"}]},
    )
    sent = "\n".join(map(json.dumps, chunks))
    imported = await grpcurl(f"{MEMORY}/ImportMemories", sent=sent)
    outcome = json.loads(imported.output)
    assert (outcome["created"], outcome["next_index"]) == ("3", "3"), imported.error


async def test_it_shows_why_a_call_was_refused(grpcurl: Grpcurl) -> None:
    refused = await grpcurl(f"{MEMORY}/GetMemory", sent='{"id": "nonsense"}')
    assert refused.code
    assert "InvalidArgument" in refused.error
    assert "must be mem_ and 32 hexadecimal digits" in refused.error


@pytest.mark.parametrize(
    "what", [("list",), ("describe", MEMORY), ("kimberly.users.v1.UserService/GetUser",)]
)
async def test_without_a_token_it_is_refused(mesh: Mesh, what: tuple[str, ...]) -> None:
    refused = await Grpcurl(mesh, "")(*what)
    assert refused.code
    assert "Unauthenticated" in refused.error
    assert refused.output == ""
