"""Our side of a peer: its database on the mesh's Postgres, its process, its answers."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from bench.conversations import Conversation, Question, Turn, Vectors
from bench.judging import DEPTH, Answer
from bench.progress import step
from local.layout import CHECKOUT
from local.mesh import Mesh
from local.postgres import SUPERUSER

HOME = CHECKOUT / "build" / "peers"
"""The environment that `make bench-retrieval` and `make bench-jobs` install them into."""

MODULES = ("langgraph_store", "mem0_memory")
"""The peers; the database of each has the same name."""

_AT_ONCE = 50
_LINE_BYTES = 16 * 1024 * 1024


class PeerError(Exception):
    """A peer does not work here; the text says why."""


class Peer:
    """A peer that runs."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.name = name
        self._process = process

    async def exchange(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send one request and return its answer."""
        return await _exchange(self._process, request)

    async def tell(self, conversations: Sequence[Conversation]) -> None:
        """Store the turns of each conversation as one user's."""
        turns = sum(len(conversation.turns) for conversation in conversations)
        with step(f"{self.name}, importing", turns) as advance:
            for conversation in conversations:
                for start in range(0, len(conversation.turns), _AT_ONCE):
                    items = [_item(turn) for turn in conversation.turns[start : start + _AT_ONCE]]
                    await _exchange(self._process, {"user": conversation.name, "items": items})
                    advance(len(items))

    async def ask(self, conversation: Conversation, question: Question) -> Answer:
        """Ask the user of a conversation. The peer's own process takes the time."""
        search = {
            "user": conversation.name,
            "text": question.text,
            "vector": _numbers(question.vector),
            "limit": DEPTH,
        }
        answer = await _exchange(self._process, search)
        return Answer(answer["ids"], answer["seconds"])


@asynccontextmanager
async def running(
    python: Path, module: str, mesh: Mesh, dimensions: int = 0
) -> AsyncIterator[Peer]:
    """Run a peer on a database of its own.

    Raises:
        PeerError: It is not installed, or does not start.
    """
    if not python.exists():
        raise PeerError(f"{python} is missing: `make build/peers/installed` installs the peers")
    await _on_database(mesh, "postgres", f'CREATE DATABASE "{module}"')
    log = mesh.layout.logs / f"{module}.log"
    with log.open("wb") as errors:
        process = await asyncio.create_subprocess_exec(
            python,
            "-m",
            f"bench.peers.{module}",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=_environment(mesh, module, dimensions),
            limit=_LINE_BYTES,
        )
    try:
        yield Peer(process, (await _answer(process))["name"])
    except EOFError as error:
        last = log.read_text().strip().rpartition("\n")[2]
        raise PeerError(f"{module} ended: {last}") from error
    finally:
        assert process.stdin
        process.stdin.close()
        await process.wait()


async def tidy(mesh: Mesh, database: str) -> None:
    """Vacuum and analyse, as the autovacuum of any Postgres would do a minute later."""
    await _on_database(mesh, database, "VACUUM (ANALYZE)")


async def _on_database(mesh: Mesh, database: str, statement: str) -> None:
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER, database))
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _environment(mesh: Mesh, module: str, dimensions: int) -> dict[str, str]:
    home = mesh.layout.state / module
    home.mkdir(mode=0o700)
    return {
        "PATH": os.defpath,
        "PYTHONPATH": str(CHECKOUT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "PEER_DSN": mesh.stores.dsn(SUPERUSER, module),
        "PEER_DIMENSIONS": str(dimensions),
        "MEM0_DIR": str(home),
        # It would report to its makers over the Internet.
        "MEM0_TELEMETRY": "False",
    }


async def _exchange(process: asyncio.subprocess.Process, request: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin
    process.stdin.write(json.dumps(request).encode() + b"\n")
    await process.stdin.drain()
    return await _answer(process)


async def _answer(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout
    line = await process.stdout.readline()
    if not line:
        raise EOFError
    answer: dict[str, Any] = json.loads(line)
    return answer


def _item(turn: Turn) -> dict[str, object]:
    return {"id": turn.id, "text": turn.line, "vector": _numbers(turn.vector)}


def _numbers(vector: Vectors | None) -> Sequence[float]:
    assert vector is not None
    numbers: list[float] = vector.tolist()
    return numbers
