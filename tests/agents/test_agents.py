"""Agents: registered, known by their keys, disabled and deleted, and told of by name."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from joserfc import jwt
from kimberly.agents.v1 import agents_pb2 as pb
from kimberly.auth.v1 import auth_pb2 as auth_pb

from server import consent, ids
from server.access import METHODS, Scope
from server.agents.model import MOST_AGENTS
from server.auth.keyring import Keyring
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.errors import Unauthenticated
from server.grants import EndedGrants
from server.tokens import TokenVerifier
from tests.agents.conftest import Desk, desk_of, uuid_of
from tests.auth.conftest import Auth
from tests.conftest import FakeClock, bearer
from tests.deciding import decide
from tests.refusals import refusal_of


def claims_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=="))
    return claims


async def state_of(desk: Desk, agent: pb.Agent) -> pb.AgentState.ValueType:
    shown = await desk.call("GetAgent", pb.GetAgentRequest(id=agent.id))
    state: pb.AgentState.ValueType = shown.agent.state
    return state


async def test_an_agents_token_names_the_user_and_the_agent(desk: Desk) -> None:
    made = await desk.register(scopes=["memory.read", "memory.sensitive"])
    token = await desk.token(made.key)
    claims = claims_of(token)
    assert claims["sub"] == ids.show(ids.USER, desk.user.user_id)
    assert claims["act"] == {"sub": made.agent.id}
    credentials = await desk.read(token)
    agent = credentials.caller.agent
    assert agent
    assert (agent.id, agent.sees_sensitive) == (uuid_of(made.agent), True)
    assert credentials.scopes == {Scope.MEMORY_READ, Scope.MEMORY_SENSITIVE}


async def test_a_token_has_no_scope_that_its_agent_lacks(desk: Desk) -> None:
    made = await desk.register()
    narrow = await desk.read(await desk.token(made.key, ["memory.read"]))
    assert narrow.scopes == {Scope.MEMORY_READ}
    assert narrow.caller.agent
    for scope in ("memory.sensitive", "user"):
        refusal = await refusal_of(desk.token(made.key, [scope]))
        assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("scopes",))


@pytest.mark.parametrize(
    "act",
    [
        None,
        "agt_" + "0" * 32,
        {},
        {"sub": "usr_" + "0" * 32},
        {"sub": "agt_0"},
        {"sub": "agt_" + "0" * 32, "act": {"sub": "agt_" + "1" * 32}},
    ],
)
async def test_an_actor_that_is_not_understood_is_not_left_out(
    desk: Desk, keyring: Keyring, act: object
) -> None:
    made = await desk.register()
    token = await desk.token(made.key)
    key = await keyring.signer()
    header = {"alg": "ES256", "kid": key.kid, "typ": "at+jwt"}

    def signed(changed: object) -> str:
        return jwt.encode(header, claims_of(token) | {"act": changed}, key, algorithms=["ES256"])

    assert (await desk.read(signed({"sub": made.agent.id}))).caller.agent
    with pytest.raises(Unauthenticated):
        await desk.read(signed(act))


async def test_no_agent_is_good_for_everything(desk: Desk, keyring: Keyring) -> None:
    refusal = await refusal_of(desk.register(scopes=["user"]))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("scopes",))
    token = await desk.token((await desk.register()).key)
    key = await keyring.signer()
    header = {"alg": "ES256", "kid": key.kid, "typ": "at+jwt"}
    wide = claims_of(token) | {"scope": "user"}
    with pytest.raises(Unauthenticated):
        await desk.read(jwt.encode(header, wide, key, algorithms=["ES256"]))


async def test_agents_do_nothing_with_agents(desk: Desk) -> None:
    made = await desk.register(scopes=sorted({*Scope} - {Scope.USER}))
    agent = (await desk.read(await desk.token(made.key))).caller
    scope = " ".join({*Scope} - {Scope.USER})
    for method in METHODS:
        service, _, name = method.rpartition("/")
        if service != "/kimberly.agents.v1.AgentService":
            continue
        request = getattr(pb, f"{name}Request")()
        call = getattr(desk.agents, name)(request, metadata=bearer(agent, scope=scope))
        assert (await refusal_of(call)).reason == "SCOPE_MISSING", name


async def test_an_agents_key_is_no_key_of_a_script(desk: Desk) -> None:
    await desk.register()
    listed = await desk.auth.ListApiKeys(auth_pb.ListApiKeysRequest(), metadata=bearer(desk.user))
    assert not listed.api_keys


async def test_disabling_refuses_key_and_tokens_and_enabling_takes_that_back(desk: Desk) -> None:
    made = await desk.register()
    token = await desk.token(made.key)
    await desk.read(token)
    await desk.call("DisableAgent", pb.DisableAgentRequest(id=made.agent.id))
    assert await state_of(desk, made.agent) == pb.AGENT_STATE_DISABLED
    with pytest.raises(Unauthenticated):
        await desk.read(token)
    assert (await refusal_of(desk.token(made.key))).reason == "API_KEY_INVALID"
    await desk.call("EnableAgent", pb.EnableAgentRequest(id=made.agent.id))
    assert await state_of(desk, made.agent) == pb.AGENT_STATE_ENABLED
    assert (await desk.read(await desk.token(made.key))).caller.agent
    with pytest.raises(Unauthenticated):
        await desk.read(token)


async def test_deleting_is_for_good_and_leaves_the_name(desk: Desk) -> None:
    made = await desk.register(name="the tidy one")
    token = await desk.token(made.key)
    await desk.call("DeleteAgent", pb.DeleteAgentRequest(id=made.agent.id))
    with pytest.raises(Unauthenticated):
        await desk.read(token)
    assert (await refusal_of(desk.token(made.key))).reason == "API_KEY_INVALID"
    shown = (await desk.call("GetAgent", pb.GetAgentRequest(id=made.agent.id))).agent
    assert (shown.name, shown.state) == ("the tidy one", pb.AGENT_STATE_DELETED)
    assert not shown.key_prefix
    assert not (await desk.call("ListAgents", pb.ListAgentsRequest())).agents
    for method in ("DisableAgent", "EnableAgent", "DeleteAgent", "RotateAgentKey"):
        request = getattr(pb, f"{method}Request")(id=made.agent.id)
        assert (await refusal_of(desk.call(method, request))).reason == "RESOURCE_NOT_FOUND"


async def test_a_rotated_key_lets_the_old_one_stay_for_as_long_as_was_asked(
    desk: Desk, clock: FakeClock
) -> None:
    made = await desk.register()
    day = Duration(seconds=86_400)
    request = pb.RotateAgentKeyRequest(id=made.agent.id, overlap=day)
    second = await desk.call("RotateAgentKey", request)
    for key in (made.key, second.key):
        await desk.token(key)
    clock.advance(days=1, seconds=1)
    assert (await refusal_of(desk.token(made.key))).reason == "API_KEY_INVALID"
    token = await desk.token(second.key)
    third = await desk.call("RotateAgentKey", pb.RotateAgentKeyRequest(id=made.agent.id))
    with pytest.raises(Unauthenticated):
        await desk.read(token)
    await desk.token(third.key)


async def test_the_key_of_an_agent_may_be_renewed_after_it_ended(
    desk: Desk, clock: FakeClock
) -> None:
    made = await desk.register()
    clock.advance(days=91)
    assert (await refusal_of(desk.token(made.key))).reason == "API_KEY_INVALID"
    renewed = await desk.call("RotateAgentKey", pb.RotateAgentKeyRequest(id=made.agent.id))
    await desk.token(renewed.key)


async def test_a_retry_registers_no_second_agent_and_shows_no_key(desk: Desk) -> None:
    first = await desk.register(request_id="once")
    second = await desk.register(request_id="once")
    assert second.agent.id == first.agent.id
    assert (bool(first.key), bool(second.key)) == (True, False)
    refusal = await refusal_of(desk.register(request_id="once", name="another"))
    assert refusal.reason == "REQUEST_ID_REUSED"
    assert len((await desk.call("ListAgents", pb.ListAgentsRequest())).agents) == 1


async def test_there_is_room_for_some_agents_however_many_are_made_at_once(desk: Desk) -> None:
    made = await asyncio.gather(
        *(desk.register() for _ in range(MOST_AGENTS + 5)), return_exceptions=True
    )
    refused = [each for each in made if isinstance(each, grpc.aio.AioRpcError)]
    assert len(refused) == 5
    assert {each.code() for each in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    listed = (await desk.call("ListAgents", pb.ListAgentsRequest())).agents
    assert len(listed) == MOST_AGENTS
    await desk.call("DeleteAgent", pb.DeleteAgentRequest(id=listed[0].id))
    await desk.register()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"name": " "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"kind": pb.AGENT_KIND_UNSPECIFIED}, "kind"),
        ({"kind": 99}, "kind"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["memory.fly"]}, "scopes"),
        ({"key_expire_time": Timestamp(seconds=1)}, "key_expire_time"),
        ({"key_expire_time": Timestamp(seconds=9_000_000_000)}, "key_expire_time"),
        ({"request_id": "x" * 65}, "request_id"),
    ],
)
async def test_what_no_agent_can_be_is_refused(
    desk: Desk, fields: dict[str, Any], field: str
) -> None:
    refusal = await refusal_of(desk.register(**fields))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", (field,))


@pytest.mark.parametrize("seconds", [-1, timedelta(days=8).total_seconds(), 2**60])
async def test_no_old_key_stays_for_longer_than_a_week(desk: Desk, seconds: float) -> None:
    made = await desk.register()
    overlap = Duration(seconds=int(seconds))
    request = pb.RotateAgentKeyRequest(id=made.agent.id, overlap=overlap)
    refusal = await refusal_of(desk.call("RotateAgentKey", request))
    assert (refusal.reason, refusal.fields) == ("FIELD_INVALID", ("overlap",))
    await desk.token(made.key)


async def test_what_is_done_to_agents_and_by_their_keys_is_told(
    desk: Desk, owner: asyncpg.Connection
) -> None:
    made = await desk.register()
    await desk.token(made.key)
    for method in ("RotateAgentKey", "DisableAgent", "EnableAgent", "DeleteAgent"):
        await desk.call(method, getattr(pb, f"{method}Request")(id=made.agent.id))
    rows = await owner.fetch(
        "SELECT actor, action FROM audit_events WHERE action ~ '^(agent|api_key)' ORDER BY id"
    )
    user, agent = ids.show(ids.USER, desk.user.user_id), made.agent.id
    assert [tuple(row) for row in rows] == [
        (user, "agent.register"),
        (agent, "api_key.exchange"),
        (user, "agent.rotate_key"),
        (user, "agent.disable"),
        (user, "agent.enable"),
        (user, "agent.delete"),
    ]


async def test_somebody_elses_agent_is_not_there(
    desk: Desk,
    agents: Any,
    auth: Auth,
    verifier: TokenVerifier,
    ended: EndedGrants,
    database: Database,
) -> None:
    made = await desk.register()
    other = await desk_of(agents, auth, verifier, ended, database, "eve@example.com")
    of_tenant = Caller(desk.user.tenant_id, other.user.user_id)
    for caller in (other.user, of_tenant):
        for method in ("GetAgent", "DisableAgent", "EnableAgent", "DeleteAgent", "RotateAgentKey"):
            request = getattr(pb, f"{method}Request")(id=made.agent.id)
            call = getattr(agents, method)(request, metadata=bearer(caller))
            assert (await refusal_of(call)).reason == "RESOURCE_NOT_FOUND", method
    await desk.token(made.key)


async def test_a_withdrawn_consent_ends_the_tokens_of_agents_and_not_of_scripts(
    desk: Desk, system_database: SystemDatabase
) -> None:
    made = await desk.register()
    request = auth_pb.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    script = await desk.auth.CreateApiKey(request, metadata=bearer(desk.user))
    acting, running = await desk.token(made.key), await desk.token(script.secret)
    await decide(system_database, desk.user, consent.MEMORY_AGENT_ACCESS, granted=False)
    with pytest.raises(Unauthenticated):
        await desk.read(acting)
    refusal = await refusal_of(
        desk.auth.ExchangeToken(auth_pb.ExchangeTokenRequest(api_key=made.key))
    )
    assert refusal.reason == "CONSENT_MISSING"
    assert (await desk.read(running)).caller == desk.user
    await desk.token(script.secret)
    # The key waited. What it opened before is not opened again.
    await decide(system_database, desk.user, consent.MEMORY_AGENT_ACCESS, granted=True)
    assert (await desk.read(await desk.token(made.key))).caller.agent
    with pytest.raises(Unauthenticated):
        await desk.read(acting)
