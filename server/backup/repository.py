"""The bucket of backups.

    backups/ID/STREAM/NUMBER    the parts of a stream, most of them sealed
    backups/ID/manifest.sig     who has signed the manifest, written before it
    backups/ID/manifest.json    written last
    objects/SHA256/NUMBERofN    what attachments and transcripts hold, sealed, once for all backups
    erasures/…                  whom no backup may bring back; see `server.privacy.words`
    withdrawals/…               what no backup may allow again; see `server.users.withdrawals`

Nothing is read or written but a part at a time, whatever a backup's size.
"""

import asyncio
import hashlib
import heapq
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Final

import structlog

from server.backup.manifest import Manifest, ManifestUnreadable, Part, digest
from server.backup.sealing import KeyRefused, Sealer, Unsealer
from server.backup.signing import Signer, Signers, Unsigned
from server.blobs import Blobs
from server.errors import NotFound, StoreUnavailable

log = structlog.get_logger()

PART_BYTES: Final = 32 * 1024 * 1024
"""Before it is sealed."""
_OPEN_PART_BYTES: Final = 1024 * 1024
"""Of a stream that is not sealed: those of all backups are read at once."""
REFERENCES: Final = "references"
"""The stream that names the objects of a backup, one digest a line, in order. Not sealed: who
removes what no backup refers to any more holds no key."""

_BACKUPS: Final = "backups/"
_OBJECTS: Final = "objects/"
_MANIFEST: Final = "manifest.json"
_SIGNATURE: Final = "manifest.sig"
_LONGEST_SIGNATURE: Final = 1024
_LONGEST_MANIFEST: Final = 64 * 1024 * 1024
_TYPE: Final = "application/octet-stream"
_OBJECT_PART: Final = re.compile(r"objects/([0-9a-f]{64})/(\d{6})of(\d{6})\Z")
_PAUSES_SECONDS: Final = (0.5, 2, 8, 30)
"""Between the tries of one part: a backup of an hour does not end because S3 was restarted."""


class Damaged(Exception):
    """Something in the bucket is missing or has changed. Names it."""


class Repository:
    """Backups in their bucket. Every method raises StoreUnavailable when it does not answer."""

    def __init__(self, blobs: Blobs, *, part_bytes: int = PART_BYTES) -> None:
        self._blobs = blobs
        self._part_bytes = part_bytes

    # --- backups

    async def ids(self) -> list[str]:
        """Return the backups that were finished, the oldest first."""
        finished = [key async for key in self._keys(_BACKUPS) if key.endswith(f"/{_MANIFEST}")]
        return sorted(key.split("/")[1] for key in finished)

    async def manifest(self, backup: str) -> tuple[Manifest, bytes]:
        """Return what a backup is said to consist of, and the digest that it is known by.

        Raises:
            NotFound: There is no such backup, or it was not finished.
            ManifestUnreadable: It is damaged, or of a newer release.
        """
        return self._decoded(backup, await self._manifest(backup))

    async def signed_manifest(
        self, backup: str, signers: Signers, *, unsigned: bool = False
    ) -> tuple[Manifest, bytes]:
        """Return the same, if it is to be believed.

        Args:
            backup: Its name.
            signers: Whose signature counts.
            unsigned: Take one without a signature as well. One that does not fit never counts.

        Raises:
            NotFound: There is no such backup, or it was not finished.
            ManifestForged: Somebody else has made it.
            ManifestUnreadable: It is of a newer release.
        """
        encoded = await self._manifest(backup)
        key = f"{_BACKUPS}{backup}/{_SIGNATURE}"
        signature = await self._blobs.get_small(key, longest=_LONGEST_SIGNATURE)
        try:
            signers.check(backup, encoded, signature)
        except Unsigned:
            if not unsigned:
                raise
            log.warning("backup not signed", backup=backup)
        return self._decoded(backup, encoded)

    async def _manifest(self, backup: str) -> bytes:
        key = f"{_BACKUPS}{backup}/{_MANIFEST}"
        encoded = await self._blobs.get_small(key, longest=_LONGEST_MANIFEST)
        if encoded is None:
            raise NotFound("backup")
        return encoded

    def _decoded(self, backup: str, encoded: bytes) -> tuple[Manifest, bytes]:
        manifest = Manifest.decode(encoded)
        if manifest.id != backup:
            raise ManifestUnreadable(f"the manifest of {backup} is another backup's")
        return manifest, digest(encoded)

    async def commit(self, manifest: Manifest, signer: Signer) -> bytes:
        """Make a backup of what was written, and return the digest that it is known by."""
        encoded = manifest.encode()
        await self._put(f"{_BACKUPS}{manifest.id}/{_SIGNATURE}", signer.sign(encoded))
        await self._put(f"{_BACKUPS}{manifest.id}/{_MANIFEST}", encoded)
        return digest(encoded)

    async def remove(self, backup: str) -> None:
        """Remove a backup, the manifest first: what is half removed is none."""
        await self._blobs.remove_version(f"{_BACKUPS}{backup}/{_MANIFEST}", None)
        async for key in self._keys(f"{_BACKUPS}{backup}/"):
            await self._blobs.remove_version(key, None)

    async def remove_unfinished(self) -> int:
        """Remove what backups left that ended without a manifest, and return how many these were.

        Only for whoever makes sure that none is being made.
        """
        finished = set(await self.ids())
        unfinished: set[str] = set()
        async for key in self._keys(_BACKUPS):
            backup = key.split("/")[1]
            if backup not in finished:
                unfinished.add(backup)
                await self._blobs.remove_version(key, None)
        return len(unfinished)

    # --- streams

    async def write(
        self, backup: str, stream: str, chunks: AsyncIterable[bytes], sealer: Sealer | None
    ) -> list[Part]:
        """Write a stream in parts, and return them. Without a sealer it stays readable."""
        writer = self.writer(backup, stream, sealer)
        async for chunk in chunks:
            await writer.add(chunk)
        return await writer.close()

    def writer(self, backup: str, stream: str, sealer: Sealer | None) -> "StreamWriter":
        """Return what writes a stream as it comes."""
        size = self._part_bytes if sealer else min(self._part_bytes, _OPEN_PART_BYTES)

        async def put(number: int, plain: bytes) -> Part:
            data = await sealer.seal(plain) if sealer else plain
            await self._put(_part_key(backup, stream, number), data)
            return Part(len(data), hashlib.sha256(data).hexdigest())

        return StreamWriter(put, size)

    async def read(
        self, manifest: Manifest, stream: str, unsealer: Unsealer | None
    ) -> AsyncGenerator[bytes, None]:
        """Yield what a stream holds, part by part.

        Raises:
            Damaged: A part is missing, or is not what was written.
            KeyRefused: The key is not one that it was sealed for.
        """
        for number in range(len(manifest.streams[stream])):
            data = await self._part(manifest, stream, number)
            yield await unsealer.open(data) if unsealer else data

    async def damages(self, manifest: Manifest) -> list[str]:
        """Compare every part of every stream with the manifest, and say what is wrong."""
        found: list[str] = []
        for stream, parts in manifest.streams.items():
            for number in range(len(parts)):
                try:
                    await self._part(manifest, stream, number)
                except Damaged as error:
                    found.append(str(error))
        return found

    async def _part(self, manifest: Manifest, stream: str, number: int) -> bytes:
        part = manifest.streams[stream][number]
        key = _part_key(manifest.id, stream, number)
        data = await self._get(key, longest=part.size_bytes)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise Damaged(f"{key} is not what was written")
        return data

    # --- objects

    async def stored_objects(self) -> AsyncGenerator[str, None]:
        """Yield the digests of the objects that are there as a whole, in order."""
        async for sha256, keys in self._objects():
            if (last := _OBJECT_PART.match(keys[-1])) and int(last[2]) == int(last[3]) - 1:
                yield sha256

    async def write_object(
        self, sha256: str, size_bytes: int, chunks: AsyncIterable[bytes], sealer: Sealer
    ) -> int:
        """Write what an object holds, and return how much that takes.

        Its last part is written last, and only if all of it has this digest.

        Raises:
            Damaged: It is not what the database says.
        """
        count = max(1, -(-size_bytes // self._part_bytes))
        seen, written, number = hashlib.sha256(), 0, 0
        async for plain in _in_parts(chunks, self._part_bytes):
            seen.update(plain)
            is_last = number == count - 1
            if number >= count or (is_last and seen.hexdigest() != sha256):
                break
            data = await sealer.seal(plain)
            await self._put(_object_key(sha256, number, count), data)
            written, number = written + len(data), number + 1
        if number != count or seen.hexdigest() != sha256:
            raise Damaged(f"the object of digest {sha256} holds something else")
        return written

    async def read_object(
        self, sha256: str, size_bytes: int, unsealer: Unsealer
    ) -> AsyncGenerator[bytes, None]:
        """Yield what an object holds, part by part.

        Raises:
            Damaged: A part is missing, or it is not what was written: in the latter case what was
                yielded before is not to be used.
        """
        count = max(1, -(-size_bytes // self._part_bytes))
        seen = hashlib.sha256()
        for number in range(count):
            key = _object_key(sha256, number, count)
            # Sealing adds a header, and 16 bytes to every 64 KiB.
            data = await self._get(key, longest=self._part_bytes + self._part_bytes // 1000 + 9999)
            try:
                plain = await unsealer.open(data)
            except KeyRefused as error:
                raise Damaged(f"{key} is not what was written") from error
            seen.update(plain)
            yield plain
        if seen.hexdigest() != sha256:
            raise Damaged(f"{_OBJECTS}{sha256} is not what was written")

    async def remove_unreferred(self) -> int:
        """Remove the objects that no backup names, and return how many these were."""
        removed = 0
        async with aclosing(self._all_references()) as references:
            wanted = await anext(references, None)
            async for sha256, keys in self._objects():
                while wanted is not None and wanted < sha256:
                    wanted = await anext(references, None)
                if wanted != sha256:
                    removed += 1
                    for key in keys:
                        await self._blobs.remove_version(key, None)
        return removed

    async def _all_references(self) -> AsyncGenerator[str, None]:
        """Yield the digests of all objects of all backups, in order, some of them repeatedly."""
        async with AsyncExitStack() as stack:
            heads: list[tuple[str, int, AsyncGenerator[str, None]]] = []
            for number, backup in enumerate(await self.ids()):
                manifest, _ = await self.manifest(backup)
                lines = await stack.enter_async_context(aclosing(self._references(manifest)))
                if (first := await anext(lines, None)) is not None:
                    heads.append((first, number, lines))
            heapq.heapify(heads)
            while heads:
                sha256, number, lines = heads[0]
                yield sha256
                following = await anext(lines, None)
                if following is None:
                    heapq.heappop(heads)
                else:
                    heapq.heapreplace(heads, (following, number, lines))

    async def _references(self, manifest: Manifest) -> AsyncGenerator[str, None]:
        rest = b""
        async with aclosing(self.read(manifest, REFERENCES, None)) as parts:
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    yield line.decode()

    async def _objects(self) -> AsyncIterator[tuple[str, list[str]]]:
        """Yield the keys of each object, in order."""
        current, keys = "", list[str]()
        async for key in self._keys(_OBJECTS):
            sha256 = key.split("/")[1]
            if sha256 != current and keys:
                yield current, keys
                keys = []
            current = sha256
            keys.append(key)
        if keys:
            yield current, keys

    # --- one key at a time

    async def _keys(self, prefix: str) -> AsyncIterator[str]:
        async with aclosing(self._blobs.pages(prefix)) as pages:
            async for page in pages:
                for key in page:
                    yield key

    async def _get(self, key: str, *, longest: int) -> bytes:
        for pause_seconds in _PAUSES_SECONDS:
            try:
                data = await self._blobs.get_small(key, longest=longest + 1)
            except StoreUnavailable:
                await asyncio.sleep(pause_seconds)
                continue
            if data is None:
                raise Damaged(f"{key} is missing")
            return data
        raise StoreUnavailable("the bucket of backups")

    async def _put(self, key: str, data: bytes) -> None:
        for pause_seconds in _PAUSES_SECONDS:
            try:
                await self._blobs.put(key, data, _TYPE)
            except StoreUnavailable:
                log.warning("part not written; trying again", key=key)
                await asyncio.sleep(pause_seconds)
            else:
                return
        raise StoreUnavailable("the bucket of backups")


class StreamWriter:
    """Writes a stream in parts of one size; the last is shorter."""

    def __init__(self, put: Callable[[int, bytes], Awaitable[Part]], size: int) -> None:
        self._put = put
        self._size = size
        self._buffer = bytearray()
        self._parts: list[Part] = []

    async def add(self, chunk: bytes) -> None:
        """Add bytes; whatever makes a part is written."""
        self._buffer += chunk
        while len(self._buffer) >= self._size:
            await self._write(bytes(self._buffer[: self._size]))
            del self._buffer[: self._size]

    async def close(self) -> list[Part]:
        """Write what is left, and return all parts: one at least."""
        if self._buffer or not self._parts:
            await self._write(bytes(self._buffer))
            self._buffer.clear()
        return self._parts

    async def _write(self, plain: bytes) -> None:
        self._parts.append(await self._put(len(self._parts), plain))


def _part_key(backup: str, stream: str, number: int) -> str:
    return f"{_BACKUPS}{backup}/{stream}/{number:06}"


def _object_key(sha256: str, number: int, count: int) -> str:
    return f"{_OBJECTS}{sha256}/{number:06}of{count:06}"


async def _in_parts(chunks: AsyncIterable[bytes], size: int) -> AsyncIterator[bytes]:
    """Yield the same bytes in parts of one size; the last is shorter. There is always one."""
    buffer = bytearray()
    is_first = True
    async for chunk in chunks:
        buffer += chunk
        while len(buffer) >= size:
            yield bytes(buffer[:size])
            del buffer[:size]
            is_first = False
    if buffer or is_first:
        yield bytes(buffer)
