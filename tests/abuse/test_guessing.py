"""Whoever guesses passwords waits; whoever's password is guessed does not."""

from __future__ import annotations

import ssl

import grpc
import httpx
import pytest_asyncio

from local.mesh import Mesh
from server.auth.throttling import FREE_HERE
from tests.mesh import PASSWORD, User, sign_up

ELSEWHERE = "127.0.0.2"


@pytest_asyncio.fixture
async def fay(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Somebody whose password is guessed."""
    return await sign_up(http, channel)


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
    waiting = await log_in(http, fay, PASSWORD)
    assert (waiting.status_code, waiting.text) == (wrong.status_code, wrong.text)
    transport = httpx.AsyncHTTPTransport(verify=trust, local_address=ELSEWHERE)
    async with httpx.AsyncClient(base_url=mesh.edge, transport=transport) as elsewhere:
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


async def test_asking_for_a_reset_says_nothing_of_the_account(
    http: httpx.AsyncClient, fay: User
) -> None:
    answers = [
        await http.post("/v1/password:requestReset", json={"email": email})
        for email in (fay.email, "nobody@example.com", fay.email)
    ]
    assert {(answer.status_code, answer.text) for answer in answers} == {(200, "{}")}
