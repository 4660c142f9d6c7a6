"""Bob, a guest in Ada's tenant: accounts that belong to several tenants, and what they ask."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio
from kimberly.auth.v1 import auth_pb2 as pb

from server.tokens import TokenVerifier
from tests.auth.conftest import PASSWORD, Auth, Invite, Person

ROUNDS = 20
Switch = Callable[[Person, str], Awaitable[Person]]
Join = Callable[..., Awaitable[pb.Membership]]


@dataclass(frozen=True)
class Guest:
    """Bob, who has a tenant of his own and joined Ada's."""

    home: Person
    """Bob where he logs in."""
    away: Person
    """Bob in Ada's tenant."""


async def accept(auth: Auth, person: Person, token: str) -> pb.Membership:
    request = pb.AcceptInvitationRequest(invitation=token)
    return (await auth.AcceptInvitation(request, metadata=person.as_)).membership


async def tenants_of(auth: Auth, person: Person) -> list[pb.Membership]:
    answer = await auth.ListTenants(pb.ListTenantsRequest(), metadata=person.as_)
    return list(answer.memberships)


async def sessions_of(auth: Auth, person: Person) -> list[pb.Session]:
    answer = await auth.ListSessions(pb.ListSessionsRequest(), metadata=person.as_)
    return list(answer.sessions)


def leaving(
    auth: Auth,
    person: Person,
    tenant_id: str,
    password: str = PASSWORD,
    *,
    request_id: str = "",
) -> Awaitable[Any]:
    request = pb.LeaveTenantRequest(tenant_id=tenant_id, password=password, request_id=request_id)
    return auth.LeaveTenant(request, metadata=person.as_)


@pytest.fixture
def switch(auth: Auth, verifier: TokenVerifier) -> Switch:
    """Have somebody switch to a tenant, and return them as they are there."""

    async def switch(person: Person, tenant_id: str) -> Person:
        request = pb.SwitchTenantRequest(tenant_id=tenant_id)
        answer = await auth.SwitchTenant(request, metadata=person.as_)
        credentials = await verifier.verify(answer.tokens.access_token)
        return Person(answer.user_id, person.email, answer.tokens, credentials)

    return switch


@pytest.fixture
def join(auth: Auth, invite: Invite, switch: Switch) -> Callable[..., Awaitable[Person]]:
    """Have somebody join somebody's tenant, and return them as they are there."""

    async def join(person: Person, host: Person, role: str = "member") -> Person:
        await accept(auth, person, await invite(host, person.email, role))
        return await switch(person, host.tenant_id)

    return join


@pytest_asyncio.fixture
async def guest(ada: Person, bob: Person, join: Callable[..., Awaitable[Person]]) -> Guest:
    return Guest(bob, await join(bob, ada))
