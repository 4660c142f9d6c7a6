"""Whoever is refused a log-in cannot tell why: not from the answer, nor from the time it takes."""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2 as auth

from bench.distributions import chances
from local.mesh import Mesh
from local.postgres import SUPERUSER
from server.auth.throttling import FREE_HERE, subject_of
from tests.mesh import User, join, sign_up
from tests.transports import path_of

EACH: Final = 500
PEOPLE: Final = 3
"""Of each kind, so that all are asked for as often."""
AT_MOST_BY_CHANCE: Final = 0.03
SAMPLES: Final = 3
"""So often is sampled before a difference is believed: chance makes one in 33, and three in a row
in one run of 37 000."""
LARGEST_GAP_MILLISECONDS: Final = 2.0
LOG_IN: Final = path_of(auth.DESCRIPTOR.services_by_name["AuthService"].methods_by_name["LogIn"])

Emails = Mapping[str, Sequence[str]]


@pytest_asyncio.fixture
async def database(mesh: Mesh) -> asyncpg.Connection:
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    yield connection
    await connection.close()


@pytest_asyncio.fixture
async def emails(
    mesh: Mesh, http: httpx.AsyncClient, channel: grpc.aio.Channel, ann: User
) -> Emails:
    """Whom guessers try, by why they are refused."""
    disabled = [await join(mesh, http, channel, ann) for _ in range(PEOPLE)]
    for member in disabled:
        await ann.grpc(auth.DisableMemberRequest(user_id=member.id))
    return {
        "unknown": [f"nobody{number}@example.com" for number in range(PEOPLE)],
        "wrong": [(await sign_up(http, channel)).email for _ in range(PEOPLE)],
        "waiting": [(await sign_up(http, channel)).email for _ in range(PEOPLE)],
        "disabled": [member.email for member in disabled],
    }


async def refused(channel: grpc.aio.Channel, email: str) -> tuple[tuple[object, ...], float]:
    """Return all that an answer says, but for what tells one call from the next; and its time."""
    request = auth.LogInRequest(email=email, password="not the password").SerializeToString()
    call = channel.unary_unary(LOG_IN, bytes, bytes)
    started = time.perf_counter()
    try:
        await call(request)
    except grpc.aio.AioRpcError as error:
        milliseconds = (time.perf_counter() - started) * 1000
        headers = [*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())]
        kept = tuple(sorted((k, v) for k, v in headers if k not in {"date", "x-request-id"}))
        return (error.code(), error.details(), kept), milliseconds
    raise AssertionError("a wrong password logs in")


async def let_wait(database: asyncpg.Connection, emails: Sequence[str]) -> None:
    """Have some accounts wait, at every place; of the others every failure is forgotten."""
    await database.execute("DELETE FROM log_in_attempts")
    await database.execute(
        """
        INSERT INTO log_in_attempts (subject, failures, tried_at, blocked_until, known_until)
        SELECT subject, 100, now(), now() + interval '1 hour', now()
          FROM unnest($1::bytea[]) AS subject
        """,
        [subject_of(email) for email in emails],
    )


async def sample(
    database: asyncpg.Connection, channel: grpc.aio.Channel, emails: Emails
) -> tuple[Mapping[str, list[float]], set[tuple[object, ...]]]:
    """Return the times of refusals by their reasons, and all that was said."""
    chance, said = random.Random(0), set[tuple[object, ...]]()
    times = defaultdict[str, list[float]](list)
    for number in range(EACH):
        if not number % (PEOPLE * (FREE_HERE - 1)):
            await let_wait(database, emails["waiting"])
        for kind in chance.sample(sorted(emails), len(emails)):
            answer, milliseconds = await refused(channel, emails[kind][number % PEOPLE])
            said.add(answer)
            times[kind].append(milliseconds)
    return times, said


def differences(times: Mapping[str, list[float]]) -> list[str]:
    """Say what tells the samples apart, and print what was found."""
    middles = {kind: middle(taken) for kind, taken in times.items()}
    pairs = list(chances(times))
    shown = (f"{one}/{other} {chance:.2f}" for one, other, chance in pairs)
    medians = ", ".join(f"{kind} {each.median:.2f} ms" for kind, each in middles.items())
    sys.stdout.write(f"\n{EACH} refusals each: {medians}; p of {', '.join(shown)} ")
    # Of six pairs one is as far apart by chance six times as often.
    apart = [f"{one} and {other}" for one, other, p in pairs if p * len(pairs) < AT_MOST_BY_CHANCE]
    far = [
        f"{one} and {other}" for one, other, _ in pairs if far_apart(middles[one], middles[other])
    ]
    return apart + far


class Middle(NamedTuple):
    """The median of a sample, and where that of all that could be sampled lies."""

    least: float
    median: float
    most: float


def middle(taken: Sequence[float]) -> Middle:
    """Return the median, and what it lies between but for a chance of one in 370.

    So many of n values are below the true median as heads come of n coins: sqrt(n) / 2 is a
    standard deviation, and three of them are counted off on both sides.
    """
    ordered, around = sorted(taken), math.ceil(1.5 * math.sqrt(len(taken)))
    half = len(ordered) // 2
    return Middle(ordered[half - around], statistics.median(ordered), ordered[half + around])


def far_apart(one: Middle, other: Middle) -> bool:
    """Tell whether medians are too far from each other, and not by chance."""
    less, more = sorted((one, other), key=lambda each: each.median)
    return more.median - less.median >= LARGEST_GAP_MILLISECONDS and less.most < more.least


@pytest.mark.parametrize(
    ("gap", "noise", "is_far"), [(2.5, 3, True), (1, 3, False), (2.5, 40, False)]
)
def test_medians_are_told_apart_where_noise_lets_them(
    gap: float, noise: float, is_far: bool
) -> None:
    chance = random.Random(0)
    one = [chance.gauss(70, noise) for _ in range(EACH)]
    other = [chance.gauss(70 + gap, noise) for _ in range(EACH)]
    assert far_apart(middle(one), middle(other)) is is_far


@pytest.mark.alone
@pytest.mark.timeout(1200)
async def test_unknown_wrong_waiting_and_disabled_are_not_told_apart(
    database: asyncpg.Connection,
    channel: grpc.aio.Channel,
    emails: Emails,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = list[str]()
    for _ in range(SAMPLES):
        times, said = await sample(database, channel, emails)
        assert len(said) == 1, said
        with capsys.disabled():
            found = differences(times)
        if not found:
            break
    assert not found


async def test_they_say_the_same_over_rest(
    database: asyncpg.Connection, http: httpx.AsyncClient, emails: Emails
) -> None:
    await let_wait(database, emails["waiting"])
    said = set()
    for names in emails.values():
        body = {"email": names[0], "password": "not the password"}
        answer = await http.post("/v1/login", json=body)
        headers = {k: v for k, v in answer.headers.items() if k not in {"date", "x-request-id"}}
        said.add((answer.status_code, answer.content, frozenset(headers.items())))
    assert len(said) == 1, said
