"""`kimberly status` against a mesh on this machine, against one elsewhere, and against none."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from kimberly.memory.v1 import memory_pb2 as memory

from local.certificates import Names, make_leaf, make_root
from local.mesh import Mesh
from local.ports import LOOPBACK
from server.clock import utc_now
from tests.mesh import User, address_of

CHECKOUT = Path(__file__).parent.parent.parent
UNSEEN = "queue, latencies, quotas of all: not seen from here"
NOBODY = "your jobs, meditations, quota: not seen without an access token"


async def status(
    *arguments: str, token: str = "", directory: Path = CHECKOUT
) -> tuple[int | None, str, str]:
    """Run the command; return its exit status, output and errors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kimberly.cli", "status", *arguments),
        cwd=directory,
        env={"PATH": os.defpath, "PYTHONPATH": str(CHECKOUT / "client"), "KIMBERLY_TOKEN": token},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


def rows(output: str, section: str) -> dict[str, str]:
    """Return what is said in a section of the table, by what it is about."""
    found: dict[str, str] = {}
    within = False
    for line in output.splitlines():
        if line[:1] not in {" ", ""}:
            within = line.startswith(section)
        parts = [part for part in line.removeprefix(section).split("  ") if part.strip()]
        if within and len(parts) == 2:
            found[parts[0].strip()] = parts[1].strip()
    return found


async def test_a_mesh_on_this_machine_shows_all_of_it(mesh: Mesh, user: User) -> None:
    draft = memory.Memory(content="tea at five" * 200)
    await user.grpc(memory.CreateMemoryRequest(memory=draft))
    await user.grpc(memory.QueryMemoriesRequest(query="tea"))
    code, output, errors = await status("--mesh", str(mesh.layout.endpoints), token=user.token)
    assert code == 0, errors
    assert "well: the edge reaches every service" in output
    mine, everybody = rows(output, "yours"), rows(output, "of all")
    assert set(mine) == {"jobs", "meditation", "quota"}
    assert mine["jobs"] == "0 waiting, 0 running, 0 dead"
    assert mine["meditation"] == "none yet"
    assert "long-term 2 of 2048 KiB" in mine["quota"]
    assert set(everybody) == {"queue", "meditation", "memories", "quota", "calls", "queries"}
    assert "1 workers" in everybody["queue"]
    latency = re.compile(r"p50 / p99 [\d.]+ / [\d.]+ ms, of the last \d+ (s|min)")
    assert latency.fullmatch(everybody["calls"])
    assert latency.fullmatch(everybody["queries"])
    assert UNSEEN not in output


async def test_a_mesh_of_this_directory_is_found_by_itself(mesh: Mesh, tmp_path: Path) -> None:
    (tmp_path / ".mesh").symlink_to(mesh.layout.state)
    code, output, errors = await status(directory=tmp_path)
    assert code == 0, errors
    assert rows(output, "of all")
    assert rows(output, "yours") == {}
    assert NOBODY in output


async def test_a_mesh_elsewhere_shows_what_its_users_may_know_and_says_what_they_may_not(
    mesh: Mesh, user: User
) -> None:
    run = (await user.grpc(memory.MeditateRequest())).meditation
    there = ("--address", address_of(mesh), "--ca", str(mesh.ca))
    code, output, errors = await status(*there, token=user.token)
    assert code == 0, errors
    assert run.id in rows(output, "yours")["meditation"]
    assert rows(output, "of all") == {}
    assert UNSEEN in output
    assert NOBODY not in output


async def test_what_a_token_does_not_open_is_said_to_be_not_seen(mesh: Mesh) -> None:
    there = ("--address", address_of(mesh), "--ca", str(mesh.ca))
    code, output, _ = await status(*there, token="no.such.token")
    assert code == 0
    assert {text.partition(":")[0] for text in rows(output, "yours").values()} == {"not seen"}


async def test_a_mesh_that_does_not_answer_ends_the_command_with_2(mesh: Mesh) -> None:
    code, output, errors = await status("--address", "localhost:9", "--ca", str(mesh.ca))
    assert (code, output) == (2, "")
    assert "localhost:9: " in errors
    # One that nobody vouches for is none that answers.
    code, _, errors = await status("--address", address_of(mesh))
    assert code == 2
    assert "certificate" in errors.lower()


class Ailing(BaseHTTPRequestHandler):
    """An edge that misses a service."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - as it is there
        """Say nothing."""


async def test_an_edge_that_misses_a_service_ends_the_command_with_1(tmp_path: Path) -> None:
    root = make_root("the edge's authority", now=utc_now())
    leaf = make_leaf(root, Names(dns_names=("localhost",), addresses=(LOOPBACK,)), now=utc_now())
    for name, pem in (
        ("ca", root.certificate_pem),
        ("leaf", leaf.certificate_pem + leaf.key_pem),
    ):
        (tmp_path / name).write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "leaf")
    with ThreadingHTTPServer((LOOPBACK, 0), Ailing) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = Thread(target=server.serve_forever)
        thread.start()
        there = ("--address", f"localhost:{server.server_port}", "--ca", str(tmp_path / "ca"))
        code, output, _ = await status(*there, token="of nobody")
        server.shutdown()
        thread.join()
    assert code == 1
    assert "not well: the edge does not reach every service (HTTP 503)" in output
