"""LangGraph's AsyncPostgresStore: a namespace a user, vectors by pgvector, `asearch`."""

import asyncio
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from langgraph.store.postgres import AsyncPostgresStore  # type: ignore[import-not-found] # an extra

from bench.peers.serving import GivenVectors, Item, Search, serve


class LangGraph:
    """Keeps turns as items with one field, `text`."""

    def __init__(self, store: Any, vectors: GivenVectors) -> None:
        self._store = store
        self._vectors = vectors

    async def keep(self, user: str, items: Sequence[Item]) -> None:
        """Store items of a user."""
        for item in items:
            self._vectors.learn(item.text, item.vector)
            await self._store.aput((user,), item.id, {"text": item.text})

    async def find(self, search: Search) -> list[str]:
        """Return ids of items, best first."""
        self._vectors.learn(search.text, search.vector)
        found = await self._store.asearch((search.user,), query=search.text, limit=search.limit)
        return [item.key for item in found]


async def main(dsn: str, dimensions: int) -> None:
    """Serve one store in an empty database."""
    vectors = GivenVectors()
    index = {"dims": dimensions, "embed": vectors.embed, "fields": ["text"]}
    pool = {"min_size": 1, "max_size": 10}
    async with AsyncPostgresStore.from_conn_string(dsn, pool_config=pool, index=index) as store:
        await store.setup()
        name = f"LangGraph PostgresStore {version('langgraph-checkpoint-postgres')}"
        peer = LangGraph(store, vectors)
        await serve(name, peer, lambda: asyncio.to_thread(sys.stdin.readline))


if __name__ == "__main__":
    asyncio.run(main(os.environ["PEER_DSN"], int(os.environ["PEER_DIMENSIONS"])))
