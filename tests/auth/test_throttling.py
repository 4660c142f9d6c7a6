"""Guesses are slowed down; nobody is locked out by them."""

import asyncio
from collections.abc import Awaitable
from datetime import timedelta

import asyncpg
from kimberly.auth.v1 import auth_pb2 as pb

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
