"""A ZIP archive that is written into S3 while it is made: it is nowhere as a whole."""

import asyncio
import hashlib
import zipfile
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO, Final, cast

import structlog
from minio.datatypes import Part

from server.blobs import Blobs
from server.errors import StoreUnavailable
from server.privacy.exports import Archive

log = structlog.get_logger()

_PART_BYTES: Final = 8 * 1024 * 1024
"""S3 takes ten thousand parts: 80 GB."""
_COMPRESSION: Final = 3
"""Twice as fast as the usual 6, and hardly larger."""


@dataclass(frozen=True, slots=True)
class Written:
    """A file in the archive."""

    name: str
    size_bytes: int
    sha256: str
    """Lowercase hexadecimal."""


class _Sink:
    """Where zipfile writes to: it can neither seek nor tell, and so needs nothing again."""

    def __init__(self) -> None:
        self.waiting = bytearray()

    def write(self, data: bytes) -> int:
        self.waiting += data
        return len(data)

    def flush(self) -> None:
        """Keep what waits: parts have a size of their own."""


class ZipUpload:
    """Files, one after the other. At most one part of 8 MiB and what is written waits in memory."""

    def __init__(self, blobs: Blobs, key: str, upload_id: str) -> None:
        self._blobs = blobs
        self._key = key
        self._upload_id = upload_id
        self._sink = _Sink()
        self._zip = zipfile.ZipFile(
            cast("IO[bytes]", self._sink),
            "w",
            zipfile.ZIP_DEFLATED,
            compresslevel=_COMPRESSION,
        )
        self._parts: list[Part] = []
        self._sha256 = hashlib.sha256()
        self._size = 0
        self.files: list[Written] = []
        self.written_bytes = 0
        """Before compression."""

    async def add(self, name: str, chunks: AsyncIterable[bytes]) -> AsyncIterator[int]:
        """Write a file, and yield after each chunk how much has been written in all.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        sha256, size = hashlib.sha256(), 0
        with self._zip.open(name, "w", force_zip64=True) as entry:
            async for chunk in chunks:
                # Compressing takes as long as a call may: not on the loop.
                await asyncio.to_thread(entry.write, chunk)
                sha256.update(chunk)
                size += len(chunk)
                self.written_bytes += len(chunk)
                await self._send(_PART_BYTES)
                yield self.written_bytes
        self.files.append(Written(name, size, sha256.hexdigest()))

    async def finish(self) -> Archive:
        """Write the end, and return what the archive is.

        Raises:
            StoreUnavailable: S3 does not answer, or has given the upload up.
        """
        self._zip.close()
        await self._send(1)
        version_id = await self._blobs.complete_upload(self._key, self._upload_id, self._parts)
        return Archive(version_id, self._size, self._sha256.digest())

    async def _send(self, least: int) -> None:
        """Send parts as long as there is so much."""
        while len(self._sink.waiting) >= least:
            data = bytes(self._sink.waiting[:_PART_BYTES])
            del self._sink.waiting[: len(data)]
            number = len(self._parts) + 1
            self._parts.append(await self._blobs.put_part(self._key, self._upload_id, number, data))
            self._sha256.update(data)
            self._size += len(data)


@asynccontextmanager
async def zip_upload(blobs: Blobs, key: str) -> AsyncIterator[ZipUpload]:
    """Begin an archive under a key. What fails is given up, now or by the sweep.

    Raises:
        StoreUnavailable: S3 does not answer.
    """
    upload_id = await blobs.begin_upload(key)
    try:
        yield ZipUpload(blobs, key, upload_id)
    except BaseException:
        try:
            await asyncio.shield(blobs.abort_upload(key, upload_id))
        except (StoreUnavailable, asyncio.CancelledError) as error:
            log.warning("upload left to the sweep", key=key, error=repr(error))
        raise
