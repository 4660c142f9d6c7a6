"""A session that is over is over: for refresh tokens at once, for access tokens within seconds."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from datetime import timedelta

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from local.postgres import SUPERUSER
from server import ids
from server.access import EDGE, Scope
from server.auth.refresh_tokens import GRACE, MOST_REPEATS
from server.grants import RELOAD_SECONDS
from tests.abuse.doors import Doors, PastTheEdge
from tests.mesh import PASSWORD, User, acting, bearer, eventually, sign_up
from tests.transports import Grpc, Refused, Rest, Transport

REFUSED = "REFRESH_TOKEN_INVALID"
PROMISED_SECONDS = 30.0
BY_EVERY_SERVICE = (
    users.GetUserRequest(),
    memory.ListMemoriesRequest(),
    jobs.ListJobsRequest(),
)


@pytest.fixture
async def dan(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Somebody whose sessions may end."""
    return await sign_up(http, channel)


@pytest.fixture(params=["edge over REST", "edge over gRPC", "sidecar", "service"])
def door(request: pytest.FixtureRequest, doors: Doors, dan: User) -> Transport:
    """Where refresh tokens are shown: every test that asks for it runs at every door."""
    doors_of: Mapping[str, Transport] = {
        "edge over REST": dan.rest,
        "edge over gRPC": dan.grpc,
        "sidecar": PastTheEdge(doors),
        "service": PastTheEdge(doors, to_service=True),
    }
    return doors_of[request.param]


@pytest_asyncio.fixture
async def database(mesh: Mesh) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    yield connection
    await connection.close()


async def refresh(door: Transport, refresh_token: str) -> str:
    """Return the next refresh token."""
    request = auth.RefreshTokenRequest(refresh_token=refresh_token)
    token: str = (await door(request)).tokens.refresh_token
    return token


async def refusal(door: Transport, refresh_token: str) -> str:
    with pytest.raises(Refused) as caught:
        await refresh(door, refresh_token)
    return caught.value.refusal.reason


async def is_refused(user: User, request: Message) -> bool:
    """Tell whether both transports refuse a call because of its token."""
    answers = await asyncio.gather(
        *(call(request) for call in user.transports.values()), return_exceptions=True
    )
    codes = {answer.refusal.code for answer in answers if isinstance(answer, Refused)}
    # What an agent asks is refused by the database before its token is.
    assert codes <= {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.FAILED_PRECONDITION}
    return all(
        isinstance(answer, Refused) and answer.refusal.code is grpc.StatusCode.UNAUTHENTICATED
        for answer in answers
    )


async def seconds_until_refused(user: User) -> float:
    """Return how long the access token is taken by at least one service."""
    started = time.monotonic()

    async def look() -> list[bool]:
        return [await is_refused(user, request) for request in BY_EVERY_SERVICE]

    await eventually(look, all, PROMISED_SECONDS)
    return time.monotonic() - started


@pytest.mark.parametrize("replayed", range(-5, -1))
async def test_each_of_the_last_four_generations_gives_a_thief_away(
    dan: User, door: Transport, database: asyncpg.Connection, replayed: int
) -> None:
    """The last is the one that nobody has used; before it come those that were, the newest too."""
    tokens = [dan.tokens.refresh_token]
    for _ in range(5):
        tokens.append(await refresh(door, tokens[-1]))
    await let_grace_pass(database, dan)
    assert await refusal(door, tokens[replayed]) == REFUSED
    # The very next call.
    assert await refusal(door, tokens[-1]) == REFUSED


async def let_grace_pass(database: asyncpg.Connection, user: User) -> None:
    """Move the last use of a user's refresh tokens into the past."""
    user_id = ids.parse(ids.USER, user.id, "id")
    moved = await database.execute(
        "UPDATE sessions SET used_at = used_at - $2::interval WHERE user_id = $1",
        user_id,
        GRACE + timedelta(seconds=1),
    )
    assert moved == "UPDATE 1"


async def test_within_the_grace_the_newest_gives_nobody_away(dan: User, door: Transport) -> None:
    # Else the test above would show of the newest only that nothing can be repeated.
    used = dan.tokens.refresh_token
    fresh = await refresh(door, used)
    assert await refresh(door, used) != fresh
    assert await refresh(door, fresh)


async def test_fifty_replays_at_once_end_the_session(dan: User, door: Transport) -> None:
    token = dan.tokens.refresh_token
    answers = await asyncio.gather(
        *(refresh(door, token) for _ in range(50)), return_exceptions=True
    )
    granted = [answer for answer in answers if isinstance(answer, str)]
    assert len(granted) <= 1 + MOST_REPEATS
    for answer in granted:
        assert await refusal(door, answer) == REFUSED


async def test_every_service_refuses_the_tokens_of_a_session_that_a_replay_ended(dan: User) -> None:
    first = dan.tokens.refresh_token
    await refresh(dan.rest, await refresh(dan.rest, first))
    assert await refusal(dan.rest, first) == REFUSED
    assert await seconds_until_refused(dan) < PROMISED_SECONDS


async def test_a_double_click_logs_nobody_out(dan: User, door: Transport) -> None:
    token = dan.tokens.refresh_token
    one, other = await asyncio.gather(refresh(door, token), refresh(door, token))
    assert one != other
    assert await refresh(door, one)
    assert not await is_refused(dan, BY_EVERY_SERVICE[0])


@pytest.mark.alone
async def test_every_service_refuses_the_tokens_of_a_session_that_ended(
    dan: User, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any([await is_refused(dan, request) for request in BY_EVERY_SERVICE])
    await dan.rest(auth.LogOutRequest(refresh_token=dan.tokens.refresh_token))
    seconds = await seconds_until_refused(dan)
    with capsys.disabled():
        sys.stdout.write(f"\nrefused at the edge by every service after {seconds:.1f} s ")
    assert seconds < 2 * RELOAD_SECONDS + 1
    assert await refusal(dan.rest, dan.tokens.refresh_token) == REFUSED


async def test_changing_the_password_ends_the_others(dan: User, door: Transport) -> None:
    login = auth.LogInRequest(email=dan.email, password=PASSWORD)
    stolen = (await dan.rest(login)).tokens.refresh_token
    change = auth.ChangePasswordRequest(
        current_password=PASSWORD, new_password="a new and longer password"
    )
    assert (await dan.rest(change)).ended_sessions == 1
    assert await refusal(door, stolen) == REFUSED
    assert await refresh(door, dan.tokens.refresh_token)


# --- consent -----------------------------------------------------------------------------------


def decision(purpose: users.ConsentPurpose.ValueType, *, granted: bool) -> Message:
    return users.RecordConsentRequest(purpose=purpose, granted=granted)


async def test_withdrawing_the_consent_that_all_rests_on_ends_every_session(
    dan: User, http: httpx.AsyncClient, channel: grpc.aio.Channel, doors: Doors
) -> None:
    login = auth.LogInRequest(email=dan.email, password=PASSWORD)
    others = [(await dan.rest(login)).tokens for _ in range(3)]
    answer = await dan.grpc(decision(users.CONSENT_PURPOSE_MEMORY_STORE, granted=False))
    assert answer.ended_sessions == 1 + len(others)
    elsewhere = [user_with(dan, http, channel, tokens.access_token) for tokens in others]
    # Refused at once over both transports, and past the edge.
    sidecar = Grpc(await doors.sidecar("auth", EDGE))
    calls: tuple[Transport, ...] = (dan.rest, dan.grpc, sidecar)
    for call, tokens in zip(calls, others, strict=True):
        request = auth.RefreshTokenRequest(refresh_token=tokens.refresh_token)
        with pytest.raises(Refused) as caught:
            await call(request)
        said = caught.value.refusal
        assert (said.code, said.reason) == (grpc.StatusCode.UNAUTHENTICATED, REFUSED)
    assert await refusal(dan.rest, dan.tokens.refresh_token) == REFUSED
    for each in elsewhere:
        assert await seconds_until_refused(each) < PROMISED_SECONDS
    # Who withdrew may still take along what is theirs, and see what became of it.
    assert (await dan.grpc(privacy.CreateExportRequest())).export.id
    told = (await dan.rest(users.ListAuditEventsRequest())).events
    assert [event.action for event in told].count("session.end") == 1 + len(others)
    # And come back: to agree again, or to have all of it erased.
    again = (await dan.rest(login)).tokens
    assert await refresh(dan.rest, again.refresh_token)


@pytest.mark.parametrize(
    "purpose",
    [
        users.CONSENT_PURPOSE_MEMORY_EMBED,
        users.CONSENT_PURPOSE_MEMORY_SENSITIVE,
        users.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS,
    ],
)
async def test_withdrawing_what_is_optional_ends_no_session(
    dan: User, purpose: users.ConsentPurpose.ValueType
) -> None:
    await dan.rest(decision(purpose, granted=True))
    assert (await dan.rest(decision(purpose, granted=False))).ended_sessions == 0
    assert await refresh(dan.rest, dan.tokens.refresh_token)


async def test_withdrawing_the_consent_to_agents_ends_what_they_were_given(
    dan: User, http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> None:
    purpose = users.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS
    await dan.rest(decision(purpose, granted=True))
    agent, made = await acting(http, channel, dan, [Scope.MEMORY_READ, Scope.JOBS_READ])
    reads = (memory.ListMemoriesRequest(), jobs.ListJobsRequest())
    assert not any([await is_refused(agent, request) for request in reads])
    await dan.rest(decision(purpose, granted=False))
    for call in dan.transports.values():
        with pytest.raises(Refused) as caught:
            await call(auth.ExchangeTokenRequest(api_key=made.key))
        assert caught.value.refusal.reason == "CONSENT_MISSING"

    async def look() -> list[bool]:
        return [await is_refused(agent, request) for request in reads]

    await eventually(look, all, PROMISED_SECONDS)


def user_with(user: User, http: httpx.AsyncClient, channel: grpc.aio.Channel, token: str) -> User:
    """Return a user who calls with another access token."""
    tokens = auth.Tokens(access_token=token)
    return replace(user, tokens=tokens, rest=Rest(http, token), grpc=Grpc(channel, bearer(token)))
