"""Conversations through the edge, over gRPC and over REST."""

from __future__ import annotations

import httpx
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from tests.mesh import User
from tests.transports import Transport


async def test_conversation_is_appended_to_found_ended_and_kept(call: Transport) -> None:
    said = ["Where did you buy the kayak?", "In Hamburg.", "It is raining."]
    turns = [pb.SessionTurn(content=text, speaker="Ann") for text in said]
    request = pb.AppendToSessionRequest(session_id="talk 1", turns=turns, request_id="r")
    memories = (await call(request)).memories
    assert [memory.session_position for memory in memories] == [0, 1, 2]
    assert (await call(request)).memories == memories
    found = (await call(pb.QueryMemoriesRequest(query="kayak"))).matches
    assert [match.memory.content for match in found] == said
    await call(pb.GiveFeedbackRequest(id=memories[1].id, thumbs_up=True))
    end = pb.EndSessionRequest(session_id="talk 1", keep=pb.SESSION_KEEP_EARNED)
    ended = await call(end)
    assert (ended.promoted, ended.dropped) == (1, 2)
    assert await call(end) == ended
    (kept,) = (await call(pb.ListMemoriesRequest())).memories
    assert (kept.id, kept.tier, kept.version) == (memories[1].id, pb.TIER_LONG_TERM, 2)
    versions = (await call(pb.ListMemoryVersionsRequest(id=kept.id))).versions
    assert [version.tier for version in versions] == [pb.TIER_LONG_TERM, pb.TIER_SHORT_TERM]
    events = (await call(users.ListAuditEventsRequest())).events
    actions = [event.action for event in events if event.resource == kept.id]
    assert actions == ["memory.promote", "memory.feedback", "memory.create"]


async def test_conversation_in_json(user: User) -> None:
    body = {"turns": [{"content": "Hello", "speaker": "Ann"}, {"content": "Hi"}]}
    answer = await user.rest.raw("POST", "/v1/sessions/s1:append", body)
    assert answer.status_code == httpx.codes.OK, answer.text
    positions = [memory["sessionPosition"] for memory in answer.json()["memories"]]
    assert positions == [0, 1]
    answer = await user.rest.raw("POST", "/v1/sessions/s1:end", {"keep": "SESSION_KEEP_ALL"})
    assert answer.status_code == httpx.codes.OK, answer.text
    ended = answer.json()
    assert (ended["promoted"], ended["dropped"]) == ("2", "0")
    answer = await user.rest.raw("POST", "/v1/sessions/s2:end", {})
    assert answer.status_code == httpx.codes.NOT_FOUND
