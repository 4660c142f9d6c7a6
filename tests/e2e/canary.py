"""Looks for what a user said in everything that the mesh keeps."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, Final
from uuid import uuid4

import asyncpg
import httpx
from minio import Minio
from minio.error import S3Error

from local.mesh import Mesh
from local.postgres import SUPERUSER
from local.servers import BUCKET
from server.cache import open_cache

_AROUND: Final = 40
"""How many characters beside a finding are shown."""

Place = tuple[str, str]
"""A store, and what it calls the place: a table, a key, a file."""


class Haystack:
    """Everything that a mesh keeps: tables, keys, objects with all their versions, and logs."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    async def find(self, needle: re.Pattern[str]) -> dict[Place, str]:
        """Return where something is found, with what stands around it there."""
        looks = (self._tables, self._keys, self._objects, self.logs)
        return {
            place: around
            for look in looks
            for place, around in (await found_in(look(), needle)).items()
        }

    async def _tables(self) -> AsyncIterator[tuple[Place, str]]:
        """Yield every row of every table as text, bytes in hexadecimal; and what is seen of SQL."""
        connection = await asyncpg.connect(self._mesh.stores.dsn(SUPERUSER))
        try:
            tables = await connection.fetch(
                """
                SELECT relation.oid::regclass::text AS name
                  FROM pg_class AS relation
                  JOIN pg_namespace AS schema ON schema.oid = relation.relnamespace
                 -- What is temporary nobody else can read; it is emptied by every commit.
                 WHERE relkind IN ('r', 'm') AND relpersistence <> 't'
                   AND nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
                 UNION ALL
                VALUES ('pg_stat_statements'), ('pg_stat_activity')
                """
            )
            for table in tables:
                rows = await connection.fetch(
                    f"SELECT row::text AS text FROM {table['name']} AS row"
                )
                for row in rows:
                    yield ("postgres", table["name"]), row["text"]
        finally:
            await connection.close()

    async def _keys(self) -> AsyncIterator[tuple[Place, str]]:
        """Yield every key with all that it holds."""
        redis = open_cache(self._mesh.stores.valkey.url)
        read: Mapping[Any, Callable[[bytes], Awaitable[Any]]] = {
            b"string": redis.get,
            b"hash": redis.hgetall,
            b"list": lambda key: redis.lrange(key, 0, -1),
            b"set": redis.smembers,
            b"zset": lambda key: redis.zrange(key, 0, -1),
            b"stream": redis.xrange,
        }
        try:
            async for key in redis.scan_iter(count=1000):
                kind = await redis.type(key)
                if kind != b"none":
                    value = await read[kind](key)
                    # Ids are the same in every key of a user; what follows them tells keys apart.
                    name = key.decode().split(":", 3)[-1]
                    yield ("valkey", name), f"{key!r} {value!r}"
        finally:
            await redis.aclose()

    async def _objects(self) -> AsyncIterator[tuple[Place, str]]:
        """Yield every version of every object with its name and its headers."""
        s3 = self._mesh.stores.s3
        client = Minio(
            s3.endpoint, access_key=s3.access_key, secret_key=s3.secret_key, secure=False
        )
        for each in client.list_objects(BUCKET, recursive=True, include_version=True):
            if each.is_delete_marker:
                yield ("s3", "mark"), str(each.object_name)
                continue
            try:
                answer = client.get_object(
                    BUCKET, str(each.object_name), version_id=each.version_id
                )
            except S3Error as error:
                # It went since it was listed: what others leave behind is swept up meanwhile.
                if error.code not in {"NoSuchKey", "NoSuchVersion"}:
                    raise
                continue
            try:
                text = f"{each.object_name} {dict(answer.headers)} {answer.data.decode('latin-1')}"
            finally:
                answer.close()
                answer.release_conn()
            yield ("s3", str(each.object_name).split("/")[0]), text

    async def logs(self) -> AsyncIterator[tuple[Place, str]]:
        """Yield the log of every process, with what the edge keeps back for a second."""
        await self._flushed()
        for file in self._mesh.layout.logs.iterdir():
            yield ("logs", file.name), file.read_text(errors="replace")

    async def _flushed(self) -> None:
        """Wait until the edge has written down all that it was asked so far."""
        last = f"canary/{uuid4().hex}"
        trusted = ssl.create_default_context(cafile=str(self._mesh.ca))
        async with httpx.AsyncClient(verify=trusted, trust_env=False, timeout=60) as client:
            await client.get(f"{self._mesh.edge}/healthz", headers={"user-agent": last})
        log = self._mesh.layout.logs / "edge.log"
        async with asyncio.timeout(60):
            while last not in log.read_text():  # noqa: ASYNC110 - another process writes it
                await asyncio.sleep(0.1)


async def found_in(
    texts: AsyncIterator[tuple[Place, str]], needle: re.Pattern[str]
) -> dict[Place, str]:
    """Return in which texts something is found, with what stands around it there."""
    found: dict[Place, str] = {}
    async for place, text in texts:
        if match := needle.search(text):
            start = max(0, match.start() - _AROUND)
            found[place] = text[start : match.end() + _AROUND]
    return found


def word(said: str) -> re.Pattern[str]:
    """Return what finds a word: as it is, in hexadecimal, and in base64 wherever it begins."""
    data = said.encode()
    encoded = [base64.b64encode(b"\0" * shift + data)[4:-4].decode() for shift in range(3)]
    return re.compile("|".join(map(re.escape, [said, data.hex(), *encoded])), re.IGNORECASE)


def fingerprints(texts: Iterable[str]) -> re.Pattern[str]:
    """Return what finds the SHA-256 of texts."""
    return re.compile("|".join(hashlib.sha256(text.encode()).hexdigest() for text in texts))
