"""Other users, many, so that one user's memories are few among the rows of the tables.

Some of them tell made-up conversations through the public API. What the import made of these is
then copied within Postgres, row by row, for all others: a thousand sign-ups would take longer
than everything else.
"""

import random
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import numpy as np

from bench.conversations import Conversation, Turn, Vectors
from bench.progress import step
from bench.telling import Teller, tell
from local.mesh import Mesh
from local.postgres import SUPERUSER

_COPIES = 49
"""How often one made-up conversation is copied at most."""
_NOISE = 0.5
"""Length of what is added to a vector of length 1."""
_TABLES = ("consents", "memories", "memory_scores", "embedding_models", "embeddings")


@dataclass(frozen=True, slots=True)
class Size:
    """How many others there are."""

    memories_each: int
    users: int

    @property
    def memories(self) -> int:
        """How many memories they have together."""
        return self.memories_each * self.users

    @property
    def originals(self) -> int:
        """How many of them sign up themselves."""
        return -(-self.users // (_COPIES + 1))


def make_up(conversations: Sequence[Conversation], size: Size) -> list[Conversation]:
    """Return conversations of turns as long as the real ones, of their words, shuffled.

    Vectors are those of real turns with noise added.
    """
    rng = random.Random(4)  # the same others in every run
    turns = [turn for conversation in conversations for turn in conversation.turns]
    words = [word for turn in turns for word in turn.text.split()]
    return [
        Conversation(f"other-{number}", tuple(_turns(rng, turns, words, size)), ())
        for number in range(size.originals)
    ]


def _turns(
    rng: random.Random, turns: Sequence[Turn], words: Sequence[str], size: Size
) -> Iterable[Turn]:
    for number in range(size.memories_each):
        like = turns[number % len(turns)]
        session, position = divmod(number, 20)
        yield Turn(
            id=str(number),
            session=str(session),
            position=position,
            said_at=like.said_at,
            speaker=like.speaker,
            text=" ".join(rng.choices(words, k=len(like.text.split()))),
            vector=_near(rng, rng.choice(turns).vector),
        )


def _near(rng: random.Random, vector: Vectors | None) -> Vectors | None:
    if vector is None:
        return None
    noise = np.random.default_rng(rng.getrandbits(32)).normal(size=len(vector))
    noisy = vector + _NOISE * noise / np.linalg.norm(noise)
    near: Vectors = (noisy / np.linalg.norm(noisy)).astype(np.float32)
    return near


@asynccontextmanager
async def gathered(
    mesh: Mesh, conversations: Sequence[Conversation], size: Size
) -> AsyncIterator[None]:
    """Put the others' memories into the tables."""
    made_up = make_up(conversations, size)
    async with tell(mesh, made_up, "importing for others") as originals:
        connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
        try:
            await multiply(connection, originals, size)
            stored = await connection.fetchval("SELECT count(*) FROM memories")
            assert stored >= size.memories, stored
        finally:
            await connection.close()
        yield


async def multiply(connection: asyncpg.Connection, originals: Sequence[Teller], size: Size) -> None:
    """Copy what the originals have until there are as many users as wanted, as superuser."""
    # The rows that foreign keys ask for are copied too.
    await connection.execute("SET session_replication_role = replica")
    statements = [await _copying(connection, table) for table in _TABLES]
    copies = size.users - len(originals)
    with step("copying the rest for others within Postgres", copies) as advance:
        for number in range(copies):
            original = uuid.UUID(originals[number % len(originals)].user_id.partition("_")[2])
            copy = (uuid.uuid4(), uuid.uuid4())
            async with connection.transaction():
                for statement in statements:
                    await connection.execute(statement, original, *copy)
            advance(1)


async def _copying(connection: asyncpg.Connection, table: str) -> str:
    """Return the statement that copies a user's rows: $1 whose, $2 to which tenant, $3 and user.

    An id keeps its first half, which tells it from others of the user, and their order.
    """
    columns = await connection.fetch(
        """
        SELECT attname AS name
          FROM pg_attribute
         WHERE attrelid = $1::text::regclass AND attnum > 0
           AND NOT attisdropped AND attgenerated = ''
        """,
        table,
    )
    names = [column["name"] for column in columns]
    new_id = "encode(substr(uuid_send({0}), 1, 8) || substr(uuid_send($3::uuid), 9), 'hex')::uuid"
    replaced = {"tenant_id": "$2::uuid", "user_id": "$3::uuid"}
    replaced |= {name: new_id.format(name) for name in ("id", "memory_id")}
    values = ", ".join(replaced.get(name, name) for name in names)
    return (
        f"INSERT INTO {table} ({', '.join(names)}) SELECT {values} FROM {table} WHERE user_id = $1"
    )
