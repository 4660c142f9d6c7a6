"""The keys that somebody made while they knew the password: when they end with it, and when not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.auth.v1 import auth_pb2 as auth_pb

from server.auth.mail_store import MailStore
from server.auth.postman import Postman
from server.caller import Caller
from server.errors import Unauthenticated
from tests.agents.conftest import Desk
from tests.auth import mails as of_mails
from tests.auth.conftest import PASSWORD, Auth, reason_of
from tests.conftest import bearer

outbox, postman = of_mails.outbox, of_mails.postman

NEW = "another long password"
ADA = "ada@example.com"
REFUSED = "API_KEY_INVALID"


@dataclass(frozen=True)
class Thief:
    """What somebody made who had the password for a while."""

    desk: Desk
    agent: pb.Agent
    secrets: tuple[str, str]
    """Of a script's key and of an agent's."""
    tokens: tuple[str, str]
    """Made with these."""


@dataclass(frozen=True)
class Owner:
    """Whose account it is."""

    auth: Auth
    user: Caller
    outbox: Path
    postman: Postman

    async def log_out(self, *, with_keys: bool) -> int:
        request = auth_pb.LogOutEverywhereRequest(revoke_api_keys=with_keys)
        answer = await self.auth.LogOutEverywhere(request, metadata=bearer(self.user))
        return answer.revoked_api_keys

    async def change(self, *, with_keys: bool) -> int:
        request = auth_pb.ChangePasswordRequest(
            current_password=PASSWORD, new_password=NEW, revoke_api_keys=with_keys
        )
        answer = await self.auth.ChangePassword(request, metadata=bearer(self.user))
        return answer.revoked_api_keys

    async def reset(self, *, with_keys: bool) -> int:
        await self.auth.RequestPasswordReset(auth_pb.RequestPasswordResetRequest(email=ADA))
        token = await of_mails.mailed(self.outbox, self.postman, "Reset")
        # Whoever says nothing has them ended.
        said = {} if with_keys else {"keep_api_keys": True}
        request = auth_pb.ResetPasswordRequest(token=token, new_password=NEW, **said)
        return (await self.auth.ResetPassword(request)).revoked_api_keys


WAYS: dict[str, Callable[..., Awaitable[int]]] = {
    "log out everywhere": Owner.log_out,
    "change the password": Owner.change,
    "reset the password": Owner.reset,
}


@pytest.fixture
def ada(desk: Desk, outbox: Path, postman: Postman, mails: MailStore) -> Owner:
    return Owner(desk.auth, desk.user, outbox, postman)


@pytest_asyncio.fixture
async def thief(desk: Desk) -> Thief:
    key = await desk.auth.CreateApiKey(_ASKED, metadata=bearer(desk.user))
    made = await desk.register()
    secrets = key.secret, made.key
    tokens = await desk.token(secrets[0]), await desk.token(secrets[1])
    return Thief(desk, made.agent, secrets, tokens)


_HELPER = pb.RegisterAgentRequest(
    name="a helper", kind=pb.AGENT_KIND_EXTERNAL, scopes=["memory.read"]
)
_ASKED = auth_pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
async def test_every_key_ends_with_its_tokens_and_an_agent_waits_for_another_secret(
    ada: Owner, thief: Thief, way: Callable[..., Awaitable[int]], owner: asyncpg.Connection
) -> None:
    assert await way(ada, with_keys=True) == 1
    for secret, token in zip(thief.secrets, thief.tokens, strict=True):
        assert await reason_of(thief.desk.token(secret)) == REFUSED
        with pytest.raises(Unauthenticated):
            await thief.desk.read(token)
    rotate = pb.RotateAgentKeyRequest(id=thief.agent.id)
    renewed = await thief.desk.call("RotateAgentKey", rotate)
    await thief.desk.read(await thief.desk.token(renewed.key))
    rows = await owner.fetch(
        "SELECT action FROM audit_events WHERE action IN ('api_key.revoke', 'agent.end_key')"
    )
    assert sorted(row["action"] for row in rows) == ["agent.end_key", "api_key.revoke"]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
async def test_keys_stay_that_are_to_stay(
    ada: Owner, thief: Thief, way: Callable[..., Awaitable[int]]
) -> None:
    assert await way(ada, with_keys=False) == 0
    for secret in thief.secrets:
        await thief.desk.read(await thief.desk.token(secret))


async def test_of_keys_that_are_made_while_all_end_none_is_left(
    ada: Owner, desk: Desk, owner: asyncpg.Connection
) -> None:
    login = auth_pb.LogInRequest(email=ADA, password=PASSWORD)
    token = (await desk.auth.LogIn(login)).tokens.access_token
    credentials = await desk.verifier.verify(token)
    his = bearer(credentials.caller, grant_id=credentials.grant_id)
    making = (desk.auth.CreateApiKey(_ASKED, metadata=his) for _ in range(30))
    await asyncio.gather(*making, ada.log_out(with_keys=True), return_exceptions=True)
    assert await owner.fetchval("SELECT count(*) FROM api_key_secrets") == 0
    # No process knows yet that his log-in has ended; the table does.
    agent = (await desk.register()).agent
    for refused in (
        desk.auth.CreateApiKey(_ASKED, metadata=his),
        desk.agents.RegisterAgent(_HELPER, metadata=his),
        desk.agents.RotateAgentKey(pb.RotateAgentKeyRequest(id=agent.id), metadata=his),
    ):
        assert await reason_of(refused) == "TOKEN_INVALID"
