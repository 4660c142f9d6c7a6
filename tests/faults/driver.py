"""Mixed load through the edge. Whatever has an unknown outcome is asked again until it is known."""

import asyncio
import itertools
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from kimberly.client import Client
from kimberly.memory.v1 import memory_pb2 as pb

from tests.faults.history import PASSING, History, Op, Outcome

T = TypeVar("T")

UNARY_SECONDS = 3.0
IMPORT_SECONDS = 10.0
RESOLVE_SECONDS = 60.0
"""How long an unknown outcome is asked for before it is left unresolved."""
HANG_SECONDS = 5.0
"""How far past its deadline a call is waited for before it is given up."""
_AGAIN_SECONDS = 0.05
_CHUNK, _CHUNKS = 50, 2
_WORDS = ("tide", "kelp", "harbour", "lantern", "birch", "felt", "crate", "ferry", "gull", "mast")


@dataclass(slots=True)
class User:
    """One account that drives load, and what it knows to be stored."""

    name: str
    client: Client
    user_id: str
    stored: list[tuple[str, str]] = field(default_factory=list)
    """Id and content of memories whose creation was acknowledged."""


class Driver:
    """Calls the mesh as some users and writes down what comes of it."""

    def __init__(self, users: Sequence[User], history: History, chance: random.Random) -> None:
        self._users = users
        self._history = history
        self._chance = chance
        self._numbers = itertools.count()
        self._run = uuid.uuid4().hex[:8]
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def driving(self) -> AsyncIterator[None]:
        """Drive load until the context ends; then wait until every outcome is known."""
        async with asyncio.TaskGroup() as group:
            for user in self._users:
                for work, pause in (
                    (self.create, 0.03),
                    (self.read, 0.03),
                    (self.query, 0.15),
                    (self.bring, 0.3),
                ):
                    group.create_task(self._repeat(user, work, pause))
            try:
                yield
            finally:
                self._stopping.set()

    async def _repeat(
        self, user: User, work: Callable[[User], Awaitable[object]], pause: float
    ) -> None:
        while not self._stopping.is_set():
            await work(user)
            await asyncio.sleep(self._chance.uniform(0.5, 1.5) * pause)

    # --- operations

    async def create(self, user: User) -> bool:
        """Create a memory, asking under one request id until the outcome is known."""
        content, key = self._text(user), uuid.uuid4().hex
        request = pb.CreateMemoryRequest(memory=pb.Memory(content=content), request_id=key)

        async def once() -> str | None:
            answer = await self._call(
                ("create", user, key, (content,)),
                lambda: user.client.memory.CreateMemory(request, timeout=UNARY_SECONDS),
                UNARY_SECONDS,
                lambda response: str(response.memory.id),
            )
            return None if answer is None else str(answer.memory.id)

        memory_id = await self._until_known(once)
        if memory_id is not None:
            user.stored.append((memory_id, content))
        return memory_id is not None

    async def bring(self, user: User) -> bool:
        """Import some memories in chunks, again and again until that is acknowledged."""
        contents = [self._text(user) for _ in range(_CHUNK * _CHUNKS)]
        key = f"import-{next(self._numbers)}"

        async def chunks() -> AsyncIterator[pb.ImportMemoriesRequest]:
            for start in range(0, len(contents), _CHUNK):
                memories = [pb.Memory(content=text) for text in contents[start : start + _CHUNK]]
                yield pb.ImportMemoriesRequest(first_index=start, memories=memories)

        async def once() -> bool | None:
            answer = await self._call(
                ("import", user, key, contents),
                lambda: user.client.memory.ImportMemories(chunks(), timeout=IMPORT_SECONDS),
                IMPORT_SECONDS,
            )
            if answer is None:
                return None
            if (answer.created + answer.existing, answer.refused) != (len(contents), 0):
                self._history.unforeseen.append(f"import answered {answer}")
            return True

        return await self._until_known(once) is not None

    async def read(self, user: User) -> None:
        """Read back a memory whose creation was acknowledged."""
        if not user.stored:
            return
        memory_id, content = self._chance.choice(user.stored)
        answer = await self._call(
            ("get", user, memory_id, (content,)),
            lambda: user.client.memory.GetMemory(
                pb.GetMemoryRequest(id=memory_id), timeout=UNARY_SECONDS
            ),
            UNARY_SECONDS,
        )
        if answer is not None and answer.memory.content != content:
            self._history.unforeseen.append(f"{memory_id} reads {answer.memory.content!r}")

    async def query(self, user: User) -> None:
        """Ask for a memory by its words."""
        if not user.stored:
            return
        memory_id, content = self._chance.choice(user.stored)
        answer = await self._call(
            ("query", user, memory_id, (content,)),
            lambda: user.client.memory.QueryMemories(
                pb.QueryMemoriesRequest(query=content, top_k=3), timeout=UNARY_SECONDS
            ),
            UNARY_SECONDS,
        )
        if answer is not None and memory_id not in {match.memory.id for match in answer.matches}:
            self._history.unforeseen.append(f"{memory_id} is not found by its own words")

    # --- calls

    async def _until_known(self, once: Callable[[], Awaitable[T | None]]) -> T | None:
        until = time.monotonic() + RESOLVE_SECONDS
        while time.monotonic() < until:
            if (known := await once()) is not None:
                return known
            await asyncio.sleep(_AGAIN_SECONDS)
        return None

    async def _call(
        self,
        what: tuple[str, User, str, Sequence[str]],
        call: Callable[[], Awaitable[Any]],
        deadline_seconds: float,
        answered: Callable[[Any], str] = lambda _: "",
    ) -> Any:
        """Make a call and write it down. None: it did not succeed."""
        op, user, key, values = what
        start = time.monotonic()
        response, code = None, "OK"
        try:
            async with asyncio.timeout(deadline_seconds + HANG_SECONDS):
                response = await call()
        except TimeoutError:
            code = "HANG"
        except grpc.aio.AioRpcError as error:
            code = error.code().name
            if error.code() not in PASSING:
                self._history.unforeseen.append(f"{op} {key}: {code} {error.details()}")
        outcome = Outcome.INFO if op in {"create", "import"} else Outcome.FAIL
        if response is not None:
            outcome = Outcome.OK
        answer = "" if response is None else answered(response)
        self._history.ops.append(
            Op(
                *(op, user.user_id, key, values, start, time.monotonic(), deadline_seconds),
                *(outcome, code, answer),
            )
        )
        return response

    def _text(self, user: User) -> str:
        """Return a content that no other operation has."""
        some = " ".join(self._chance.choices(_WORDS, k=6))
        return f"{some} {user.name}{self._run}n{next(self._numbers)}"
