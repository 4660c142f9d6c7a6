"""mem0's Memory with pgvector: `add(infer=False)`, a user a conversation, `search`.

Its search adds up cosine, keyword rank and entities. Without a language model nothing is linked
to entities; without spaCy's model, which is not on PyPI, words are matched as they are written.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from mem0 import Memory  # type: ignore[import-not-found] # an extra

from bench.peers.serving import GivenVectors, Item, Search, serve

_UNUSED = {"provider": "openai", "config": {"api_key": "unused"}}
"""mem0 wants a language model and an embedder; nothing is ever asked of these."""


class Embedder:
    """The given vectors, as mem0 calls an embedder."""

    def __init__(self, vectors: GivenVectors) -> None:
        self._vectors = vectors

    def embed(self, text: str, memory_action: str | None = None) -> list[float]:
        """Return the vector of a text."""
        return self._vectors.embed([text])[0]


class Mem0:
    """Keeps turns as memories with their id as metadata."""

    def __init__(self, memory: Any, vectors: GivenVectors) -> None:
        self._memory = memory
        self._vectors = vectors
        memory.embedding_model = Embedder(vectors)

    async def keep(self, user: str, items: Sequence[Item]) -> None:
        """Store items of a user."""
        for item in items:
            self._vectors.learn(item.text, item.vector)
            self._memory.add(item.text, user_id=user, metadata={"turn": item.id}, infer=False)

    async def find(self, search: Search) -> list[str]:
        """Return ids of items, best first."""
        self._vectors.learn(search.text, search.vector)
        found = self._memory.search(
            search.text, filters={"user_id": search.user}, top_k=search.limit
        )
        return [memory["metadata"]["turn"] for memory in found["results"]]


async def main(dsn: str, dimensions: int) -> None:
    """Serve one memory in an empty database."""
    store = {"connection_string": dsn, "embedding_model_dims": dimensions}
    memory = Memory.from_config(
        {
            "vector_store": {"provider": "pgvector", "config": store},
            "llm": _UNUSED,
            "embedder": _UNUSED,
            "history_db_path": f"{os.environ['MEM0_DIR']}/history.db",
        }
    )
    name = f"mem0 {version('mem0ai')}, infer=False"
    await serve(name, Mem0(memory, GivenVectors()), lambda: asyncio.to_thread(sys.stdin.readline))


if __name__ == "__main__":
    asyncio.run(main(os.environ["PEER_DSN"], int(os.environ["PEER_DIMENSIONS"])))
