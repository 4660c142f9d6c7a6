"""Nobody finds out who has an account: by answers, or by the time that they take.

Through the edge of a mesh that confirms emails, as all do but a developer's.
"""

from __future__ import annotations

import random
import secrets
import shutil
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from kimberly.auth.v1 import auth_pb2 as auth

from bench.distributions import chance
from local.fleet import Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from local.postgres import SUPERUSER
from server.access import EDGE
from tests.abuse.doors import Doors
from tests.canaries import overheard
from tests.mesh import PASSWORD, address_of, mailed_token
from tests.transports import Grpc, Refused, Rest

COMMANDS = Commands(
    service=("env", "KIMBERLY_SIGN_UP_CONFIRMS_EMAIL=true", sys.executable, "-m", "server")
)
SMALLEST_P = 1e-3
SAMPLES = 2
"""So often is sampled before a difference is believed: chance makes one in a thousand, and two in a
row in one of a million."""
ACCOUNTS = 400
HASHED = 150
"""How often each kind is asked that costs a hash."""
CHEAP = 400

Ask = Callable[[int], Awaitable[httpx.Response]]
Call = Callable[[Message], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Town:
    """A mesh, and people of whom some have accounts."""

    mesh: Mesh
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    known: list[str]
    """Emails that have an account with PASSWORD."""
    ended: list[str]
    """Refresh tokens of sessions that ended."""


@pytest.fixture(scope="module")
def confirming(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh that confirms emails."""
    layout = Layout(tmp_path_factory.mktemp("confirming"))
    with in_background(Mesh(layout, workers=0, durable=False, commands=COMMANDS)) as mesh:
        yield mesh


@pytest_asyncio.fixture(scope="module")
async def town(confirming: Mesh) -> AsyncIterator[Town]:
    """Somebody who signed up, and many who have the same password."""
    trust = ssl.create_default_context(cafile=confirming.ca)
    credentials = grpc.ssl_channel_credentials(confirming.ca.read_bytes())
    async with (
        httpx.AsyncClient(base_url=confirming.edge, verify=trust, timeout=15) as http,
        grpc.aio.secure_channel(address_of(confirming), credentials) as channel,
    ):
        rest = Rest(http)
        email, ended = new_email(), list[str]()
        await rest(auth.SignUpRequest(email=email, password=PASSWORD))
        await rest(auth.VerifyEmailRequest(token=await mailed_token(confirming, email)))
        for _ in range(20):
            tokens = (await rest(auth.LogInRequest(email=email, password=PASSWORD))).tokens
            await rest(auth.LogOutRequest(refresh_token=tokens.refresh_token))
            ended.append(tokens.refresh_token)
        known = await settle(confirming, ACCOUNTS)
        yield Town(confirming, http, overheard(channel), known, ended)


async def settle(mesh: Mesh, count: int) -> list[str]:
    """Make accounts, each like the one that there is."""
    emails = [new_email() for _ in range(count)]
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    await connection.execute(
        """
        WITH made AS (
            INSERT INTO users (tenant_id, id, email, display_name, created_at, email_verified_at)
            SELECT first.tenant_id, uuidv7(), address, 'somebody', now(), now()
              FROM unnest($1::text[]) AS address, users AS first
            RETURNING tenant_id, id
        )
        INSERT INTO accounts (tenant_id, user_id, password_hash)
        SELECT made.tenant_id, made.id, accounts.password_hash
          FROM made, accounts
        """,
        emails,
    )
    await connection.close()
    return emails


def new_email() -> str:
    return f"{secrets.token_hex(8)}@example.com"


# --- what is said ------------------------------------------------------------------------------


@pytest_asyncio.fixture
async def doors(confirming: Mesh) -> AsyncIterator[Doors]:
    # Not pytest's: the path of a socket must be short.
    directory = Path(tempfile.mkdtemp(prefix="kimberly-"))
    async with AsyncExitStack() as stack:
        yield Doors(confirming, directory, stack)
    shutil.rmtree(directory)


async def said(call: Call, request: Message) -> str:
    """Return what is answered, whichever it is."""
    try:
        return repr(await call(request))
    except Refused as refused:
        return repr(refused.refusal)


async def test_every_door_says_the_same_of_who_has_an_account_and_of_who_has_none(
    town: Town, doors: Doors
) -> None:
    sidecar = Grpc(await doors.sidecar("auth", EDGE))
    for call in (Rest(town.http), Grpc(town.channel), sidecar):
        for one, other in (
            (
                auth.SignUpRequest(email=town.known[0], password=PASSWORD),
                auth.SignUpRequest(email=new_email(), password=PASSWORD),
            ),
            (
                auth.LogInRequest(email=town.known[0], password="not the password"),
                auth.LogInRequest(email=new_email(), password="not the password"),
            ),
            (
                auth.RequestPasswordResetRequest(email=town.known[0]),
                auth.RequestPasswordResetRequest(email=new_email()),
            ),
            (
                auth.RefreshTokenRequest(refresh_token=town.ended[0]),
                auth.RefreshTokenRequest(refresh_token=secrets.token_urlsafe(32)),
            ),
        ):
            assert await said(call, one) == await said(call, other), type(one).__name__


async def test_who_has_the_account_is_told_and_who_tried_is_not(town: Town) -> None:
    email = town.known[1]
    await Rest(town.http)(auth.SignUpRequest(email=email, password="the stranger's choice"))
    mails = town.mesh.layout.mails

    def told() -> list[str]:
        return [mail for file in mails.glob("*.eml") if email in (mail := file.read_text())]

    deadline = time.monotonic() + 15
    while not (found := told()):
        assert time.monotonic() < deadline
        await Rest(town.http).raw("GET", "/healthz")
    assert "You have an account already" in found[0]
    refused = await said(
        Rest(town.http), auth.LogInRequest(email=email, password="the stranger's choice")
    )
    assert "CREDENTIALS_INVALID" in refused


# --- how long it takes -------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.timeout(400)
@pytest.mark.parametrize("what", ["sign-up", "log-in", "reset", "refresh"])
async def test_time_does_not_tell_who_has_an_account(
    town: Town, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the test of Kolmogorov and Smirnov."""
    has, has_not = asking(town, what)
    count = HASHED if what in {"sign-up", "log-in"} else CHEAP
    for _ in range(SAMPLES):
        times = await sample(has, has_not, count)
        p = chance(*times)
        middle = [statistics.median(each) for each in times]
        with capsys.disabled():
            sys.stdout.write(
                f"\n{what}, {count} each: with an account {middle[0]:.2f} ms, without "
                f"{middle[1]:.2f} ms, gap {middle[0] - middle[1]:+.2f} ms, KS p = {p:.3f} "
            )
        if p > SMALLEST_P:
            break
    assert p > SMALLEST_P


async def sample(has: Ask, has_not: Ask, count: int) -> tuple[list[float], list[float]]:
    """Ask both by turns and return how many milliseconds each took; all say the same."""
    times: dict[Ask, list[float]] = {has: [], has_not: []}
    seen = set()
    chance = random.Random(0)
    for number in range(count):
        for ask in chance.sample([has, has_not], 2):
            began = time.perf_counter()
            answer = await ask(number)
            times[ask].append((time.perf_counter() - began) * 1000)
            seen.add((answer.status_code, answer.text, frozenset(answer.headers)))
    assert len(seen) == 1, seen
    return times[has], times[has_not]


def asking(town: Town, what: str) -> tuple[Ask, Ask]:
    """Return two ways to ask that must look alike, by the number of the question."""

    def post(path: str, body: Callable[[int], dict[str, str]]) -> Ask:
        return lambda number: town.http.post(path, json=body(number))

    known, strangers = town.known, [new_email() for _ in range(ACCOUNTS)]
    match what:
        case "sign-up":
            path, field, rest = "/v1/signup", "email", {"password": PASSWORD}
        case "log-in":
            path, field, rest = "/v1/login", "email", {"password": "not the password"}
        case "reset":
            path, field, rest = "/v1/password:requestReset", "email", {}
        case _:
            path, field, rest = "/v1/token:refresh", "refreshToken", {}
            known, strangers = town.ended, [secrets.token_urlsafe(32) for _ in town.ended]

    def of(people: list[str]) -> Ask:
        return post(path, lambda number: {field: people[number % len(people)], **rest})

    return of(known), of(strangers)
