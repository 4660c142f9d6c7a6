"""One real mesh, and users who signed up to it, for all tests that come through its edge."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import ssl
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import grpc
import httpx
import pytest
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2 as agents
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.users.v1 import users_pb2 as users

from local.fleet import Commands
from local.layout import Layout
from local.mesh import Mesh, in_background
from tests import shipped_models
from tests.canaries import WATCH, overheard
from tests.transports import Grpc, Metadata, Rest, Transport

T = TypeVar("T")

PASSWORD = "correct horse battery staple"
# The logs say as much as they ever do: one test looks for what they must not say. No call here
# takes as long as those that an erasure waits for.
SETTINGS = ("KIMBERLY_LOG_LEVEL=debug", "KIMBERLY_ERASURE_SETTLE_SECONDS=5")
COMMANDS = Commands(
    service=("env", *SETTINGS, sys.executable, "-m", "tests.unhurried"),
    worker=("env", "KIMBERLY_LOG_LEVEL=debug", sys.executable, "-m", "workers"),
)
GRANT = users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_STORE, granted=True)

_RUNNING = pytest.StashKey[tuple[Mesh, contextlib.ExitStack]]()
_POLL_SECONDS = 0.02
_TOKEN = re.compile(r"[\w-]{43}")


@pytest.fixture(scope="session")
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mesh:
    """The whole mesh, from the edge to the stores."""
    # To pytest, a fixture that two conftests import is two fixtures. The mesh is to be one.
    stash = request.config.stash
    if _RUNNING not in stash:
        layout = Layout(tmp_path_factory.mktemp("mesh"))
        stack = contextlib.ExitStack()
        models = str(shipped_models.put(tmp_path_factory.mktemp("models")))
        lending = stack.enter_context(pytest.MonkeyPatch.context())
        lending.setenv("KIMBERLY_EMBEDDING_MODELS_DIRECTORY", models)
        lending.setenv("KIMBERLY_QUESTION_MODELS_DIRECTORY", models)
        mesh = stack.enter_context(
            in_background(Mesh(layout, workers=1, durable=False, commands=COMMANDS))
        )
        stack.callback(WATCH.look_at_metrics, mesh)
        stash[_RUNNING] = (mesh, stack)
    return stash[_RUNNING][0]


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Stop the mesh after the last test of its directory.

    Linux gives a user 128 watchers of files, and each Envoy takes four: those who start further
    meshes need them.
    """
    if (nextitem is None or nextitem.path.parent != item.path.parent) and (
        running := item.config.stash.get(_RUNNING, None)
    ):
        del item.config.stash[_RUNNING]
        running[1].close()


@pytest.fixture(scope="session")
def trust(mesh: Mesh) -> ssl.SSLContext:
    """What a client of the edge trusts."""
    return ssl.create_default_context(cafile=mesh.ca)


@pytest_asyncio.fixture(scope="session")
async def http(mesh: Mesh, trust: ssl.SSLContext) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of the edge. It knows no user."""
    async with httpx.AsyncClient(base_url=mesh.edge, verify=trust, timeout=15) as client:
        yield client


@pytest_asyncio.fixture(scope="session")
async def channel(mesh: Mesh) -> AsyncIterator[grpc.aio.Channel]:
    """A gRPC channel to the edge. It knows no user."""
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    async with grpc.aio.secure_channel(address_of(mesh), credentials) as channel:
        yield overheard(channel)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody who signed up."""

    id: str
    tenant_id: str
    email: str
    tokens: auth.Tokens
    rest: Rest
    grpc: Grpc

    @property
    def token(self) -> str:
        """The access token."""
        return self.tokens.access_token

    @property
    def transports(self) -> dict[str, Transport]:
        """Both ways to call, by name."""
        return {"grpc": self.grpc, "rest": self.rest}


async def sign_up(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, *, consenting: bool = True
) -> User:
    """Return a user whom nobody met before."""
    email = f"{secrets.token_hex(8)}@example.com"
    request = auth.SignUpRequest(email=email, password=PASSWORD)
    return await _signed_up(http, channel, request, consenting=consenting)


async def _signed_up(
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
    request: auth.SignUpRequest,
    *,
    consenting: bool = True,
) -> User:
    answer = await Grpc(channel)(request)
    token = answer.tokens.access_token
    rest, over_grpc = Rest(http, token), Grpc(channel, bearer(token))
    if consenting:
        await over_grpc(GRANT)
    return User(answer.user_id, answer.tenant_id, request.email, answer.tokens, rest, over_grpc)


async def join(
    mesh: Mesh,
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
    host: User,
    *,
    consenting: bool = True,
) -> User:
    """Return a new user of somebody's tenant, who was invited there."""
    email = f"{secrets.token_hex(8)}@example.com"
    await host.grpc(auth.CreateInvitationRequest(email=email, role=auth.ROLE_MEMBER))
    invitation = await mailed_token(mesh, email)
    request = auth.SignUpRequest(email=email, password=PASSWORD, invitation=invitation)
    return await _signed_up(http, channel, request, consenting=consenting)


async def join_too(
    mesh: Mesh,
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
    user: User,
    host: User,
    role: auth.Role.ValueType = auth.ROLE_MEMBER,
) -> User:
    """Return whom a user's account is in somebody's tenant, into which it is asked."""
    await host.grpc(auth.CreateInvitationRequest(email=user.email, role=role))
    invitation = await mailed_token(mesh, user.email, "You are invited")
    await user.grpc(auth.AcceptInvitationRequest(invitation=invitation))
    answer = await user.grpc(auth.SwitchTenantRequest(tenant_id=host.tenant_id))
    token = answer.tokens.access_token
    rest, over_grpc = Rest(http, token), Grpc(channel, bearer(token))
    await over_grpc(GRANT)
    return User(answer.user_id, host.tenant_id, user.email, answer.tokens, rest, over_grpc)


async def acting(
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
    user: User,
    scopes: Sequence[str],
    kind: agents.AgentKind.ValueType = agents.AGENT_KIND_EXTERNAL,
) -> tuple[User, agents.RegisterAgentResponse]:
    """Return a user for whom a new agent calls, with a token of its key; and the agent."""
    request = agents.RegisterAgentRequest(name="a helper", kind=kind, scopes=scopes)
    made = await user.grpc(request)
    exchanged = await user.grpc(auth.ExchangeTokenRequest(api_key=made.key))
    token = exchanged.access_token
    agent = replace(
        user,
        tokens=auth.Tokens(access_token=token),
        rest=Rest(http, token),
        grpc=Grpc(channel, bearer(token)),
    )
    return agent, made


async def mailed_token(mesh: Mesh, email: str, subject: str = "") -> str:
    """Return the token in the newest mail to somebody, of those with a subject."""

    async def look() -> list[str]:
        mails = [file.read_text() for file in sorted(mesh.layout.mails.glob("*.eml"))]
        return [mail for mail in mails if f"To: {email}" in mail and subject in mail]

    mails = await eventually(look, bool)
    return next(line for line in mails[-1].splitlines() if _TOKEN.fullmatch(line))


def bearer(token: str) -> Metadata:
    """Return the metadata of a call with this token."""
    return (("authorization", f"Bearer {token}"),)


def address_of(mesh: Mesh) -> str:
    """Return host and port of the edge."""
    return mesh.edge.removeprefix("https://")


async def eventually(
    look: Callable[[], Awaitable[T]], holds: Callable[[T], bool], seconds: float = 60.0
) -> T:
    """Look until what is seen holds, and return it."""
    deadline = time.monotonic() + seconds
    while not holds(seen := await look()):
        assert time.monotonic() < deadline, seen
        await asyncio.sleep(_POLL_SECONDS)
    return seen
