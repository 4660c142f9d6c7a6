"""Everything that the API shows a user of theirs is in their export, and nothing of others."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from typing import Any, Final

import grpc
import httpx
import pytest
from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from tests.mesh import User, eventually, sign_up
from tests.transports import Refused

FILE: Final = b"the bytes of a file"


async def live(user: User) -> None:
    """Leave something in every corner."""
    call = user.grpc
    for purpose in (
        users.CONSENT_PURPOSE_MEMORY_SENSITIVE,
        users.CONSENT_PURPOSE_MEMORY_EMBED,
    ):
        await call(users.RecordConsentRequest(purpose=purpose, granted=True))
    for granted in (True, False):
        await call(
            users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=granted)
        )
    for tier in (pb.TIER_SHORT_TERM, pb.TIER_LONG_TERM, pb.TIER_PERMANENT):
        memory = pb.Memory(tier=tier, content=f"first words of {tier}", tags=["old"])
        made = (await call(pb.CreateMemoryRequest(memory=memory))).memory
        for words in ("second", "third"):
            changed = pb.Memory(id=made.id, content=f"{words} words of {tier}")
            mask = FieldMask(paths=["content"])
            await call(pb.UpdateMemoryRequest(memory=changed, update_mask=mask))
    secret = pb.Memory(content="a secret", sensitive=True)
    secret = (await call(pb.CreateMemoryRequest(memory=secret))).memory
    opened = pb.Memory(id=secret.id, content="another secret")
    mask = FieldMask(paths=["content"])
    await call(pb.UpdateMemoryRequest(memory=opened, update_mask=mask))
    kept = (await call(pb.CreateMemoryRequest(memory=pb.Memory(content="put away")))).memory
    await call(pb.ArchiveMemoryRequest(id=kept.id))
    turns = [pb.SessionTurn(content=f"turn {n}", speaker="Ann") for n in range(3)]
    await call(pb.AppendToSessionRequest(session_id="a walk", turns=turns))
    await call(pb.EndSessionRequest(session_id="a walk", write_transcript=True))
    announced = await call(
        pb.CreateAttachmentRequest(
            memory_id=kept.id,
            file_name="../../a name.txt",
            content_type="text/plain",
            size_bytes=len(FILE),
            sha256=hashlib.sha256(FILE).hexdigest(),
        )
    )
    async with httpx.AsyncClient(trust_env=False, timeout=60) as s3:
        (await s3.put(announced.upload_url, content=FILE)).raise_for_status()
    await call(pb.CompleteAttachmentRequest(id=announced.attachment.id))
    settings = users.Settings(language=users.LANGUAGE_GERMAN)
    mask = FieldMask(paths=["language"])
    await call(users.UpdateSettingsRequest(settings=settings, update_mask=mask))


async def exported(user: User) -> dict[str, bytes]:
    """Have an export made, and return its files."""
    asked = (await user.rest(privacy.CreateExportRequest(request_id="mine"))).export

    async def look() -> Any:
        return await user.grpc(privacy.GetExportRequest(id=asked.id))

    ready = await eventually(
        look, lambda told: told.export.state == privacy.EXPORT_STATE_READY, seconds=60
    )
    async with httpx.AsyncClient(trust_env=False, timeout=60) as s3:
        data = (await s3.get(ready.download_url)).raise_for_status().content
    assert hashlib.sha256(data).hexdigest() == ready.export.sha256
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def told(message: Message) -> dict[str, Any]:
    """Return a memory as JSON, without what reading it changes."""
    shown = json_format.MessageToDict(message)
    return {name: shown[name] for name in shown if name not in {"lastSeeTime", "useCount"}}


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.timeout(180)
async def test_an_export_holds_all_that_the_api_shows_and_the_same(
    user: User, http: httpx.AsyncClient, channel: grpc.aio.Channel
) -> None:
    other = await sign_up(http, channel)
    await live(user)
    await live(other)
    shown: list[Message] = []
    async for part in user.grpc.stream(pb.ExportMemoriesRequest()):
        if part.HasField("memory"):
            versions = pb.ListMemoryVersionsRequest(id=part.memory.id)
            past = (await user.grpc(versions)).versions[1:]
            shown += [part.memory, *past]
    files = await exported(user)
    memories = [
        {name: line[name] for name in line if name not in {"lastSeeTime", "useCount"}}
        for line in lines(files["memories.jsonl"])
    ]
    assert memories == [told(memory) for memory in shown]
    assert {"a secret", "another secret", "first words of 1"} <= {
        memory["content"] for memory in memories
    }
    (transcript,) = lines(files["transcripts.jsonl"])
    answer = await user.grpc(pb.GetTranscriptRequest(session_id="a walk"))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as s3:
        said = (await s3.get(answer.download_url)).raise_for_status().content
    assert files[f"transcripts/{transcript['id']}"] == said
    (attachment,) = lines(files["attachments.jsonl"])
    assert files[f"attachments/{attachment['id']}"] == FILE
    # Names in the archive are ours: the user's would lead anywhere.
    assert not any(".." in name for name in files)
    consents = lines(files["consents.jsonl"])
    assert [each["granted"] for each in consents if each["purpose"] == "memory.embed"] == [
        True,
        True,
        False,
    ]
    (settings,) = lines(files["settings.jsonl"])
    (profile,) = lines(files["users.jsonl"])
    assert (settings["language"], profile["email"], profile["id"]) == (
        "german",
        user.email,
        user.id,
    )
    events = (await user.grpc(users.ListAuditEventsRequest(page_size=1000))).events
    told_of = {event["id"] for event in lines(files["audit_events.jsonl"])}
    assert told_of <= {event.id for event in events}
    assert len(told_of) >= len(events) - 5
    everything = b"".join(files.values()).decode()
    assert other.id.removeprefix("usr_") not in everything
    with pytest.raises(Refused):
        await other.grpc(privacy.GetExportRequest(id=lines(files["exports.jsonl"])[0]["id"]))
