"""Many clients at once, each with a connection of its own and no question asked twice."""

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

import numpy as np

from bench.conversations import Conversation, Question
from bench.measure import Latency
from bench.spending import cpu_seconds
from bench.telling import Stub, Teller, bare_stub
from local.mesh import Mesh

CLIENTS = (1, 8, 32)
TOP_K = 10
"""How many memories clients ask for: as many as they get who do not say."""
_WARM_UP_SECONDS = 1.0
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Load:
    """What clients that ask without a pause get."""

    clients: int
    latency: Latency
    per_second: float
    cpu_milliseconds: Mapping[str, float]
    """What a query costs, by process; those that do something else meanwhile are in it."""


async def press(
    mesh: Mesh, tellers: Sequence[Teller], clients: int, seconds: float, *, by_meaning: bool
) -> Load:
    """Let clients ask for some seconds, after one second that does not count."""
    questions = [_ever_new(teller.conversation) for teller in tellers]
    taken: list[float] = []

    async def repeat(stub: Stub, number: int, stop_at: float) -> None:
        teller, asked = tellers[number % len(tellers)], questions[number % len(tellers)]
        while time.perf_counter() < stop_at:
            question = next(asked)
            answer = await teller.ask(stub, question, by_meaning=by_meaning, top_k=TOP_K)
            taken.append(answer.seconds)

    async def all_repeat(seconds: float) -> float:
        taken.clear()
        started = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for number, stub in enumerate(stubs):
                tasks.create_task(repeat(stub, number, started + seconds))
        return time.perf_counter() - started

    async with AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(bare_stub(mesh)) for _ in range(clients)]
        await all_repeat(_WARM_UP_SECONDS)
        before = cpu_seconds(mesh)
        lasted = await all_repeat(seconds)
        spent = cpu_seconds(mesh) - before
    each = {name: used * 1000 / len(taken) for name, used in spent.items()}
    return Load(clients, latency_of(taken), len(taken) / lasted, each)


def latency_of(seconds: Sequence[float]) -> Latency:
    """Return the percentiles of single calls."""
    p50, p99 = np.percentile(np.array(seconds) * 1000, [50, 99])
    return Latency(float(p50), float(p99))


def _ever_new(conversation: Conversation) -> Iterator[Question]:
    """Return the questions again and again, each time with another last word.

    Nobody ever said that word, so that it costs next to nothing; but no cache knows the question.
    """
    for question in itertools.cycle(conversation.questions):
        yield replace(question, text=f"{question.text} zq{next(_numbers)}zq")
