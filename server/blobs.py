"""S3: objects under keys that only the server makes, moved by presigned URLs.

The bucket keeps versions: what was checked is what is served, whatever is uploaded later, and
to remove an object is to remove each of its versions. Everything works on a bucket that keeps none.
"""

import asyncio
import base64
import hashlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from io import BytesIO
from itertools import islice
from typing import ParamSpec, TypeVar, cast
from urllib.parse import SplitResult

import structlog
import urllib3
from minio import Minio
from minio.commonconfig import ENABLED
from minio.credentials.providers import Provider
from minio.datatypes import Part, parse_list_objects
from minio.error import S3Error
from minio.helpers import DictType
from minio.versioningconfig import VersioningConfig

from server.errors import NotFound, StoreUnavailable
from server.presigning import Key, presign

log = structlog.get_logger()

_CHUNK_BYTES = 256 * 1024
_PAGE = 1000
_LONGEST_PAUSE_SECONDS = 60.0
_PUT_LIFETIME = timedelta(minutes=1)
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject", "NoSuchVersion"}
_OUT_OF_REACH = (urllib3.exceptions.HTTPError, S3Error, OSError)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Digest:
    """What an object holds."""

    size_bytes: int
    sha256: bytes
    version_id: str | None
    """The version that was read; None if the bucket keeps none."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version of an object, or the mark that it was deleted."""

    key: str
    version_id: str | None
    modified_at: datetime


@dataclass(frozen=True, slots=True)
class VersionPage:
    """Some versions, in order of their keys."""

    versions: Sequence[Version]
    next_token: str
    """Of the page after this one; empty on the last page."""


@dataclass(frozen=True, slots=True)
class UnfinishedUpload:
    """An upload in parts that was begun and neither completed nor given up."""

    key: str
    upload_id: str
    begun_at: datetime


class _S3(Minio):
    """The S3 client, with the calls that it keeps to itself."""

    def presigned(
        self,
        method: str,
        bucket: str,
        key: str,
        lifetime: timedelta,
        query: Mapping[str, str],
        headers: Mapping[str, str],
    ) -> str:
        region = self._get_region(bucket)
        credentials = cast("Provider", self._provider).retrieve()
        signing = Key(credentials.access_key, credentials.secret_key, region)
        url: SplitResult = self._base_url.build(
            method=method, region=region, bucket_name=bucket, object_name=key
        )
        return presign(signing, method, url, query, headers, lifetime, datetime.now(UTC))

    def begin_upload(self, bucket: str, key: str) -> str:
        return self._create_multipart_upload(bucket, key, {})

    def parts_of(self, bucket: str, key: str, upload_id: str) -> list[Part]:
        return self._list_parts(bucket, key, upload_id).parts

    def upload_part(self, bucket: str, key: str, upload_id: str, number: int, data: bytes) -> Part:
        return Part(number, self._upload_part(bucket, key, data, None, upload_id, number))

    def complete_upload(
        self, bucket: str, key: str, upload_id: str, parts: list[Part]
    ) -> str | None:
        return self._complete_multipart_upload(bucket, key, upload_id, parts).version_id

    def abort_upload(self, bucket: str, key: str, upload_id: str) -> None:
        self._abort_multipart_upload(bucket, key, upload_id)

    def unfinished(self, bucket: str, prefix: str) -> list[UnfinishedUpload]:
        listed = self._list_multipart_uploads(bucket, prefix=prefix, max_uploads=_PAGE)
        return [
            UnfinishedUpload(
                each.object_name,
                cast("str", each.upload_id),
                cast("datetime", each.initiated_time),
            )
            for each in listed.uploads
        ]

    def versions(self, bucket: str, prefix: str, limit: int, token: str) -> VersionPage:
        key_marker, _, version_marker = token.rpartition(" ")
        query: DictType = {"versions": "", "prefix": prefix, "max-keys": str(limit)}
        if token:
            query |= {"key-marker": key_marker, "version-id-marker": version_marker}
        response = self._execute("GET", bucket, query_params=query)
        objects, more, next_key, next_version = parse_list_objects(response)
        versions = [
            Version(
                cast("str", each.object_name),
                each.version_id,
                cast("datetime", each.last_modified),
            )
            for each in objects
        ]
        return VersionPage(versions, f"{next_key} {next_version}" if more else "")


class Blobs:
    """One bucket. The client is synchronous, so that every transfer runs in a thread.

    Every method that is awaited raises StoreUnavailable when S3 does not answer.
    """

    def __init__(self, client: _S3, bucket: str, http: urllib3.PoolManager) -> None:
        self._client = client
        self._bucket = bucket
        self._http = http

    @classmethod
    def open(
        cls,
        *,
        endpoint: str,
        access_key: str,
        secret_key: str,
        region: str,
        secure: bool,
        bucket: str,
    ) -> "Blobs":
        """Return the bucket. Nothing is sent until it is used."""
        http = urllib3.PoolManager(
            timeout=urllib3.Timeout(connect=2, read=10),
            retries=urllib3.Retry(total=2, backoff_factor=0.2, status_forcelist=[502, 503, 504]),
            maxsize=8,
        )
        client = _S3(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            secure=secure,
            http_client=http,
        )
        return cls(client, bucket, http)

    # --- URLs: signing needs no network

    def upload_url(self, key: str, lifetime: timedelta, *, size_bytes: int, sha256: bytes) -> str:
        """Return a URL that takes a PUT of these bytes under this key, and of no others.

        The size is bound by a signed header that every HTTP client sends, the bytes by a
        checksum in the query, which S3 compares before it keeps the object.
        """
        checksum = base64.b64encode(sha256).decode()
        return self._presigned(
            "PUT", key, lifetime, {"x-amz-checksum-sha256": checksum}, size_bytes
        )

    def part_url(
        self, key: str, lifetime: timedelta, *, upload_id: str, number: int, size_bytes: int
    ) -> str:
        """Return a URL that takes a PUT of one part of an upload, of exactly that size."""
        query = {"partNumber": str(number), "uploadId": upload_id}
        return self._presigned("PUT", key, lifetime, query, size_bytes)

    def download_url(
        self, key: str, lifetime: timedelta, *, file_name: str, version_id: str | None
    ) -> str:
        """Return a URL that gives this version by GET, always as a download of that name."""
        query = {"response-content-disposition": _attachment_disposition(file_name)}
        if version_id:
            query["versionId"] = version_id
        return self._presigned("GET", key, lifetime, query)

    def _presigned(
        self,
        method: str,
        key: str,
        lifetime: timedelta,
        query: Mapping[str, str],
        size_bytes: int | None = None,
    ) -> str:
        headers = {} if size_bytes is None else {"content-length": str(size_bytes)}
        return self._client.presigned(method, self._bucket, key, lifetime, query, headers)

    # --- objects

    async def keep_versions(self) -> None:
        """Return when the bucket keeps versions: tell it to, as soon as S3 answers."""
        pause_seconds = 1.0
        while True:
            try:
                return await _run(self._keep_versions)
            except StoreUnavailable:
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(2 * pause_seconds, _LONGEST_PAUSE_SECONDS)

    async def ensure(self) -> None:
        """Make the bucket unless there is one."""
        await _run(self._ensure)

    async def put(self, key: str, data: bytes, content_type: str) -> str | None:
        """Write an object and return its version; None if the bucket keeps none."""
        return await _run(self._put, key, data, content_type)

    async def digest(self, key: str, *, longest: int) -> Digest | None:
        """Read an object and return its size and SHA-256, or None if there is none.

        It is read in small chunks, and not to the end once it is longer than `longest` bytes or
        nobody waits for the answer any more.
        """
        abandoned = threading.Event()
        try:
            return await _run(self._digest, key, longest, abandoned)
        finally:
            abandoned.set()

    async def erase(self, key: str) -> None:
        """Remove every version of an object and every upload of it; none is left, even of many."""
        await _run(self._erase, key)

    async def remove_version(self, key: str, version_id: str | None) -> None:
        """Remove one version of an object; without one, the object of a bucket that keeps none."""
        await _run(self._client.remove_object, self._bucket, key, version_id)

    async def versions(self, *, token: str, limit: int, prefix: str = "") -> VersionPage:
        """Return a page of all versions of all objects, or of those whose keys begin so.

        `token` is empty for the first page.
        """
        return await _run(self._client.versions, self._bucket, prefix, limit, token)

    async def put_new(self, key: str, data: bytes) -> bool:
        """Write a small object and return True; if there is one under this key, return False."""
        return await _run(self._put_new, key, data)

    async def get_small(self, key: str, *, longest: int) -> bytes | None:
        """Return what an object holds, at most `longest` bytes of it; None if there is none."""
        return await _run(self._get_small, key, longest)

    async def chunks(self, key: str, version_id: str | None) -> AsyncGenerator[bytes, None]:
        """Yield what a version of an object holds, a quarter of a MiB at a time.

        Raises:
            NotFound: There is none.
        """
        response = await _run(self._open, key, version_id)
        try:
            stream = response.stream(_CHUNK_BYTES)
            while chunk := await _run(next, stream, b""):
                yield chunk
        finally:
            response.close()
            response.release_conn()

    async def list_keys(self, prefix: str, *, after: str = "") -> list[str]:
        """Return the keys with a prefix that sort behind `after`, in order."""
        return await _run(self._list_keys, prefix, after)

    async def pages(self, prefix: str) -> AsyncGenerator[list[str], None]:
        """Yield the keys with a prefix, in order, up to a thousand at a time."""
        listed = self._client.list_objects(self._bucket, prefix, recursive=True)
        while page := await _run(list, islice(listed, _PAGE)):
            yield [str(found.object_name) for found in page]

    # --- uploads in parts

    async def begin_upload(self, key: str) -> str:
        """Begin an upload in parts and return its id."""
        return await _run(self._client.begin_upload, self._bucket, key)

    async def parts(self, key: str, upload_id: str) -> list[Part] | None:
        """Return the parts that are there; None if the upload is over, in whatever way."""
        return await _run(self._parts, key, upload_id)

    async def put_part(self, key: str, upload_id: str, number: int, data: bytes) -> Part:
        """Write a part of an upload and return it; all but the last have 5 MiB at least."""
        return await _run(self._client.upload_part, self._bucket, key, upload_id, number, data)

    async def complete_upload(self, key: str, upload_id: str, parts: list[Part]) -> str | None:
        """Make parts an object and return its version; an upload that is over stays as it is.

        Returns:
            The version; None if the bucket keeps none, or the upload was over before.
        """
        return await _run(self._complete_upload, key, upload_id, parts)

    async def unfinished(self, prefix: str = "") -> list[UnfinishedUpload]:
        """Return uploads that are not over, of keys that begin so: all, or a thousand of more."""
        return await _run(self._client.unfinished, self._bucket, prefix)

    async def abort_upload(self, key: str, upload_id: str) -> None:
        """Give an upload up; one that is over stays as it is."""
        await _run(self._abort_upload, key, upload_id)

    # --- what runs in a thread

    def _keep_versions(self) -> None:
        # A key that may look and not change is enough where the bucket was made by others.
        if self._client.get_bucket_versioning(self._bucket).status != ENABLED:
            self._client.set_bucket_versioning(self._bucket, VersioningConfig(ENABLED))

    def _ensure(self) -> None:
        if not self._client.bucket_exists(self._bucket):
            self._client.make_bucket(self._bucket)

    def _put(self, key: str, data: bytes, content_type: str) -> str | None:
        written = self._client.put_object(
            self._bucket, key, BytesIO(data), len(data), content_type=content_type
        )
        return written.version_id

    def _digest(self, key: str, longest: int, abandoned: threading.Event) -> Digest | None:
        sha256 = hashlib.sha256()
        size = 0
        try:
            response = self._client.get_object(self._bucket, key)
        except S3Error as error:
            if error.code in _MISSING:
                return None
            raise
        try:
            for chunk in response.stream(_CHUNK_BYTES):
                size += len(chunk)
                sha256.update(chunk)
                if size > longest or abandoned.is_set():
                    break
        finally:
            response.close()
            response.release_conn()
        return Digest(size, sha256.digest(), response.headers.get("x-amz-version-id"))

    def _put_new(self, key: str, data: bytes) -> bool:
        # The client knows no conditions; a presigned URL leaves room for one.
        url = self._client.presigned_put_object(self._bucket, key, expires=_PUT_LIFETIME)
        answer = self._http.request("PUT", url, body=data, headers={"If-None-Match": "*"})
        if answer.status not in (HTTPStatus.OK, HTTPStatus.PRECONDITION_FAILED):
            raise OSError(f"PUT was answered {answer.status}")
        return answer.status == HTTPStatus.OK

    def _open(self, key: str, version_id: str | None) -> urllib3.BaseHTTPResponse:
        try:
            return self._client.get_object(self._bucket, key, version_id=version_id)
        except S3Error as error:
            if error.code in _MISSING:
                raise NotFound("object") from error
            raise

    def _get_small(self, key: str, longest: int) -> bytes | None:
        try:
            response = self._client.get_object(self._bucket, key)
        except S3Error as error:
            if error.code in _MISSING:
                return None
            raise
        try:
            return response.read(longest)
        finally:
            response.close()
            response.release_conn()

    def _list_keys(self, prefix: str, after: str) -> list[str]:
        listed = self._client.list_objects(
            self._bucket, prefix, recursive=True, start_after=after or None
        )
        return [str(found.object_name) for found in listed]

    def _erase(self, key: str) -> None:
        # A prefix is not a key: what begins with this key is another object.
        for upload in self._client.unfinished(self._bucket, key):
            if upload.key == key:
                self._abort_upload(key, upload.upload_id)
        for version in self._versions_of(key):
            self._client.remove_object(self._bucket, key, version.version_id)

    def _versions_of(self, key: str) -> Iterator[Version]:
        """Yield the versions of one key; each is gone before the next is asked for."""
        while True:
            page = self._client.versions(self._bucket, key, _PAGE, "")
            own = [version for version in page.versions if version.key == key]
            yield from own
            if not own or not page.next_token:
                return

    def _parts(self, key: str, upload_id: str) -> list[Part] | None:
        try:
            return self._client.parts_of(self._bucket, key, upload_id)
        except S3Error as error:
            if error.code == "NoSuchUpload":
                return None
            raise

    def _complete_upload(self, key: str, upload_id: str, parts: list[Part]) -> str | None:
        try:
            return self._client.complete_upload(self._bucket, key, upload_id, parts)
        except S3Error as error:
            if error.code != "NoSuchUpload":
                raise
            return None

    def _abort_upload(self, key: str, upload_id: str) -> None:
        try:
            self._client.abort_upload(self._bucket, key, upload_id)
        except S3Error as error:
            if error.code != "NoSuchUpload":
                raise


async def _run(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a transfer in a thread.

    Raises:
        StoreUnavailable: S3 does not answer.
    """
    try:
        return await asyncio.to_thread(function, *args, **kwargs)
    except _OUT_OF_REACH as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> StoreUnavailable:
    log.warning("object store out of reach", error=repr(error))
    return StoreUnavailable("the object store")


def _attachment_disposition(file_name: str) -> str:
    safe = "".join(c if c.isalnum() or c in "._- " else "_" for c in file_name)
    return f'attachment; filename="{safe.encode("ascii", "replace").decode()}"'
