"""What one user asks for, one thing after the other, each until it is known what became of it.

A create, an append and an import are repeated under their request ids. A change that has an etag
may be refused for it after an answer was lost: then what is there tells whether it was made.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import grpc
import httpx
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server.caller import Caller
from tests.conftest import bearer
from tests.crashes.victim import Victim

T = TypeVar("T")

PART: Final = 16 * 1024 * 1024
LARGE: Final = PART + 1
"""One byte more than what is uploaded in one piece."""

_KNOWN_SECONDS: Final = 60.0
_AGAIN_SECONDS: Final = 0.02
_CALL_SECONDS: Final = 6.0
_UNKNOWN: Final = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""After these nobody knows whether it happened."""


class Story:
    """The calls of one user, who takes no lost answer for an answer."""

    def __init__(self, victim: Victim, caller: Caller) -> None:
        self.names: dict[str, str] = {}
        """What this story calls a resource, by its id."""
        self.calls = 0
        self._victim = victim
        self._metadata = bearer(caller)
        self._stub: Any = rpc.MemoryServiceStub(victim.channel)
        self._memories: dict[str, pb.Memory] = {}
        self._attachments: dict[str, pb.CreateAttachmentResponse] = {}

    async def tell(self) -> None:
        """Live through everything that a memory can."""
        await self._durable()
        await self._short_term()
        await self._conversation()
        await self._imports()
        await self._files()

    async def _durable(self) -> None:
        await self.create("tide", pb.TIER_LONG_TERM, tags=["sea"], protected=True)
        await self.create("kelp", pb.TIER_PERMANENT)
        await self.create("gull", pb.TIER_LONG_TERM, session_id="bay", session_position=3)
        await self.change("tide", content="tide, ebbing", tags=["moon"])
        await self.change("kelp", tier=pb.TIER_LONG_TERM)
        await self.change("tide", tier=pb.TIER_PERMANENT)
        await self.archive("gull")
        await self.restore("gull")
        await self.protect("kelp", protected=True)
        await self.rate("kelp")
        await self.archive("kelp")
        await self.create("ferry", pb.TIER_PERMANENT)
        await self.delete("ferry")
        await self.create("wreck", pb.TIER_PERMANENT, sensitive=True)
        await self.change("wreck", content="wreck, sunken")
        await self.change("gull", sensitive=True)

    async def _short_term(self) -> None:
        await self.create("felt", pb.TIER_SHORT_TERM, tags=["craft"])
        await self.create("mast", pb.TIER_SHORT_TERM)
        await self.create("crate", pb.TIER_SHORT_TERM)
        await self.change("felt", content="felt, grey")
        await self.rate("felt")
        await self.change("mast", tier=pb.TIER_LONG_TERM)
        await self.delete("crate")

    async def _conversation(self) -> None:
        await self.append("walk", "birch", "larch")
        await self.append("walk", "elder")
        await self.append("talk", "alder")
        await self.end("walk", pb.SESSION_KEEP_ALL, write_transcript=True)
        await self.end("talk", pb.SESSION_KEEP_NONE, write_transcript=True)
        await self.burn("talk")

    async def _imports(self) -> None:
        await self.create_all(pb.TIER_LONG_TERM, "heron", "stork")
        await self.bring("boxes", ["oak", "ash", "elm"], ["fir", "yew"])

    async def _files(self) -> None:
        await self.attach("note", "tide", b"a note")
        await self.attach("sketch", "gull", b"a sketch")
        await self.forget("sketch")
        await self.attach("film", "tide", b"film" * (LARGE // 4 + 1))
        await self.attach("reel", "gull", b"reel" * (LARGE // 4 + 1), upload=False)
        await self.create("harbour", pb.TIER_LONG_TERM)
        await self.attach("map", "harbour", b"a map")
        await self.attach("tape", "harbour", b"tape" * (LARGE // 4 + 1), upload=False)
        await self.delete("harbour")

    # --- memories

    async def create(self, name: str, tier: pb.Tier.ValueType, **fields: Any) -> None:
        """Create a memory of that content, by a request id of that name."""
        memory = pb.Memory(content=name, tier=tier, **fields)
        request = pb.CreateMemoryRequest(memory=memory, request_id=f"create {name}")
        self._note(name, (await self._known(self._stub.CreateMemory, request)).memory)

    async def change(self, name: str, **fields: Any) -> None:
        """Change a memory."""
        known = self._memories[name]
        request = pb.UpdateMemoryRequest(
            memory=pb.Memory(id=known.id, etag=known.etag, **fields),
            update_mask=FieldMask(paths=list(fields)),
        )

        def is_made(memory: pb.Memory) -> bool:
            return all(getattr(memory, field) == value for field, value in fields.items())

        await self._changed(name, self._stub.UpdateMemory, request, is_made)

    async def archive(self, name: str) -> None:
        """Put a memory away."""
        known = self._memories[name]
        request = pb.ArchiveMemoryRequest(id=known.id, etag=known.etag)
        await self._changed(
            name,
            self._stub.ArchiveMemory,
            request,
            lambda memory: memory.state == pb.MEMORY_STATE_ARCHIVED,
        )

    async def restore(self, name: str) -> None:
        """Bring a memory back."""
        known = self._memories[name]
        request = pb.RestoreMemoryRequest(id=known.id, etag=known.etag)
        await self._changed(
            name,
            self._stub.RestoreMemory,
            request,
            lambda memory: memory.state == pb.MEMORY_STATE_ACTIVE,
        )

    async def protect(self, name: str, *, protected: bool) -> None:
        """Protect a memory, or no longer do."""
        known = self._memories[name]
        request = pb.ProtectMemoryRequest(id=known.id, etag=known.etag, protected=protected)
        await self._changed(
            name,
            self._stub.ProtectMemory,
            request,
            lambda memory: memory.protected == protected,
        )

    async def rate(self, name: str) -> None:
        """Say that a memory is worth something: as often as one likes, it says the same."""
        request = pb.GiveFeedbackRequest(id=self._memories[name].id, thumbs_up=True)
        self._note(name, (await self._known(self._stub.GiveFeedback, request)).memory)

    async def delete(self, name: str) -> None:
        """Delete a memory for good."""
        request = pb.DeleteMemoryRequest(id=self._memories[name].id)
        await self._gone(self._stub.DeleteMemory, request)

    # --- many at once

    async def append(self, session_id: str, *contents: str) -> None:
        """Say something."""
        turns = [pb.SessionTurn(content=content, speaker="Ann") for content in contents]
        request = pb.AppendToSessionRequest(
            session_id=session_id, turns=turns, request_id=f"append {contents[0]}"
        )
        answer = await self._known(self._stub.AppendToSession, request)
        for content, memory in zip(contents, answer.memories, strict=True):
            self._note(content, memory)

    async def end(
        self, session_id: str, keep: pb.SessionKeep.ValueType, *, write_transcript: bool
    ) -> None:
        """End a conversation."""
        request = pb.EndSessionRequest(
            session_id=session_id, keep=keep, write_transcript=write_transcript
        )
        await self._known(self._stub.EndSession, request)

    async def burn(self, session_id: str) -> None:
        """Delete the transcript of a conversation."""
        request = pb.DeleteTranscriptRequest(session_id=session_id)
        await self._gone(self._stub.DeleteTranscript, request)

    async def create_all(self, tier: pb.Tier.ValueType, *contents: str) -> None:
        """Create memories, all or none."""
        request = pb.BatchCreateMemoriesRequest(
            memories=[pb.Memory(content=content, tier=tier) for content in contents],
            request_id=f"create {contents[0]}",
        )
        answer = await self._known(self._stub.BatchCreateMemories, request)
        for content, result in zip(contents, answer.results, strict=True):
            self._note(content, result.memory)

    async def bring(self, request_id: str, *chunks: list[str]) -> None:
        """Import memories."""

        async def requests() -> AsyncIterator[pb.ImportMemoriesRequest]:
            first = 0
            for contents in chunks:
                yield pb.ImportMemoriesRequest(
                    first_index=first,
                    memories=[pb.Memory(content=content) for content in contents],
                    request_id=request_id,
                )
                first += len(contents)

        def send(_: None, **options: Any) -> Awaitable[pb.ImportMemoriesResponse]:
            return self._stub.ImportMemories(requests(), **options)  # type: ignore[no-any-return]

        answer = await self._known(send, None)
        assert answer.next_index == sum(map(len, chunks)), answer

    # --- files

    async def attach(self, name: str, memory: str, data: bytes, *, upload: bool = True) -> None:
        """Announce a file, and have it uploaded and checked."""
        request = pb.CreateAttachmentRequest(
            memory_id=self._memories[memory].id,
            file_name=name,
            content_type="text/plain",
            size_bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            request_id=f"attach {name}",
        )
        announced = await self._known(self._stub.CreateAttachment, request)
        self.names[announced.attachment.id] = name
        self._attachments[name] = announced
        if upload:
            await _upload(announced, data)
            done = pb.CompleteAttachmentRequest(id=announced.attachment.id)
            await self._known(self._stub.CompleteAttachment, done)

    async def forget(self, name: str) -> None:
        """Delete a file."""
        request = pb.DeleteAttachmentRequest(id=self._attachments[name].attachment.id)
        await self._gone(self._stub.DeleteAttachment, request)

    # --- until it is known

    def _note(self, name: str, memory: pb.Memory) -> None:
        self._memories[name] = memory
        self.names[memory.id] = name

    async def _changed(
        self,
        name: str,
        method: Callable[..., Awaitable[Any]],
        request: Any,
        is_made: Callable[[pb.Memory], bool],
    ) -> None:
        """Make a change; if the etag is old because it is made already, take what is there."""
        tries = self.calls
        try:
            memory = (await self._known(method, request)).memory
        except grpc.aio.AioRpcError as refusal:
            if refusal.code() is not grpc.StatusCode.ABORTED or self.calls - tries < 2:
                raise
            asked = pb.GetMemoryRequest(id=self._memories[name].id)
            memory = (await self._known(self._stub.GetMemory, asked)).memory
            if not is_made(memory):
                raise
        self._note(name, memory)

    async def _gone(self, method: Callable[..., Awaitable[Any]], request: Any) -> None:
        """Delete something; at a second try it may be gone already."""
        tries = self.calls
        try:
            await self._known(method, request)
        except grpc.aio.AioRpcError as refusal:
            if refusal.code() is not grpc.StatusCode.NOT_FOUND or self.calls - tries < 2:
                raise

    async def _known(self, method: Callable[..., Awaitable[T]], request: Any) -> T:
        """Call until there is an answer or a refusal."""
        deadline = time.monotonic() + _KNOWN_SECONDS
        while True:
            self.calls += 1
            try:
                return await method(request, metadata=self._metadata, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _UNKNOWN or time.monotonic() > deadline:
                    raise
            if not await self._victim.revive():
                await asyncio.sleep(_AGAIN_SECONDS)


async def _upload(announced: pb.CreateAttachmentResponse, data: bytes) -> None:
    places = [(part.upload_url, (part.number - 1) * PART) for part in announced.parts]
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for url, start in places or [(announced.upload_url, 0)]:
            if url:
                (await http.put(url, content=data[start : start + PART])).raise_for_status()
