"""Master keys in a file: what it may say, and who may read it."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest
import structlog

from server.kms import KmsUnusable, UnwrapFailed
from server.kms.local import LocalKms
from tests.kms.key_files import key_file

OLD, NEW = bytes(range(32)), bytes(32)


def written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return key_file(tmp_path / "master.key", OLD)


async def test_other_master_key_is_named_as_the_cause(path: Path, tmp_path: Path) -> None:
    wrapped = await LocalKms(path).wrap(b"secret", context=b"here")
    stranger = LocalKms(key_file(tmp_path / "other.key", NEW))
    with pytest.raises(UnwrapFailed, match=r"another master key.*KIMBERLY_MASTER_KEY_FILE"):
        await stranger.unwrap(wrapped, context=b"here")


async def test_file_may_say_what_its_keys_are(path: Path) -> None:
    wrapped = await LocalKms(path).wrap(b"secret", context=b"here")
    lines = [b"# of 2026", base64.b64encode(OLD), b"", b"# of 2027", base64.b64encode(NEW)]
    written(path, b"\n".join(lines))
    kms = LocalKms(path)
    assert await kms.unwrap(wrapped, context=b"here") == b"secret"
    assert kms.version_of(await kms.wrap(b"", context=b"here")) == await kms.newest_version()
    assert kms.version_of(wrapped) != await kms.newest_version()


async def test_process_that_has_not_restarted_unwraps_what_a_new_key_wrapped(path: Path) -> None:
    running = LocalKms(path)
    key_file(path, OLD, NEW)
    wrapped = await LocalKms(path).wrap(b"secret", context=b"here")
    assert await running.unwrap(wrapped, context=b"here") == b"secret"


async def test_keys_at_hand_outlive_a_file_that_is_damaged(path: Path) -> None:
    running = LocalKms(path)
    wrapped = await running.wrap(b"secret", context=b"here")
    written(path, b"half a ke")
    with structlog.testing.capture_logs() as logs:
        assert running.version_of(wrapped) == await running.newest_version()
    assert await running.unwrap(wrapped, context=b"here") == b"secret"
    assert [line["event"] for line in logs] == ["master keys not read"]


def test_missing_key_file_is_named_with_its_variable(tmp_path: Path) -> None:
    with pytest.raises(KmsUnusable, match=r"KIMBERLY_MASTER_KEY_FILE: .*/none: No such file"):
        LocalKms(tmp_path / "none")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing else\n",
        b"not base64!",
        base64.b64encode(OLD[:31]),
        base64.b64encode(OLD) + b"\n" + base64.b64encode(OLD[:31]),
        base64.b64encode(OLD) + b"\n" + base64.b64encode(OLD),
    ],
)
def test_wrong_key_file_is_named_with_its_variable(path: Path, content: bytes) -> None:
    written(path, content)
    with pytest.raises(KmsUnusable, match=r"KIMBERLY_MASTER_KEY_FILE: .*32 bytes in base64") as no:
        LocalKms(path)
    assert base64.b64encode(OLD)[:10].decode() not in str(no.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660, 0o644])
def test_key_file_that_others_may_read_is_refused(path: Path, mode: int) -> None:
    path.chmod(mode)
    if os.getuid() == 0 and mode == 0o640:
        LocalKms(path)  # as Kubernetes mounts it
        return
    with pytest.raises(KmsUnusable, match=rf"open to others \(mode {mode:04o}\).*chmod 600"):
        LocalKms(path)


def test_key_file_that_not_even_its_owner_may_write_is_taken(path: Path) -> None:
    path.chmod(0o400)
    LocalKms(path)
