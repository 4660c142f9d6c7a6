"""Whoever guesses ids learns nothing: not from the answer, and not from the time that it takes."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from typing import Final

import grpc
import httpx
import pytest
import pytest_asyncio

from bench.distributions import chance
from server import ids
from tests.abuse.doors import Doors, PastTheEdge
from tests.abuse.estates import STATES, keep
from tests.abuse.meanings import FIELDS, METHODS, Means, put, request_of
from tests.mesh import User, sign_up
from tests.transports import Refused, Transport

GUESSES: Final = 10_000
AT_ONCE: Final = 100
ROUNDS: Final = 250
SAMPLES: Final = 3
"""So often is sampled before a difference is believed."""
LEAST_CHANCE: Final = 0.01
"""Three in a row that are less likely come by chance once in a million, in 16 tests as often."""
READ: Final = {
    "GetMemory": 20,
    "GetAttachment": 5,
    "GetGoal": 5,
    "GetMeditation": 1,
    "GetJob": 1,
    "GetSchedule": 5,
    "GetAgent": 5,
    "GetExport": 1,
}
"""Methods that return something by its id, and of how many such things they are tried."""


@pytest_asyncio.fixture(scope="module")
async def gil(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Has what is guessed at, and nothing of all that Ann got from other tests."""
    return await sign_up(http, channel)


@pytest_asyncio.fixture(params=["edge", "sidecar"])
async def door(request: pytest.FixtureRequest, doors: Doors, bob: User) -> Transport:
    """Where Bob calls."""
    return bob.grpc if request.param == "edge" else PastTheEdge(doors, bob.token)


async def refusal(door: Transport, method: str, name: str) -> Refused:
    request = request_of(METHODS[method])
    put(request, "id", name)
    with pytest.raises(Refused) as refused:
        await door(request)
    return refused.value


@pytest.mark.timeout(400)
async def test_ten_thousand_guesses_find_nothing(gil: User, door: Transport) -> None:
    # Next to an id that there is: ids begin with the time.
    his = ids.parse(ids.MEMORY, await keep(gil), "id")
    answers = set()
    for start in range(1, GUESSES, AT_ONCE):
        near = [type(his)(int=his.int + step) for step in range(start, start + AT_ONCE)]
        guesses = [ids.show(ids.MEMORY, guess) for guess in near]
        found = await asyncio.gather(*(refusal(door, "GetMemory", guess) for guess in guesses))
        answers |= {each.refusal for each in found}
    assert {answer.reason for answer in answers} == {"RESOURCE_NOT_FOUND"}
    assert answers == {(await refusal(door, "GetMemory", ids.show(ids.MEMORY, his))).refusal}


@pytest.mark.alone
@pytest.mark.parametrize("method", READ)
async def test_the_time_does_not_tell_what_is_anothers_from_what_is_not(
    gil: User, door: Transport, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    means, count = FIELDS[method]["id"], READ[method]
    make = next(iter(STATES[means].values()))
    his = [await make(gil) for _ in range(count)]
    nobodys = [ids.show(means.value, ids.new_id()) for _ in range(count)]
    for _ in range(SAMPLES):
        found = await sample(door, method, {"another's": his, "nobody's": nobodys})
        with capsys.disabled():
            sys.stdout.write(f"\n{method}, another's and nobody's, {ROUNDS} each: p = {found:.2f} ")
        if found > LEAST_CHANCE:
            break
    assert found > LEAST_CHANCE


async def sample(door: Transport, method: str, names: dict[str, list[str]]) -> float:
    """Return how likely the times of two kinds of guesses are of one distribution."""
    times: dict[str, list[float]] = {kind: [] for kind in names}
    order = random.Random(0)
    for number in range(ROUNDS):
        for kind in order.sample(sorted(names), len(names)):
            name = names[kind][number % len(names[kind])]
            began = time.perf_counter()
            await refusal(door, method, name)
            times[kind].append(time.perf_counter() - began)
    return chance(*times.values())


def test_every_method_that_returns_something_by_its_id_is_timed() -> None:
    by_id = {
        method
        for method, fields in FIELDS.items()
        if method.startswith("Get") and fields.get("id") in {*STATES} - {Means.SESSION}
    }
    assert by_id == {*READ}
