"""S3: objects under keys that only the server makes, moved by presigned URLs."""

import asyncio
import hashlib
from dataclasses import dataclass
from datetime import timedelta

import structlog
import urllib3
from minio import Minio
from minio.error import S3Error

from server.errors import StoreUnavailable

log = structlog.get_logger()

_CHUNK_BYTES = 1024 * 1024
_MISSING = {"NoSuchKey", "NoSuchBucket", "NoSuchObject"}
_OUT_OF_REACH = (urllib3.exceptions.HTTPError, S3Error, OSError)


@dataclass(frozen=True, slots=True)
class Digest:
    """What an object holds."""

    size_bytes: int
    sha256: bytes


class Blobs:
    """One bucket. The client is synchronous, so that every transfer runs in a thread."""

    def __init__(self, client: Minio, bucket: str) -> None:
        self._client = client
        self._bucket = bucket

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
        client = Minio(
            endpoint,
            access_key=access_key,
            secret_key=secret_key,
            region=region,
            secure=secure,
            http_client=http,
        )
        return cls(client, bucket)

    def upload_url(self, key: str, lifetime: timedelta) -> str:
        """Return a URL that takes one PUT of this key. Signing needs no network."""
        return self._client.presigned_put_object(self._bucket, key, expires=lifetime)

    def download_url(self, key: str, lifetime: timedelta, *, file_name: str) -> str:
        """Return a URL that gives this key by GET, always as a download of that name."""
        headers: dict[str, str | list[str] | tuple[str]] = {
            "response-content-disposition": _attachment_disposition(file_name)
        }
        return self._client.presigned_get_object(
            self._bucket, key, expires=lifetime, response_headers=headers
        )

    async def digest(self, key: str, *, longest: int) -> Digest | None:
        """Read an object and return its size and SHA-256, or None if there is none.

        Reading stops after `longest` bytes: a larger object has a size above that.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        return await asyncio.to_thread(self._digest, key, longest)

    async def remove(self, key: str) -> None:
        """Remove an object; one that is not there is removed already.

        Raises:
            StoreUnavailable: S3 does not answer.
        """
        await asyncio.to_thread(self._remove, key)

    def _digest(self, key: str, longest: int) -> Digest | None:
        sha256 = hashlib.sha256()
        size = 0
        try:
            response = self._client.get_object(self._bucket, key)
            try:
                for chunk in response.stream(_CHUNK_BYTES):
                    size += len(chunk)
                    sha256.update(chunk)
                    if size > longest:
                        break
            finally:
                response.close()
                response.release_conn()
        except S3Error as error:
            if error.code in _MISSING:
                return None
            raise _unavailable(error) from error
        except _OUT_OF_REACH as error:
            raise _unavailable(error) from error
        return Digest(size, sha256.digest())

    def _remove(self, key: str) -> None:
        try:
            self._client.remove_object(self._bucket, key)
        except _OUT_OF_REACH as error:
            raise _unavailable(error) from error


def _unavailable(error: Exception) -> StoreUnavailable:
    log.warning("object store out of reach", error=repr(error))
    return StoreUnavailable("the object store")


def _attachment_disposition(file_name: str) -> str:
    safe = "".join(c if c.isalnum() or c in "._- " else "_" for c in file_name)
    return f'attachment; filename="{safe.encode("ascii", "replace").decode()}"'
