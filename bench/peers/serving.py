"""The peer's side: JSON Lines come in, JSON Lines go out. Standard library only."""

import json
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Item:
    """A turn to keep."""

    id: str
    text: str
    vector: Sequence[float]


@dataclass(frozen=True, slots=True)
class Search:
    """What is asked of one user's items."""

    user: str
    text: str
    vector: Sequence[float]
    limit: int


class Peer(Protocol):
    """A store that is measured."""

    async def keep(self, user: str, items: Sequence[Item]) -> None:
        """Store items of a user."""

    async def find(self, search: Search) -> list[str]:
        """Return ids of items, best first."""


class GivenVectors:
    """The embedder of a peer: it knows the vectors of all texts that will come."""

    def __init__(self) -> None:
        self._vectors: dict[str, Sequence[float]] = {}

    def learn(self, text: str, vector: Sequence[float]) -> None:
        """Know a text from now on."""
        self._vectors[text] = vector

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return the vectors of texts."""
        return [list(self._vectors[text]) for text in texts]


async def serve(name: str, peer: Peer, read: Callable[[], Awaitable[str]]) -> None:
    """Answer until standard input ends. The clock runs around the peer's own call only."""
    # What libraries print must not come between the lines.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(answer: dict[str, object]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say({"name": name})
    while line := await read():
        request = json.loads(line)
        if "items" in request:
            await peer.keep(request["user"], [Item(**item) for item in request["items"]])
            say({"kept": len(request["items"])})
        else:
            search = Search(**request)
            started = time.perf_counter()
            found = await peer.find(search)
            say({"ids": found, "seconds": time.perf_counter() - started})
