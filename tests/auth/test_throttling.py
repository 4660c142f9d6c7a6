"""Guesses are slowed down; nobody is locked out by them."""

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable
from datetime import timedelta

import asyncpg
import pytest
from kimberly.auth.v1 import auth_pb2 as pb

from bench.logging_in import rank_sum_z
from server.auth.attempt_store import AttemptStore
from server.auth.throttling import (
    FREE_EVERYWHERE,
    FREE_HERE,
    LONGEST_DELAY,
    Record,
    Standing,
)
from server.database import SystemDatabase
from tests.auth.conftest import PASSWORD, Auth, CountingHasher, reason_of, sign_up
from tests.conftest import FakeClock, as_worker, through_edge

ADA = "ada@example.com"
REFUSED = "CREDENTIALS_INVALID"
HOME, AWAY = "192.0.2.1", "198.51.100.7"


def log_in(auth: Auth, password: str, address: str = HOME) -> Awaitable[pb.LogInResponse]:
    metadata = through_edge(address)
    return auth.LogIn(pb.LogInRequest(email=ADA, password=password), metadata=metadata)


async def guess(auth: Auth, times: int, address: str) -> None:
    for _ in range(times):
        assert await reason_of(log_in(auth, "not the password", address)) == REFUSED


def test_the_wait_doubles_with_every_failure_up_to_a_quarter_of_an_hour(clock: FakeClock) -> None:
    record, waits = Record.blank(clock.now), []
    for _ in range(FREE_HERE + 15):
        record = record.with_failure(FREE_HERE, clock.now)
        waits.append((record.blocked_until - clock.now).total_seconds())
    assert waits[: FREE_HERE - 1] == [0] * (FREE_HERE - 1)
    assert waits[FREE_HERE - 1 : FREE_HERE + 4] == [1, 2, 4, 8, 16]
    assert waits[-1] == LONGEST_DELAY.total_seconds() == 900


def test_a_day_later_the_count_begins_anew(clock: FakeClock) -> None:
    record = Record.blank(clock.now)
    for _ in range(1000):
        record = record.with_failure(FREE_HERE, clock.now)
    assert record.is_blocked(clock.now)
    clock.advance(days=1, seconds=1)
    assert record.with_failure(FREE_HERE, clock.now).failures == 1


def test_who_waits_is_not_made_to_wait_longer(clock: FakeClock) -> None:
    blank = Record.blank(clock.now)
    standing = Standing(blank, blank)
    for _ in range(FREE_HERE):
        standing = standing.begun(clock.now)
    assert standing.begun(clock.now) == standing


async def test_after_ten_guesses_not_even_the_right_one_is_looked_at_until_the_wait_is_over(
    auth: Auth, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    await guess(auth, FREE_HERE, AWAY)
    assert await reason_of(log_in(auth, PASSWORD, AWAY)) == REFUSED
    clock.advance(seconds=1)
    await log_in(auth, PASSWORD, AWAY)


async def test_a_peer_that_is_not_the_edge_has_no_say_in_where_a_call_comes_from(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    request = pb.LogInRequest(email=ADA, password="not the password")
    for number in range(5):
        said = (*as_worker(), ("x-forwarded-for", f"10.0.0.{number}"))
        assert await reason_of(auth.LogIn(request, metadata=said)) == REFUSED
    # One count for the email, and one for the email from nowhere.
    assert await owner.fetchval("SELECT count(*) FROM log_in_attempts") == 2


async def test_a_stranger_who_guesses_holds_up_nobody_else(auth: Auth) -> None:
    await sign_up(auth)
    await guess(auth, 2 * FREE_HERE, AWAY)
    assert await reason_of(log_in(auth, PASSWORD, AWAY)) == REFUSED
    await log_in(auth, PASSWORD, HOME)


async def test_strangers_at_many_places_hold_up_strangers_and_not_the_user(
    auth: Auth, system_database: SystemDatabase, clock: FakeClock
) -> None:
    await sign_up(auth)
    await log_in(auth, PASSWORD, HOME)
    attempts = AttemptStore(system_database)
    for number in range(FREE_EVERYWHERE + 5):
        await attempts.begin(ADA, f"10.0.0.{number}/32", clock.now)
        clock.advance(seconds=20)
    assert await reason_of(log_in(auth, PASSWORD, AWAY)) == REFUSED
    await log_in(auth, PASSWORD, HOME)
    clock.advance(seconds=LONGEST_DELAY.total_seconds())
    await log_in(auth, PASSWORD, AWAY)


async def test_a_thousand_guesses_at_once_are_ten(
    auth: Auth, hasher: CountingHasher, system_database: SystemDatabase, clock: FakeClock
) -> None:
    attempts = AttemptStore(system_database)
    begun = await asyncio.gather(*(attempts.begin(ADA, "here", clock.now) for _ in range(200)))
    assert sum(begun) == FREE_HERE


async def test_the_user_s_own_log_ins_count_for_nothing(
    auth: Auth, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    for _ in range(3 * FREE_HERE):
        await log_in(auth, PASSWORD, HOME)
    assert await owner.fetchval("SELECT sum(failures) FROM log_in_attempts") == 0


async def test_counts_that_matter_no_more_are_forgotten(
    auth: Auth, system_database: SystemDatabase, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await sign_up(auth)
    await guess(auth, 1, AWAY)
    await log_in(auth, PASSWORD, HOME)
    clock.now += timedelta(days=2)
    await AttemptStore(system_database).forget(clock.now)
    # The place from which the user came is still known.
    assert await owner.fetchval("SELECT count(*) FROM log_in_attempts") == 1


# --- alike -------------------------------------------------------------------------------------


async def answer(auth: Auth, email: str, place: str) -> tuple[str, float]:
    metadata = through_edge(place)
    started = time.perf_counter()
    request = pb.LogInRequest(email=email, password="not the password")
    said = await reason_of(auth.LogIn(request, metadata=metadata))
    return said, (time.perf_counter() - started) * 1000


@pytest.mark.alone
async def test_unknown_wrong_and_waiting_are_not_told_apart(
    auth: Auth, hasher: CountingHasher, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank-sum statistic of each pair of kinds: |z| of 3.9 comes by chance once in 10 000."""
    rounds = 500
    await sign_up(auth)
    # So many that none of them fails often enough to wait.
    people = [f"ada{number}@example.com" for number in range(rounds // 50)]
    for email in people:
        await sign_up(auth, email)
    await guess(auth, FREE_HERE, AWAY)
    times: dict[str, list[float]] = {"unknown": [], "wrong": [], "waiting": []}
    for number in range(rounds):
        nth, place = number % len(people), f"10.{number // 250}.{number % 250}.1"
        asked = {
            # Asked for as often and from as many places as who exists: only that differs.
            "unknown": (f"nobody{nth}@example.com", place),
            "wrong": (people[nth], place),
            "waiting": (ADA, AWAY),
        }
        for kind in sorted(asked, key=lambda kind: hash((kind, number))):
            said, milliseconds = await answer(auth, *asked[kind])
            assert said == REFUSED
            times[kind].append(milliseconds)
    with capsys.disabled():
        for one, other in (("unknown", "wrong"), ("unknown", "waiting"), ("wrong", "waiting")):
            z = rank_sum_z(times[one], times[other])
            middle = statistics.median(times[one]), statistics.median(times[other])
            seen = f"{one} {middle[0]:.2f} ms, {other} {middle[1]:.2f} ms: z = {z:+.2f}"
            sys.stdout.write(f"\n{seen}")
            assert abs(z) < 3.9, (one, other, z)
