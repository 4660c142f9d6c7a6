"""The `kimberly` command as a process of its own, against a service behind TLS."""

from __future__ import annotations

import asyncio
import datetime as dt
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from local.certificates import Names, make_leaf, make_root
from local.ports import LOOPBACK
from server.caller import Caller
from tests.conftest import Serve, bearer

CHECKOUT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a command."""

    status: int
    output: str
    error: str


@dataclass(frozen=True, slots=True)
class Command:
    """The `kimberly` command of one user, against a service behind TLS."""

    address: str
    directory: Path

    async def __call__(self, *arguments: str, token: str, **environment: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "kimberly.cli",
            *arguments,
            env={
                "PATH": os.defpath,
                "PYTHONPATH": str(CHECKOUT / "client"),
                "HOME": str(self.directory),
                "COLUMNS": "200",
                "KIMBERLY_ADDRESS": self.address,
                "KIMBERLY_CA": str(self.directory / "ca.crt"),
                "KIMBERLY_TOKEN": token,
                "GRPC_VERBOSITY": "NONE",
                **environment,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, error = await process.communicate()
        assert process.returncode is not None
        return Ended(process.returncode, output.decode(), error.decode())


async def command_of(
    serve: Serve, directory: Path, add: Callable[[grpc.aio.Server], None]
) -> Command:
    """Serve what is added behind TLS, as the edge would, and return the command that reaches it."""
    now = dt.datetime.now(dt.UTC)
    root = make_root("the edge's authority", now=now)
    leaf = make_leaf(root, Names(dns_names=("localhost",), addresses=(LOOPBACK,)), now=now)
    (directory / "ca.crt").write_bytes(root.certificate_pem)
    credentials = grpc.ssl_server_credentials([(leaf.key_pem, leaf.certificate_pem)])
    ports = []

    def register(server: grpc.aio.Server) -> None:
        add(server)
        ports.append(server.add_secure_port(f"{LOOPBACK}:0", credentials))

    await serve(register)
    return Command(f"localhost:{ports[0]}", directory)


def token_of(caller: Caller) -> str:
    """Return the token that `bearer` sends."""
    ((_, value),) = bearer(caller)
    return value.removeprefix("Bearer ")
