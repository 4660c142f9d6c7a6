"""python -m bench.listing: how long a page of one user's list takes among a million memories."""

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeAlias

import asyncpg
import typer
from kimberly.client import connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from bench.measure import latency
from bench.pace import pace
from bench.progress import step
from bench.table import Markdown, Row, show
from bench.telling import Stub, address, bare_stub
from local import demo
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import SUPERUSER

_CALLS = 1_000
_OWN = 2_000
_USERS = 1_000
"""How many others there are, with as many memories each as it takes."""
_GOAL = "goal: p50 4 ms"

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    memories: Annotated[int, typer.Option(min=_USERS, help="Memories of others.")] = 1_000_000,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure pages of a list in a mesh of its own, through edge and sidecar, one after the other.

    The user has 2000 memories; others, a thousand users, have a million. Theirs are made within
    Postgres. It takes two minutes; let nothing else run meanwhile.
    """
    rows = asyncio.run(_measure(memories))
    show(rows, markdown=markdown)


async def _measure(memories: int) -> list[Row]:
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory))) as mesh:
            await mesh.wait_ready()
            await _make_others(mesh, memories)
            async with connect(address(mesh), mesh.ca) as client, bare_stub(mesh) as stub:
                email = f"bench-{secrets.token_hex(6)}@example.com"
                await client.sign_up(email, secrets.token_hex(12))
                await client.users.RecordConsent(
                    users.RecordConsentRequest(
                        purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True
                    )
                )
                metadata = (("authorization", f"Bearer {client.access_token}"),)
                await _import_own(stub, metadata)
                before = pace()
                return [before, *[row async for row in _pages(stub, metadata, memories)], pace()]


async def _make_others(mesh: Mesh, memories: int) -> None:
    """Make memories of others, past the triggers that count them."""
    each = memories // _USERS
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    try:
        await connection.execute("SET session_replication_role = replica")
        with step("making memories of others", _USERS) as advance:
            for _ in range(_USERS):
                await connection.execute(
                    """
                    WITH made AS (
                        INSERT INTO memories (tenant_id, user_id, id, tier, content, source,
                                              occurred_at, size_bytes, content_hash, created_at,
                                              updated_at, terms, tags)
                        SELECT $1, $1, uuidv7(), 'long_term', 'note ' || n, 'import', now(), 40,
                               sha256(('note ' || n)::bytea), now(), now(),
                               ('{' || n || ':1}/1000000000')::sparsevec, ARRAY['t' || n % 10]
                          FROM generate_series(1, $2) AS n
                        RETURNING id
                    )
                    INSERT INTO memory_scores (tenant_id, user_id, memory_id, last_seen_at)
                    SELECT $1, $1, id, now() FROM made
                    """,
                    uuid.uuid4(),
                    each,
                )
                advance(1)
        await connection.execute("ANALYZE memories, memory_scores")
    finally:
        await connection.close()


async def _import_own(stub: Stub, metadata: Metadata) -> None:
    said = [turn.text for turn in demo.read_transcript(demo.SAMPLE)]
    own = [
        memory.Memory(content=f"{n} {said[n % len(said)]}", tags=[f"t{n % 10}"])
        for n in range(_OWN)
    ]
    chunks = [
        memory.ImportMemoriesRequest(memories=own[at : at + 500]) for at in range(0, _OWN, 500)
    ]
    await stub.ImportMemories(iter(chunks), metadata=metadata)


async def _pages(stub: Stub, metadata: Metadata, others: int) -> AsyncIterator[Row]:
    many = memory.ListMemoriesRequest(page_size=1_000)
    half_way = (await stub.ListMemories(many, metadata=metadata)).next_page_token
    asked = {
        "page of 20, the newest": memory.ListMemoriesRequest(page_size=20),
        "page of 20, half way": memory.ListMemoriesRequest(page_size=20, page_token=half_way),
        "page of 20 with a tag": memory.ListMemoriesRequest(page_size=20, tags=["t3"]),
        "page of 100, the newest": memory.ListMemoriesRequest(page_size=100),
    }
    for name, request in asked.items():

        async def ask(request: memory.ListMemoriesRequest = request) -> None:
            await stub.ListMemories(request, metadata=metadata)

        yield Row(f"{name}, among {others:,}", str(await latency(ask, calls=_CALLS)), _GOAL)


if __name__ == "__main__":
    app()
