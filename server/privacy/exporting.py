"""Writing an export: everything that is kept of a user, into one archive.

The order is that of importance; the manifest comes last, since it has the digests of all others.
Nothing is held but a page of rows and a part of the archive, however much a user has.
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Final, Protocol
from uuid import UUID

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from server import ids
from server.blobs import Blobs
from server.caller import Caller
from server.errors import NotFound
from server.privacy.dumping import DUMPS, Dumper
from server.privacy.export_store import ExportStore
from server.privacy.exports import Export, ExportState, object_key
from server.privacy.zipping import ZipUpload, zip_upload

FORMAT: Final = 1
"""Raised when what is in an archive changes its meaning."""

_CHUNK_BYTES: Final = 256 * 1024


class MemoryReader(Protocol):
    """Reads memories of one user, whichever slice keeps them."""

    def memories(self, caller: Caller) -> AsyncGenerator[Any, None]:
        """Yield every memory as a message, archived ones too."""

    def past(self, caller: Caller, memory: Any) -> AsyncIterator[Any]:
        """Yield what a memory was before."""


class UserExporter:
    """Writes exports, and removes them."""

    def __init__(
        self, store: ExportStore, dumper: Dumper, memories: MemoryReader, blobs: Blobs
    ) -> None:
        self._store = store
        self._dumper = dumper
        self._memories = memories
        self._blobs = blobs

    async def write(self, caller: Caller, export_id: UUID) -> AsyncGenerator[int, None]:
        """Write an export, and yield how many bytes were written so far; once ready, none.

        Raises:
            NotFound: There is no such export of the user.
            ContentUnreadable: Something sealed does not open.
            StoreUnavailable: A store does not answer.
        """
        export = await self._store.get(caller, export_id)
        if export.state is ExportState.READY:
            return
        async with zip_upload(self._blobs, object_key(caller, export_id)) as archive:
            for name, chunks in self._files(caller):
                async for written in archive.add(name, chunks):
                    yield written
            async for written in self._bytes(caller, archive):
                yield written
            async for written in archive.add("manifest.json", _manifest(caller, export, archive)):
                yield written
            done = await archive.finish()
        await self._store.finish(caller, export_id, done)

    async def expire(self, caller: Caller, export_id: UUID) -> bool:
        """Remove an export whose time is over, and tell whether it is gone.

        Raises:
            StoreUnavailable: A store does not answer.
        """
        try:
            if not await self._store.is_expired(caller, export_id):
                return False
        except NotFound:
            return True
        await self._blobs.erase(object_key(caller, export_id))
        await self._store.remove(caller, export_id)
        return True

    def _files(self, caller: Caller) -> list[tuple[str, AsyncIterator[bytes]]]:
        return [
            ("memories.jsonl", self._memory_lines(caller)),
            *((f"{table}.jsonl", self._dumper.lines(caller, table)) for table in DUMPS),
        ]

    async def _memory_lines(self, caller: Caller) -> AsyncIterator[bytes]:
        """Yield memories, each with what it was behind it, the newest version first."""
        page = bytearray()
        async with aclosing(self._memories.memories(caller)) as memories:
            async for memory in memories:
                page += _line(memory)
                async for was in self._memories.past(caller, memory):
                    page += _line(was)
                if len(page) >= _CHUNK_BYTES:
                    yield bytes(page)
                    page.clear()
        yield bytes(page)

    async def _bytes(self, caller: Caller, archive: ZipUpload) -> AsyncIterator[int]:
        """Write what was said in conversations, and the files of memories."""
        for table in ("transcripts", "attachments"):
            async for rows in self._dumper.rows(caller, table):
                for row in rows:
                    # What was announced and never came has no bytes.
                    if row.get("state") == "pending":
                        continue
                    digits = row["id"].partition("_")[2]
                    key = f"{table}/{caller.tenant_id.hex}/{caller.user_id.hex}/{digits}"
                    chunks = self._chunks(key, row["version_id"])
                    async for written in archive.add(f"{table}/{row['id']}", chunks):
                        yield written

    async def _chunks(self, key: str, version_id: str | None) -> AsyncIterator[bytes]:
        try:
            async with aclosing(self._blobs.chunks(key, version_id)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except NotFound:  # deleted since it was listed
            return


async def _manifest(caller: Caller, export: Export, archive: ZipUpload) -> AsyncIterator[bytes]:
    told = {
        "format": FORMAT,
        "export": ids.show(ids.EXPORT, export.id),
        "tenant": ids.show(ids.TENANT, caller.tenant_id),
        "user": ids.show(ids.USER, caller.user_id),
        "createTime": export.created_at.isoformat(),
        "files": [
            {"name": file.name, "sizeBytes": file.size_bytes, "sha256": file.sha256}
            for file in archive.files
        ],
    }
    yield json.dumps(told, indent=1).encode()


def _line(message: Message) -> bytes:
    told = MessageToDict(message)
    return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
