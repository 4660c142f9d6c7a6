"""python -m bench.importing: how many memories a second one import stream stores durably."""

import asyncio
import itertools
import random
import secrets
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, TypeAlias

import asyncpg
import typer
from kimberly.client import Client, connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as users

from bench.progress import step
from bench.table import Markdown, Row, show
from bench.telling import Stub, address, bare_stub
from local import demo
from local.layout import Layout
from local.mesh import Mesh
from local.postgres import DATABASE, SUPERUSER

_CHUNK = 1_000
_TURNS = 600
"""Turns of one conversation: as many as those of the retrieval benchmark have."""
_VOCABULARY = 20_000
_GOAL = "goal: 10 000/s"
_SYLLABLES = ("ba", "den", "for", "gi", "kel", "lo", "mur", "na", "pri", "sta", "tor", "vin")
_ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ness", "ment")

Make: TypeAlias = Callable[[Sequence[str]], list[memory.Memory]]
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    items: Annotated[int, typer.Option(min=1_000, help="Memories of each import.")] = 50_000,
    markdown: Markdown = False,  # noqa: FBT002 - a flag of the command line
) -> None:
    """Measure imports of made-up sentences into a mesh of its own, durable, on this machine.

    Each import is one stream of one user through edge and sidecar, with TLS, token, consent,
    quota, audit and a request_id. The sentences have the length of the sample conversation's
    turns; their words are spread as words of a language are. Beside it stands what Postgres
    alone takes to store the same texts under an id, in transactions of as many.

    Let nothing else run meanwhile; it takes a minute.
    """
    rows = asyncio.run(_measure(items))
    show(rows, markdown=markdown)


async def _measure(items: int) -> list[Row]:
    texts = list(itertools.islice(sentences(), items))
    with TemporaryDirectory(prefix="kimberly-bench-") as directory:
        async with Mesh(Layout(Path(directory))) as mesh:
            await mesh.wait_ready()
            async with bare_stub(mesh) as stub:
                await _import(mesh, stub, _alone, texts[:5_000], "warm-up")
                bare = await _store_bare(mesh, texts)
                alone = await _import(mesh, stub, _alone, texts, "items alone")
                again = await _import(mesh, stub, _turns, texts, "turns of conversations")
    return [
        Row("texts into a bare table", f"{bare:.0f}/s"),
        Row("import of items alone", f"{alone:.0f}/s", _GOAL),
        Row(f"import of turns, {_TURNS} a conversation", f"{again:.0f}/s", _GOAL),
    ]


def sentences() -> Iterator[str]:
    """Yield sentences for ever, the same ones in every run and no two alike."""
    rng = random.Random(4)  # the same in every run
    said = [turn.text.split() for turn in demo.read_transcript(demo.SAMPLE)]
    frequent = [word for word, _ in Counter(itertools.chain(*said)).most_common()]
    words = [*frequent, *_made_up(rng, _VOCABULARY - len(frequent))]
    weights = list(itertools.accumulate(1 / rank for rank in range(1, len(words) + 1)))
    for number in itertools.count():
        length = len(rng.choice(said))
        yield f"{number} {' '.join(rng.choices(words, cum_weights=weights, k=length))}"


def _made_up(rng: random.Random, count: int) -> list[str]:
    return [
        "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))) + rng.choice(_ENDINGS)
        for _ in range(count)
    ]


def _alone(texts: Sequence[str]) -> list[memory.Memory]:
    return [memory.Memory(content=text) for text in texts]


def _turns(texts: Sequence[str]) -> list[memory.Memory]:
    return [
        memory.Memory(
            content=text,
            session_id=f"talk {number // _TURNS}",
            session_position=number % _TURNS,
            speaker=("Ann", "Bob")[number % 2],
        )
        for number, text in enumerate(texts)
    ]


async def _import(mesh: Mesh, stub: Stub, make: Make, texts: Sequence[str], name: str) -> float:
    """Import texts of a new user and return how many a second were stored."""
    memories = make(texts)
    request_id = secrets.token_hex(8)
    chunks = [
        memory.ImportMemoriesRequest(
            first_index=start, memories=memories[start : start + _CHUNK], request_id=request_id
        )
        for start in range(0, len(memories), _CHUNK)
    ]
    async with _user(mesh) as client:
        with step(f"import: {name}", len(memories)) as advance:
            metadata = (("authorization", f"Bearer {client.access_token}"),)
            began = time.perf_counter()
            outcome = await stub.ImportMemories(_sent(chunks, advance), metadata=metadata)
            seconds = time.perf_counter() - began
    assert outcome.created == len(memories), outcome
    return len(memories) / seconds


async def _sent(
    chunks: Sequence[memory.ImportMemoriesRequest], advance: Callable[[int], None]
) -> AsyncIterator[memory.ImportMemoriesRequest]:
    for chunk in chunks:
        yield chunk
        advance(len(chunk.memories))


@asynccontextmanager
async def _user(mesh: Mesh) -> AsyncIterator[Client]:
    """Sign up a user who may keep much."""
    async with connect(address(mesh), mesh.ca) as client:
        email = f"import-{secrets.token_hex(6)}@example.com"
        account = await client.sign_up(email, secrets.token_hex(12))
        grant = users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)
        await client.users.RecordConsent(grant)
        async with _postgres(mesh) as connection:
            await connection.execute(
                "INSERT INTO subscriptions (tenant_id, user_id, plan) VALUES ($1, $2, 'premium')",
                uuid.UUID(account.tenant_id.removeprefix("ten_")),
                uuid.UUID(account.user_id.removeprefix("usr_")),
            )
        yield client


async def _store_bare(mesh: Mesh, texts: Sequence[str]) -> float:
    """Store texts in a table with nothing but an id, and return how many a second."""
    async with _postgres(mesh) as connection:
        await connection.execute("CREATE TABLE bare (id uuid PRIMARY KEY, content text NOT NULL)")
        began = time.perf_counter()
        for start in range(0, len(texts), _CHUNK):
            chunk = texts[start : start + _CHUNK]
            await connection.execute(
                "INSERT INTO bare SELECT * FROM unnest($1::uuid[], $2::text[])",
                [uuid.uuid4() for _ in chunk],
                chunk,
            )
        seconds = time.perf_counter() - began
        await connection.execute("DROP TABLE bare")
    return len(texts) / seconds


@asynccontextmanager
async def _postgres(mesh: Mesh) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(mesh.stores.postgres.dsn(SUPERUSER, DATABASE))
    try:
        yield connection
    finally:
        await connection.close()


if __name__ == "__main__":
    app()
