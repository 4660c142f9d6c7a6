"""Who may call through the edge: the columns of the matrix of methods and callers."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
import httpx
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from server.access import METHODS, ROLES, Access, Role, Scope, scope_of
from server.auth.api_keys import GRANTABLE
from tests.abuse.estates import agree
from tests.mesh import PASSWORD, User, acting, bearer, join_too, mailed_token, sign_up
from tests.transports import Grpc, Metadata


@dataclass(frozen=True, slots=True)
class Scene:
    """What is needed to become a caller."""

    mesh: Mesh
    http: httpx.AsyncClient
    channel: grpc.aio.Channel
    host: User
    """Who owns the tenant that others are asked into."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody or something that calls: how they become that, and what is open to them."""

    name: str
    become: Callable[[Scene], Awaitable[Metadata]]
    opened: frozenset[str]


def opened_to(role: Role) -> frozenset[str]:
    """Return what the table opens to a user with this role, beside what is open to anyone."""
    return frozenset(method for method, access in METHODS.items() if role in ROLES.get(access, ()))


def opened_by(*scopes: Scope) -> frozenset[str]:
    """Return what the table opens to a key or an agent with these scopes."""
    return frozenset(
        method
        for method, access in METHODS.items()
        if access is Access.USER and scope_of(method) in scopes
    )


async def _nobody(scene: Scene) -> Metadata:
    return ()


async def _host(scene: Scene) -> Metadata:
    return bearer(scene.host.token)


async def _of_another_tenant(scene: Scene) -> Metadata:
    return bearer((await sign_up(scene.http, scene.channel)).token)


def _asked_in_as(role: auth.Role.ValueType) -> Callable[[Scene], Awaitable[Metadata]]:
    async def become(scene: Scene) -> Metadata:
        email = f"{secrets.token_hex(8)}@example.com"
        await scene.host.grpc(auth.CreateInvitationRequest(email=email, role=role))
        invitation = await mailed_token(scene.mesh, email)
        request = auth.SignUpRequest(email=email, password=PASSWORD, invitation=invitation)
        return bearer((await Grpc(scene.channel)(request)).tokens.access_token)

    return become


def _at_home_elsewhere(role: auth.Role.ValueType) -> Callable[[Scene], Awaitable[Metadata]]:
    async def become(scene: Scene) -> Metadata:
        owner = await sign_up(scene.http, scene.channel)
        away = await join_too(scene.mesh, scene.http, scene.channel, owner, scene.host, role)
        return bearer(away.token)

    return become


def _key(*scopes: Scope) -> Callable[[Scene], Awaitable[Metadata]]:
    async def become(scene: Scene) -> Metadata:
        request = auth.CreateApiKeyRequest(name="a script", scopes=[each.value for each in scopes])
        key = await scene.host.grpc(request)
        exchanged = await Grpc(scene.channel)(auth.ExchangeTokenRequest(api_key=key.secret))
        return bearer(exchanged.access_token)

    return become


def _agent(*scopes: Scope) -> Callable[[Scene], Awaitable[Metadata]]:
    async def become(scene: Scene) -> Metadata:
        await agree(scene.host, users.CONSENT_PURPOSE_MEMORY_AGENT_ACCESS)
        agent, _ = await acting(scene.http, scene.channel, scene.host, scopes)
        return bearer(agent.token)

    return become


def _keys() -> Iterator[Caller]:
    scopes = [Scope(each) for each in sorted(GRANTABLE)]
    for scope in scopes:
        yield Caller(f"key for {scope}", _key(scope), opened_by(scope))
    yield Caller("key for everything a key can have", _key(*scopes), opened_by(*scopes))


def _agents() -> Iterator[Caller]:
    scopes = [scope for scope in Scope if scope is not Scope.USER]
    for scope in scopes:
        yield Caller(f"agent for {scope}", _agent(scope), opened_by(scope))
    yield Caller("agent for everything an agent can have", _agent(*scopes), opened_by(*scopes))


PEOPLE = (
    Caller("anonymous", _nobody, frozenset()),
    Caller("user", _host, opened_to(Role.OWNER)),
    Caller("user of another tenant", _of_another_tenant, opened_to(Role.OWNER)),
    Caller("admin", _asked_in_as(auth.ROLE_ADMIN), opened_to(Role.ADMIN)),
    Caller("auditor", _asked_in_as(auth.ROLE_AUDITOR), opened_to(Role.AUDITOR)),
    Caller("member", _asked_in_as(auth.ROLE_MEMBER), opened_to(Role.MEMBER)),
    # Whoever owns a tenant is in another one what they were asked to be.
    Caller("owner elsewhere, admin", _at_home_elsewhere(auth.ROLE_ADMIN), opened_to(Role.ADMIN)),
    Caller(
        "owner elsewhere, auditor", _at_home_elsewhere(auth.ROLE_AUDITOR), opened_to(Role.AUDITOR)
    ),
    Caller("owner elsewhere, member", _at_home_elsewhere(auth.ROLE_MEMBER), opened_to(Role.MEMBER)),
)
KEYS = tuple(_keys())
AGENTS = tuple(_agents())
CALLERS = (*PEOPLE, *KEYS, *AGENTS)
