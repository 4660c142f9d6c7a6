"""Whoever guesses ids learns nothing: not from the answer, and not from the time that it takes."""

from __future__ import annotations

import asyncio
import random
import sys
import time

import pytest
from kimberly.memory.v1 import memory_pb2 as pb

from bench.logging_in import rank_sum_z
from server import ids
from tests.abuse.estates import keep
from tests.mesh import User
from tests.transports import Refused

GUESSES = 10_000
AT_ONCE = 100
ROUNDS = 500
LARGEST_Z = 3.9
"""Comes by chance once in 10 000."""


async def refusal(user: User, memory_id: str) -> Refused:
    with pytest.raises(Refused) as refused:
        await user.grpc(pb.GetMemoryRequest(id=memory_id))
    return refused.value


async def test_ten_thousand_guesses_find_nothing(ann: User, bob: User) -> None:
    # Next to an id that there is: ids begin with the time.
    hers = ids.parse(ids.MEMORY, await keep(ann), "id")
    answers = set()
    for start in range(1, GUESSES, AT_ONCE):
        near = [type(hers)(int=hers.int + step) for step in range(start, start + AT_ONCE)]
        guesses = [ids.show(ids.MEMORY, guess) for guess in near]
        found = await asyncio.gather(*(refusal(bob, guess) for guess in guesses))
        answers |= {each.refusal for each in found}
    assert {answer.reason for answer in answers} == {"RESOURCE_NOT_FOUND"}
    assert answers == {(await refusal(bob, ids.show(ids.MEMORY, hers))).refusal}


@pytest.mark.alone
async def test_the_time_does_not_tell_what_is_anothers_from_what_is_not(
    ann: User, bob: User, capsys: pytest.CaptureFixture[str]
) -> None:
    hers = [await keep(ann) for _ in range(20)]
    nobodys = [ids.show(ids.MEMORY, ids.new_id()) for _ in range(20)]
    times: dict[str, list[float]] = {"another's": [], "nobody's": []}
    chance = random.Random(0)
    for number in range(ROUNDS):
        asked = {"another's": hers[number % 20], "nobody's": nobodys[number % 20]}
        for kind in chance.sample(sorted(asked), 2):
            began = time.perf_counter()
            await refusal(bob, asked[kind])
            times[kind].append(time.perf_counter() - began)
    z = rank_sum_z(times["another's"], times["nobody's"])
    with capsys.disabled():
        sys.stdout.write(f"\nanother's and nobody's memory, {ROUNDS} times each: z = {z:+.2f} ")
    assert abs(z) < LARGEST_Z
