"""The auth service of one test, behind the real chain."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias

import argon2
import asyncpg
import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids
from server.auth.access_tokens import Mint
from server.auth.api_key_store import ApiKeyStore
from server.auth.attempt_store import AttemptStore
from server.auth.breached import Commonplace
from server.auth.issuing import Issuer
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.auth.mail_store import MailStore
from server.auth.member_store import MemberStore
from server.auth.membership_store import MembershipStore
from server.auth.passwords import Passwords
from server.auth.postman import Postman
from server.auth.service import AuthService
from server.auth.session_store import SessionStore
from server.auth.sign_up_store import SignUpStore
from server.auth.store import AccountStore
from server.auth.tenant_service import TenantService
from server.caller import Caller, Credentials
from server.database import SystemDatabase
from server.grants import EndedGrants
from server.kms.local import LocalKms
from server.privacy.erasure_store import ErasureStore, Patience
from server.tokens import TokenVerifier
from tests.auth.mails import mailed, outbox, postman
from tests.conftest import FakeClock, Serve, bearer
from tests.kms.key_files import key_file

__all__ = ["outbox", "postman"]

Auth: TypeAlias = "rpc.AuthServiceAsyncStub"
"""The generated type of the stub; it exists for type checkers only."""
Tenants: TypeAlias = "rpc.TenantServiceAsyncStub"

PASSWORD = "correct horse battery"
ISSUER = "https://auth.test"
AUDIENCE = "kimberly"
ACCESS_TOKEN_SECONDS = 600
SESSION_LIFETIME = timedelta(days=30)

As = tuple[tuple[str, str], ...]
ENUM = {
    "owner": pb.ROLE_OWNER,
    "admin": pb.ROLE_ADMIN,
    "member": pb.ROLE_MEMBER,
    "auditor": pb.ROLE_AUDITOR,
}


class CountingHasher(argon2.PasswordHasher):
    """Argon2id at next to no cost, which counts how often it is asked."""

    verified = 0

    def __init__(self, memory_cost: int = 8) -> None:
        super().__init__(time_cost=1, memory_cost=memory_cost, parallelism=1)

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - as it is there
        self.verified += 1
        return super().verify(hash, password)


class Gauge(CountingHasher):
    """Argon2id that takes a moment, and tells how often it ran at once."""

    running = most = 0

    def verify(self, hash: str | bytes, password: str | bytes) -> Literal[True]:  # noqa: A002 - as it is there
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return super().verify(hash, password)
        finally:
            self.running -= 1


@pytest.fixture
def hasher() -> CountingHasher:
    return CountingHasher()


@pytest.fixture
def hashing(hasher: CountingHasher) -> Iterator[Passwords]:
    with Passwords(concurrency=2, hasher=hasher, breached=[Commonplace()]) as hashing:
        yield hashing


@pytest.fixture
def kms(tmp_path: Path) -> LocalKms:
    return LocalKms(key_file(tmp_path / "master.key", bytes(range(32))))


@pytest.fixture
def key_store(system_database: SystemDatabase) -> KeyStore:
    return KeyStore(system_database)


@pytest.fixture
def keyring(key_store: KeyStore, kms: LocalKms, clock: FakeClock) -> Keyring:
    return Keyring(key_store, kms, access_token_seconds=ACCESS_TOKEN_SECONDS, clock=clock)


@pytest.fixture
def mint() -> Mint:
    return Mint(ISSUER, AUDIENCE, timedelta(seconds=ACCESS_TOKEN_SECONDS))


@pytest.fixture
def issuer(keyring: Keyring, mint: Mint, clock: FakeClock) -> Issuer:
    return Issuer(keyring, mint, SESSION_LIFETIME, clock)


@pytest.fixture
def mails(system_database: SystemDatabase) -> MailStore:
    return MailStore(system_database)


@pytest.fixture
def erasures(system_database: SystemDatabase) -> ErasureStore:
    return ErasureStore(system_database, Patience(timedelta(), timedelta(hours=1)))


@pytest.fixture
def members(system_database: SystemDatabase, erasures: ErasureStore) -> MemberStore:
    return MemberStore(system_database, erasures.begin_within)


@pytest.fixture
def memberships(system_database: SystemDatabase, erasures: ErasureStore) -> MembershipStore:
    return MembershipStore(system_database, erasures.begin_within)


@pytest.fixture
def service(
    system_database: SystemDatabase,
    mails: MailStore,
    memberships: MembershipStore,
    keyring: Keyring,
    hashing: Passwords,
    issuer: Issuer,
    clock: FakeClock,
) -> AuthService:
    return AuthService(
        AccountStore(system_database),
        SessionStore(system_database),
        AttemptStore(system_database),
        mails,
        ApiKeyStore(system_database),
        memberships,
        keyring,
        hashing,
        issuer,
        sign_ups=SignUpStore(system_database),
        confirms_email=False,
        clock=clock,
    )


@pytest_asyncio.fixture
async def channel(
    serve: Serve, service: AuthService, members: MemberStore, clock: FakeClock
) -> grpc.aio.Channel:
    """A channel to what the auth process serves of kimberly.auth."""
    tenants = TenantService(members, clock=clock)

    def register(server: grpc.aio.Server) -> None:
        rpc.add_AuthServiceServicer_to_server(service, server)
        rpc.add_TenantServiceServicer_to_server(tenants, server)

    return await serve(register)


@pytest.fixture
def auth(channel: grpc.aio.Channel) -> Auth:
    """A stub of the auth service."""
    return rpc.AuthServiceStub(channel)


@pytest.fixture
def tenants(channel: grpc.aio.Channel) -> Tenants:
    """A stub of the tenant service."""
    return rpc.TenantServiceStub(channel)


@pytest.fixture
def ended(system_database: SystemDatabase, clock: FakeClock) -> EndedGrants:
    return EndedGrants(system_database, clock=clock)


@pytest.fixture
def verifier(keyring: Keyring, ended: EndedGrants, clock: FakeClock) -> TokenVerifier:
    """Verifies as the auth process itself does."""
    return TokenVerifier(keyring, issuer=ISSUER, audience=AUDIENCE, ended=ended, clock=clock)


@dataclass(frozen=True)
class Person:
    """Somebody in a tenant."""

    id: str
    email: str
    tokens: pb.Tokens
    credentials: Credentials

    @property
    def tenant_id(self) -> str:
        """The tenant, as the API shows it."""
        return ids.show(ids.TENANT, self.credentials.caller.tenant_id)

    @property
    def as_(self) -> As:
        """What their calls carry: the role and the session that their access token names."""
        said = self.credentials
        return bearer(said.caller, role=said.role, grant_id=said.grant_id)


Meet = Callable[..., Awaitable[Person]]
Invite = Callable[..., Awaitable[str]]
Join = Callable[[str], Awaitable[Person]]


@pytest.fixture
def meet(auth: Auth, verifier: TokenVerifier) -> Meet:
    """Have somebody sign up, by an invitation if there is one, and return them."""

    async def meet(email: str, invitation: str = "") -> Person:
        request = pb.SignUpRequest(email=email, password=PASSWORD, invitation=invitation)
        answer = await auth.SignUp(request)
        credentials = await verifier.verify(answer.tokens.access_token)
        return Person(answer.user_id, email, answer.tokens, credentials)

    return meet


@pytest_asyncio.fixture
async def ada(meet: Meet) -> AsyncIterator[Person]:
    """Owns a tenant."""
    yield await meet("ada@example.com")


@pytest_asyncio.fixture
async def bob(meet: Meet) -> Person:
    """Owns another tenant."""
    return await meet("bob@example.com")


@pytest.fixture
def invite(tenants: Tenants, postman: Postman, outbox: Path) -> Invite:
    """Have somebody ask somebody else to join them, and return the token from the mail."""

    async def invite(host: Person, email: str, role: str = "member") -> str:
        request = pb.CreateInvitationRequest(email=email, role=ENUM[role])
        await tenants.CreateInvitation(request, metadata=host.as_)
        return await mailed(outbox, postman, "invited")

    return invite


@pytest.fixture
def join(tenants: Tenants, ada: Person, invite: Invite, meet: Meet) -> Join:
    """Have somebody sign up to Ada's tenant in a role, and return them."""

    async def join(role: str) -> Person:
        email = f"{ids.new_id().hex}@example.com"
        invited = role if role != "owner" else "member"
        person = await meet(email, await invite(ada, email, invited))
        if role == "owner":
            assign = pb.AssignRoleRequest(user_id=person.id, role=pb.ROLE_OWNER)
            await tenants.AssignRole(assign, metadata=ada.as_)
        return person

    return join


async def sign_up(auth: Auth, email: str = "ada@example.com") -> pb.Tokens:
    """Make an account and return the tokens of its first session."""
    response = await auth.SignUp(pb.SignUpRequest(email=email, password=PASSWORD))
    return response.tokens


async def log_in(auth: Auth, person: Person) -> pb.LogInResponse:
    """Log in with the password that every person here has."""
    return await auth.LogIn(pb.LogInRequest(email=person.email, password=PASSWORD))


async def owners(connection: asyncpg.Connection, count: int) -> list[Caller]:
    """Return the owners of a new tenant."""
    tenant_id = ids.new_id()
    callers = [Caller(tenant_id, ids.new_id()) for _ in range(count)]
    await connection.execute("INSERT INTO tenants VALUES ($1, now())", tenant_id)
    await connection.executemany(
        """
        INSERT INTO users (tenant_id, id, email, display_name, created_at)
        VALUES ($1, $2, $3, 'somebody', now())
        """,
        [(each.tenant_id, each.user_id, f"{each.user_id}@example.com") for each in callers],
    )
    await connection.executemany(
        "INSERT INTO accounts (tenant_id, user_id, password_hash) VALUES ($1, $2, '$argon2id$')",
        [(each.tenant_id, each.user_id) for each in callers],
    )
    return callers


async def refresh(auth: Auth, refresh_token: str) -> pb.Tokens:
    """Exchange a refresh token."""
    response = await auth.RefreshToken(pb.RefreshTokenRequest(refresh_token=refresh_token))
    return response.tokens


async def reason_of(call: Awaitable[Any]) -> str:
    """Return the reason that a call is refused with, and for a field which: "REASON field"."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]  # has all it asks for
    assert status is not None, caught.value
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status.details[0].Unpack(info)
    for detail in status.details[1:]:
        detail.Unpack(bad)
    return " ".join([info.reason, *(violation.field for violation in bad.field_violations)])
