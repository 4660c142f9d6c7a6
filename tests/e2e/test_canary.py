"""What a user said is found nowhere once everything that held it is deleted.

Looked through are all tables, keys, objects with their versions, and logs of a real mesh whose
services log at debug level. What the same look finds before shows that it can find.
"""

from __future__ import annotations

import hashlib
import random
import re
import string
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.maintenance.v1 import maintenance_pb2_grpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from local.fleet import MASTER_KEY
from local.mesh import Mesh
from local.postgres import APPLICATION, SUPERUSER, SYSTEM
from server.cache import open_cache
from server.clock import utc_now
from server.database import Database, SystemDatabase, open_pool
from server.kms.local import LocalKms
from tests.conftest import Serve, as_worker, open_bucket
from tests.e2e.canary import Haystack, fingerprints, word
from tests.maintenance import maintenance_service
from tests.mesh import PASSWORD, User, eventually
from tests.transports import Grpc, Refused, Rest
from workers.housekeeping import Housekeeping
from workers.promotion import Promoting
from workers.stream import Task

HOUR: Final = timedelta(hours=1)
DAY: Final = timedelta(days=1)
SHORT, LONG, PERMANENT = pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT
CONSENT: Final = users.RecordConsentRequest(
    purpose=users.CONSENT_PURPOSE_MEMORY_SENSITIVE, granted=True
)
NEIGHBOUR: Final = "nothing to see"


@dataclass(frozen=True, slots=True)
class House:
    """The stores of the mesh, for what its schedules do and its API does not."""

    owner: asyncpg.Connection
    maintenance: grpc.aio.Channel
    """To a service for which it is a day later."""

    async def keep(self) -> None:
        """Do what the schedules of a day do."""
        keeping = Housekeeping(self.maintenance, metadata=as_worker())
        promoting = Promoting(self.maintenance, metadata=as_worker())
        for work in (keeping.sweep_memories, keeping.sweep_attachments, promoting.promote):
            await work(Task(job_id="job", lease_token=1, kind="any", payload={}, attempt=1))

    async def unfinished_jobs(self) -> int:
        """Return how many jobs wait or run."""
        count: int = await self.owner.fetchval(
            "SELECT count(*) FROM jobs WHERE state IN ('waiting', 'running') AND run_at <= now()"
        )
        return count


@pytest_asyncio.fixture
async def house(mesh: Mesh, serve: Serve) -> AsyncIterator[House]:
    stores = mesh.stores
    owner = await asyncpg.connect(stores.dsn(SUPERUSER))
    redis = open_cache(stores.valkey.url)
    application, system = [
        await open_pool(stores.dsn(role), size=2, name="test") for role in (APPLICATION, SYSTEM)
    ]
    blobs = open_bucket(stores)
    kms = LocalKms(stores.secrets.path(MASTER_KEY))

    def tomorrow() -> datetime:
        return utc_now() + DAY

    database = Database(application)
    service = maintenance_service(database, SystemDatabase(system), kms, blobs, redis, tomorrow)
    channel = await serve(
        lambda server: maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(
            service, server
        )
    )
    yield House(owner, channel)
    await redis.aclose()
    for pool in (application, system):
        await pool.close()
    await owner.close()


class Canary:
    """A user who says one word wherever the API takes text, and in the end takes all of it back."""

    def __init__(self, user: User, house: House) -> None:
        self.word = "".join(random.choices(string.ascii_lowercase, k=16))
        self.said: set[str] = set()
        self._user = user
        self._call = user.grpc
        self._house = house

    @property
    def heard(self) -> re.Pattern[str]:
        """What finds the word."""
        return word(self.word)

    @property
    def fingerprints(self) -> re.Pattern[str]:
        """What finds hashes of what was said: those of few words can be guessed."""
        return fingerprints(self.said)

    def says(self, about: str) -> str:
        """Return a text with the word in it, about something."""
        self.said.add(f"{self.word} {about}")
        return f"{self.word} {about}"

    async def sing(self) -> None:
        """Say it in memories of all tiers, in files, in questions, and in what is refused."""
        await self._memories()
        await self._goals()
        await self._conversation()
        await self._files()
        await self._import()
        await self._questions()
        await self._refusals()
        await self._jobs()

    async def _memories(self) -> None:
        for tier in (SHORT, LONG, PERMANENT):
            memory = await self._create(tier, f"content {tier}")
            for path, value in {
                "content": self.says(f"changed {tier}"),
                "tags": [self.says(f"new tag {tier}")],
                "speaker": self.says(f"new speaker {tier}"),
                "channels": [self.says(f"new channel {tier}")],
            }.items():
                await self._change(memory, path, value)
        archived = await self._create(LONG, "archived")
        await self._call(pb.ArchiveMemoryRequest(id=archived.id))
        late = await self._create(LONG, "deleted later")
        await self._call(pb.DeleteMemoryRequest(id=late.id, grace=Duration(seconds=3600)))
        await self._call(CONSENT)
        memory = pb.Memory(content=self.says("secret"), sensitive=True)
        await self._call(pb.CreateMemoryRequest(memory=memory, request_id="create secret"))
        marked = await self._create(LONG, "marked")
        await self._change(marked, "sensitive", value=True)
        moved = await self._create(SHORT, "moved")
        await self._change(moved, "tier", LONG)
        for position, content in enumerate((self.says("beside"), NEIGHBOUR)):
            turn = pb.Memory(content=content, session_id="walk", session_position=position)
            await self._call(pb.CreateMemoryRequest(memory=turn))

    async def _create(self, tier: pb.Tier.ValueType, about: str) -> pb.Memory:
        memory = pb.Memory(
            tier=tier,
            content=self.says(about),
            tags=[self.says(f"tag of {about}")],
            channels=[self.says(f"channel of {about}")],
            speaker=self.says(f"speaker of {about}"),
            session_id=self.says(f"session of {about}"),
            session_position=1,
        )
        request = pb.CreateMemoryRequest(memory=memory, request_id=f"create {about}")
        created: pb.Memory = (await self._call(request)).memory
        return created

    async def _change(self, memory: pb.Memory, path: str, value: object) -> None:
        changed = pb.Memory(id=memory.id, **{path: value})  # type: ignore[arg-type]
        mask = FieldMask(paths=[path])
        await self._call(pb.UpdateMemoryRequest(memory=changed, update_mask=mask))

    async def _conversation(self) -> None:
        for session, keep in (("dropped", pb.SESSION_KEEP_NONE), ("kept", pb.SESSION_KEEP_ALL)):
            await self.talk(session)
            await self.end(session, keep)
        await self.talk("unfinished")

    async def talk(self, session_id: str) -> None:
        turns = [
            pb.SessionTurn(
                content=self.says(f"turn {n} of {session_id}"),
                speaker=self.says("turn speaker"),
                tags=[self.says("turn tag")],
                channels=[self.says("turn channel")],
            )
            for n in range(3)
        ]
        request = pb.AppendToSessionRequest(session_id=session_id, turns=turns)
        request.request_id = f"append {len(self.said)}"
        await self._call(request)

    async def end(self, session_id: str, keep: pb.SessionKeep.ValueType) -> None:
        """End a conversation and have it written down."""
        await self._call(
            pb.EndSessionRequest(session_id=session_id, keep=keep, write_transcript=True)
        )

    async def _files(self) -> None:
        kept = await self._create(LONG, "with files")
        for about in ("file", "deleted file"):
            data = self.says(f"bytes of {about}").encode()
            announced = await self._call(
                pb.CreateAttachmentRequest(
                    memory_id=kept.id,
                    file_name=self.says(f"name of {about}"),
                    content_type="text/plain",
                    size_bytes=len(data),
                    sha256=hashlib.sha256(data).hexdigest(),
                    request_id=f"attach {about}",
                )
            )
            async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
                for _ in range(2):  # two versions
                    (await http.put(announced.upload_url, content=data)).raise_for_status()
            await self._call(pb.CompleteAttachmentRequest(id=announced.attachment.id))
        await self._call(pb.DeleteAttachmentRequest(id=announced.attachment.id))

    async def _import(self) -> None:
        memories = [
            pb.Memory(content=self.says(f"import {n}"), tags=[self.says("import tag")])
            for n in range(3)
        ]
        await self._call(pb.ImportMemoriesRequest(memories=memories, request_id="import"))

    async def _goals(self) -> None:
        goal = pb.Goal(content=self.says("goal"))
        made = await self._call(pb.CreateGoalRequest(goal=goal, request_id="goal"))
        goal = pb.Goal(id=made.goal.id, content=self.says("goal changed"))
        mask = FieldMask(paths=["content"])
        await self._call(pb.UpdateGoalRequest(goal=goal, update_mask=mask))

    async def _questions(self) -> None:
        for transport in self._user.transports.values():
            for _ in range(2):
                request = pb.QueryMemoriesRequest(query=self.word, top_k=20)
                assert (await transport(request)).matches
            await transport(pb.ListMemoriesRequest(tags=[self.says("new tag 2")]))
            await transport(pb.ListMemoriesRequest(session_id=self.says("session of content 2")))
            await transport(pb.GetTranscriptRequest(session_id="kept"))

    async def _refusals(self) -> None:
        """Be refused by the API, by the database and by the edge: errors are logged."""
        one, other = [await self._at_one_place(n) for n in range(2)]
        for transport in self._user.transports.values():
            with pytest.raises(Refused) as refused:
                await transport(
                    pb.UpdateMemoryRequest(
                        memory=pb.Memory(id=one.id, content=other.content),
                        update_mask=FieldMask(paths=["content"]),
                    )
                )
            assert refused.value.refusal.code is grpc.StatusCode.ALREADY_EXISTS
            for wrong in (
                pb.Memory(content=self.says("nul") + "\0"),
                pb.Memory(content="x", tags=[self.says("long " * 30)]),
                pb.Memory(content=self.says("far"), session_position=-1),
                pb.Memory(content="x", session_id=self.says("endless " * 30)),
            ):
                with pytest.raises(Refused):
                    await transport(pb.CreateMemoryRequest(memory=wrong))
            with pytest.raises(Refused):
                await transport(pb.DeleteTranscriptRequest(session_id=self.says("no walk")))
        for path in (
            f"/v1/{self.word}",
            f"/v1/memories/{self.word}",
            f"/v1/memories?{self.word}=1",
        ):
            await self._user.rest.raw("GET", path)
        await self._user.rest.raw("POST", "/v1/memories", json={self.word: self.word})

    async def _at_one_place(self, number: int) -> pb.Memory:
        memory = pb.Memory(content=self.says(f"same place {number}"), session_id=self.says("place"))
        created: pb.Memory = (await self._call(pb.CreateMemoryRequest(memory=memory))).memory
        return created

    async def _jobs(self) -> None:
        """Have everything scored and read anew, and wait for it."""
        settings = users.Settings(language=users.LANGUAGE_FRENCH)
        mask = FieldMask(paths=["language"])
        await self._call(users.UpdateSettingsRequest(settings=settings, update_mask=mask))
        await self._call(pb.MeditateRequest())
        await eventually(self._house.unfinished_jobs, lambda left: not left)

    async def fall_silent(self) -> None:
        """Delete everything that the API lets a user delete, and wait for the schedules."""
        await self.end("unfinished", pb.SESSION_KEEP_NONE)
        for session in ("dropped", "kept", "unfinished"):
            await self._call(pb.DeleteTranscriptRequest(session_id=session))
        for memory in await self._there():
            if memory.content not in (NEIGHBOUR, self.says("deleted later")):
                await self._call(pb.DeleteMemoryRequest(id=memory.id))
        for goal in (await self._call(pb.ListGoalsRequest())).goals:
            await self._call(pb.DeleteGoalRequest(id=goal.id))
        await self._house.keep()
        assert [memory.content for memory in await self._there()] == [NEIGHBOUR]
        for transport in self._user.transports.values():
            # Those who stood beside it do not remember it either.
            assert not (await transport(pb.QueryMemoriesRequest(query=self.word))).matches

    async def _there(self) -> list[pb.Memory]:
        states = pb.MEMORY_STATE_ACTIVE, pb.MEMORY_STATE_ARCHIVED
        requests = [pb.ListMemoriesRequest(state=state, page_size=100) for state in states]
        return [memory for each in requests for memory in (await self._call(each)).memories]


@pytest.mark.timeout(180)
async def test_what_was_said_is_found_nowhere_once_it_is_deleted(
    mesh: Mesh, user: User, house: House
) -> None:
    haystack, canary = Haystack(mesh), Canary(user, house)
    await canary.sing()
    before = {(store, place.split(":")[0]) for store, place in await haystack.find(canary.heard)}
    assert before == {
        *(("postgres", table) for table in ("memories", "memory_versions", "attachments", "goals")),
        *(("valkey", key) for key in ("short", "past", "answers")),
        *(("s3", kind) for kind in ("attachments", "transcripts")),
    }
    calls = await haystack.find(re.compile(r"MemoryService/QueryMemories"))
    assert ("logs", "memory.log") in calls
    hashes = await haystack.find(canary.fingerprints)
    assert {("postgres", "memories"), ("postgres", "attachments")} <= hashes.keys()
    await canary.fall_silent()
    assert await haystack.find(canary.heard) == {}
    left = await haystack.find(canary.fingerprints)
    # How far a conversation came goes by itself, within the longest life of a short-term memory.
    assert {place for place in left if not place[1].startswith("session:")} == set()


async def test_what_a_conversation_was_called_is_not_kept_for_ever(
    mesh: Mesh, user: User, house: House
) -> None:
    haystack, canary = Haystack(mesh), Canary(user, house)
    name = canary.says("walk")
    await canary.talk(name)
    await canary.end(name, pb.SESSION_KEEP_NONE)
    await user.grpc(pb.DeleteTranscriptRequest(session_id=name))
    assert ("postgres", "ended_sessions") in await haystack.find(canary.heard)
    await house.owner.execute("UPDATE ended_sessions SET ended_at = ended_at - interval '9 days'")
    await house.keep()
    assert await haystack.find(canary.heard) == {}


@pytest.mark.timeout(180)
async def test_whoever_is_erased_is_found_nowhere_but_in_the_audit_log(
    mesh: Mesh, user: User, house: House
) -> None:
    haystack, canary = Haystack(mesh), Canary(user, house)
    await canary.sing()
    assert {store for store, _ in await haystack.find(canary.heard)} == {"postgres", "valkey", "s3"}
    asked = privacy.CreateErasureRequest(password=PASSWORD)
    wrong = privacy.CreateErasureRequest(password=f"not {PASSWORD}")
    for transport in user.transports.values():
        with pytest.raises(Refused) as refused:
            await transport(wrong)
        assert refused.value.refusal.reason == "PROOF_INVALID"
    erasures = [(await transport(asked)).erasure for transport in user.transports.values()]
    assert erasures[0].id == erasures[1].id

    async def refusal() -> str:
        try:
            await user.grpc(pb.ListMemoriesRequest())
        except Refused as error:
            return error.refusal.reason
        return ""

    assert await eventually(refusal, bool, seconds=30) == "ACCOUNT_ERASED"
    with pytest.raises(Refused):
        await user.grpc(auth.RefreshTokenRequest(refresh_token=user.tokens.refresh_token))
    stranger = Rest(user.rest.http, ""), Grpc(user.grpc.channel)

    async def look() -> privacy.Erasure:
        request = privacy.GetErasureReceiptRequest(receipt_id=erasures[0].receipt_id)
        one, other = [(await transport(request)).erasure for transport in stranger]
        assert (one.id, one.user_id) == (other.id, other.user_id)
        later: privacy.Erasure = other
        return later

    # Not before whatever was under way has ended.
    told = await eventually(
        look, lambda erasure: erasure.state == privacy.ERASURE_STATE_ERASED, seconds=90
    )
    assert told.receipt
    assert await haystack.find(canary.heard) == {}
    assert await haystack.find(canary.fingerprints) == {}
    assert await haystack.find(word(user.email)) == {}
    found = await haystack.find(re.compile(user.id.removeprefix("usr_") + "|" + dashed(user.id)))
    # Statistics of statements go by themselves; they hold ids, since SET takes no parameters.
    passing = {("postgres", "pg_stat_statements"), ("postgres", "pg_stat_activity")}
    named = {place for place in found if place[0] != "logs"} - passing
    # That there was somebody of this id is told by nothing but these.
    assert named == {
        *(("postgres", table) for table in ("audit_events", "erasures", "jobs")),
        ("s3", "erasures"),
    }


def dashed(user_id: str) -> str:
    """Return how Postgres writes the id of a user."""
    return str(UUID(user_id.removeprefix("usr_")))
