"""Whoever guesses passwords waits; whoever's password is guessed does not."""

from __future__ import annotations

import ssl

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2 as auth

from local.mesh import Mesh
from local.postgres import SUPERUSER
from server.auth.throttling import FREE_HERE
from tests.abuse.doors import Doors, PastTheEdge
from tests.mesh import PASSWORD, User, sign_up
from tests.refusals import Refusal
from tests.transports import Grpc, Refused

ELSEWHERE = "127.0.0.2"
CLAIMS = ("x-forwarded-for", "x-real-ip", "forwarded")


@pytest_asyncio.fixture
async def fay(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Somebody whose password is guessed."""
    return await sign_up(http, channel)


async def draw_out(mesh: Mesh) -> None:
    """Have whoever waits wait for an hour: the first wait is a second, which a test may take."""
    connection = await asyncpg.connect(mesh.stores.dsn(SUPERUSER))
    await connection.execute(
        """
        UPDATE log_in_attempts SET blocked_until = blocked_until + interval '1 hour'
         WHERE blocked_until > tried_at
        """
    )
    await connection.close()


async def log_in(
    http: httpx.AsyncClient, user: User, password: str, **headers: str
) -> httpx.Response:
    body = {"email": user.email, "password": password}
    return await http.post("/v1/login", json=body, headers=headers)


async def test_a_guesser_waits_whatever_address_they_claim_and_the_user_elsewhere_does_not(
    mesh: Mesh, trust: ssl.SSLContext, http: httpx.AsyncClient, fay: User
) -> None:
    for number in range(FREE_HERE + 2):
        claims = dict.fromkeys(("x-forwarded-for", "x-real-ip"), f"10.0.0.{number}")
        wrong = await log_in(http, fay, "not the password", **claims)
        assert wrong.status_code == httpx.codes.UNAUTHORIZED
    await draw_out(mesh)
    waiting = await log_in(http, fay, PASSWORD)
    assert (waiting.status_code, waiting.text) == (wrong.status_code, wrong.text)
    transport = httpx.AsyncHTTPTransport(verify=trust, local_address=ELSEWHERE)
    async with httpx.AsyncClient(base_url=mesh.edge, transport=transport, timeout=15) as elsewhere:
        assert (await log_in(elsewhere, fay, PASSWORD)).status_code == httpx.codes.OK


async def test_unknown_wrong_and_waiting_say_the_same_in_every_header(
    http: httpx.AsyncClient, fay: User
) -> None:
    asked = [
        {"email": "nobody@example.com", "password": "not the password"},
        {"email": fay.email, "password": "not the password"},
    ]
    answers = [await http.post("/v1/login", json=each) for each in asked]
    answers += [await http.post("/v1/login", json=asked[1]) for _ in range(FREE_HERE)]
    seen = {
        (answer.status_code, answer.text, frozenset(answer.headers.keys())) for answer in answers
    }
    assert len(seen) == 1, seen


async def test_a_guesser_past_the_edge_waits_whatever_place_they_claim(
    mesh: Mesh, doors: Doors, fay: User
) -> None:
    """A service of the mesh that was taken over is no edge: what it says of places is not heard."""
    channel = await doors.sidecar("auth", "memory")
    said = set[Refusal]()
    for number in range(FREE_HERE + 3):
        if number == FREE_HERE:
            await draw_out(mesh)
        # The last one knows the password, and waits all the same.
        password = PASSWORD if number == FREE_HERE + 2 else "not the password"
        claims = tuple((name, f"10.0.1.{number}") for name in CLAIMS)
        with pytest.raises(Refused) as refused:
            await Grpc(channel, claims)(auth.LogInRequest(email=fay.email, password=password))
        said.add(refused.value.refusal)
    assert {each.code for each in said} == {grpc.StatusCode.UNAUTHENTICATED}
    assert len(said) == 1


@pytest.mark.parametrize("to_service", [False, True], ids=["sidecar", "service"])
async def test_unknown_wrong_and_waiting_say_the_same_past_the_edge(
    doors: Doors, fay: User, *, to_service: bool
) -> None:
    door, said = PastTheEdge(doors, to_service=to_service), set[Refusal]()
    for email in ("nobody@example.com", *[fay.email] * (FREE_HERE + 1)):
        with pytest.raises(Refused) as refused:
            await door(auth.LogInRequest(email=email, password="not the password"))
        said.add(refused.value.refusal)
    assert {each.reason for each in said} == {"CREDENTIALS_INVALID"}
    assert len(said) == 1


async def test_asking_for_a_reset_says_nothing_of_the_account(
    http: httpx.AsyncClient, fay: User
) -> None:
    answers = [
        await http.post("/v1/password:requestReset", json={"email": email})
        for email in (fay.email, "nobody@example.com", fay.email)
    ]
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "{}")}
