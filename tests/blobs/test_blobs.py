"""Objects, versions and uploads in parts, on a real S3 server."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from datetime import timedelta

import httpx
import pytest
import pytest_asyncio

from server import ids
from server.blobs import Blobs

MINUTE = timedelta(minutes=1)
DATA = b"hello " * 100
SHA256 = hashlib.sha256(DATA).digest()


@pytest_asyncio.fixture(autouse=True)
async def versions_kept(blobs: Blobs) -> None:
    await blobs.keep_versions()


@pytest.fixture
def key() -> str:
    return f"tests/{ids.new_id().hex}"


async def versions_of(blobs: Blobs, key: str) -> list[str | None]:
    """Return the versions and marks of one key, of all pages of the whole bucket."""
    found, token = [], ""
    while True:
        page = await blobs.versions(token=token, limit=100)
        found += [version.version_id for version in page.versions if version.key == key]
        token = page.next_token
        if not token:
            return found


def upload_url(blobs: Blobs, key: str, lifetime: timedelta = MINUTE) -> str:
    return blobs.upload_url(key, lifetime, size_bytes=len(DATA), sha256=SHA256)


async def test_url_takes_the_bytes_it_was_made_for_and_no_others(blobs: Blobs, key: str) -> None:
    url = upload_url(blobs, key)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        for other in (DATA + b"x", DATA[:-1], b"", b"x" * len(DATA)):
            assert (await http.put(url, content=other)).is_client_error
        assert await versions_of(blobs, key) == []
        assert (await http.put(url, content=DATA)).is_success
    digest = await blobs.digest(key, longest=10_000)
    assert digest is not None
    assert (digest.size_bytes, digest.sha256) == (len(DATA), SHA256)
    assert [digest.version_id] == await versions_of(blobs, key)


async def test_url_is_bound_to_its_key_method_size_and_time(blobs: Blobs, key: str) -> None:
    url = upload_url(blobs, key)
    altered = [
        url.replace(key, f"{key}x"),
        url.replace("X-Amz-Expires=60", "X-Amz-Expires=600"),
        url.replace("SignedHeaders=content-length%3Bhost", "SignedHeaders=host"),
        url.replace("x-amz-checksum-sha256=", "ignored="),
        f"{url}&partNumber=1",
    ]
    assert len({*altered, url}) == len(altered) + 1
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        refusals = [await http.put(each, content=DATA) for each in altered]
        refusals += [await http.get(url), await http.delete(url)]

        async def without_a_length() -> AsyncIterator[bytes]:
            yield DATA

        refusals.append(await http.put(url, content=without_a_length()))
    assert {refusal.status_code for refusal in refusals} == {403}
    assert await versions_of(blobs, key) == []


async def test_url_stops_working(blobs: Blobs, key: str) -> None:
    url = upload_url(blobs, key, timedelta(seconds=1))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        answer = await http.put(url, content=DATA)
        while answer.is_success:
            answer = await http.put(url, content=DATA)
    assert (answer.status_code, "expired" in answer.text) == (403, True)


async def test_part_url_is_bound_to_its_size_and_number(blobs: Blobs, key: str) -> None:
    upload_id = await blobs.begin_upload(key)
    url = blobs.part_url(key, MINUTE, upload_id=upload_id, number=1, size_bytes=len(DATA))
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        assert (await http.put(url, content=DATA + b"x")).status_code == 403
        second = url.replace("partNumber=1", "partNumber=2")
        assert (await http.put(second, content=DATA)).status_code == 403
        assert await blobs.parts(key, upload_id) == []
        assert (await http.put(url, content=DATA)).is_success
        parts = await blobs.parts(key, upload_id)
        assert parts is not None
        assert [(part.part_number, part.size) for part in parts] == [(1, len(DATA))]
        await blobs.complete_upload(key, upload_id, parts)
        assert await blobs.parts(key, upload_id) is None
        assert (await http.put(url, content=DATA)).status_code == 404
    await blobs.complete_upload(key, upload_id, parts)
    await blobs.abort_upload(key, upload_id)
    assert len(await versions_of(blobs, key)) == 1


async def test_erasing_leaves_no_version_no_mark_and_no_upload(blobs: Blobs, key: str) -> None:
    longer = f"{key}b"
    for _ in range(3):
        await blobs.put(key, DATA, "text/plain")
    await blobs.put(longer, DATA, "text/plain")
    # What a client that knows nothing of versions does: it hides the object.
    await blobs.remove_version(key, None)
    uploads = {each: await blobs.begin_upload(each) for each in (key, longer)}
    assert len(await versions_of(blobs, key)) == 4
    await blobs.erase(key)
    assert await versions_of(blobs, key) == []
    assert len(await versions_of(blobs, longer)) == 1
    left = {upload.upload_id for upload in await blobs.unfinished()}
    assert uploads[key] not in left
    assert uploads[longer] in left
    await blobs.erase(key)
    await blobs.erase(longer)


async def test_download_gives_the_version_it_was_made_for(blobs: Blobs, key: str) -> None:
    first = await blobs.put(key, b"first", "text/plain")
    await blobs.put(key, b"second", "text/plain")
    url = blobs.download_url(key, MINUTE, file_name="a.txt", version_id=first)
    async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
        assert (await http.get(url)).content == b"first"


async def test_digest_stops_at_what_is_too_long(blobs: Blobs, key: str) -> None:
    await blobs.put(key, b"x" * 5_000_000, "text/plain")
    digest = await blobs.digest(key, longest=1000)
    assert digest is not None
    assert 1000 < digest.size_bytes < 1_000_000
    assert await blobs.digest(f"{key}/other", longest=1000) is None


async def test_pages_of_versions_hold_each_version_once(blobs: Blobs, key: str) -> None:
    written = [await blobs.put(f"{key}/{n % 3}", b"x", "text/plain") for n in range(7)]
    seen: list[str | None] = []
    token, pages = "", 0
    while token or not pages:
        page = await blobs.versions(token=token, limit=2)
        seen += [version.version_id for version in page.versions if version.key.startswith(key)]
        token, pages = page.next_token, pages + 1
    assert sorted(map(str, seen)) == sorted(map(str, written))
    assert pages > 3
