"""A user of the mesh for every test."""

from __future__ import annotations

import grpc
import httpx
import pytest
import pytest_asyncio

from tests.mesh import User, channel, http, mesh, pytest_runtest_teardown, sign_up, trust
from tests.transports import Grpc, Rest, Transport

__all__ = ["channel", "http", "mesh", "pytest_runtest_teardown", "trust"]


@pytest_asyncio.fixture
async def user(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """A user who consented to memory.store."""
    return await sign_up(http, channel)


@pytest.fixture(params=["grpc", "rest"])
def call(request: pytest.FixtureRequest, user: User) -> Transport:
    """How the user calls: every test that asks for it runs over gRPC and over REST."""
    return user.transports[request.param]


@pytest.fixture(params=["grpc", "rest"])
def call_without_token(
    request: pytest.FixtureRequest, http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> Transport:
    """How somebody unknown calls, over gRPC and over REST."""
    return Grpc(channel) if request.param == "grpc" else Rest(http)
