import base64
from pathlib import Path

import pytest

from server.kms import LocalKms, MasterKeyUnusable, UnwrapFailed

KEY = bytes(range(32))


async def test_what_was_wrapped_comes_back() -> None:
    kms = LocalKms(KEY)
    wrapped = await kms.wrap(b"secret", context=b"here")
    assert b"secret" not in wrapped
    assert await kms.unwrap(wrapped, context=b"here") == b"secret"


async def test_a_secret_is_wrapped_differently_each_time() -> None:
    kms = LocalKms(KEY)
    assert await kms.wrap(b"secret", context=b"") != await kms.wrap(b"secret", context=b"")


async def test_a_secret_is_bound_to_its_context() -> None:
    kms = LocalKms(KEY)
    with pytest.raises(UnwrapFailed):
        await kms.unwrap(await kms.wrap(b"secret", context=b"here"), context=b"there")


async def test_another_master_key_is_named_as_the_cause() -> None:
    wrapped = await LocalKms(KEY).wrap(b"secret", context=b"")
    with pytest.raises(UnwrapFailed, match=r"another master key.*KIMBERLY_MASTER_KEY_FILE"):
        await LocalKms(bytes(32)).unwrap(wrapped, context=b"")


@pytest.mark.parametrize("position", [0, 8, 20, -1])
async def test_a_flipped_bit_is_noticed(position: int) -> None:
    kms = LocalKms(KEY)
    wrapped = bytearray(await kms.wrap(b"secret", context=b""))
    wrapped[position] ^= 1
    with pytest.raises(UnwrapFailed):
        await kms.unwrap(bytes(wrapped), context=b"")


async def test_the_key_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(base64.b64encode(KEY) + b"\n")
    wrapped = await LocalKms.from_file(path).wrap(b"secret", context=b"")
    assert await LocalKms(KEY).unwrap(wrapped, context=b"") == b"secret"


def test_a_missing_key_file_is_named_with_its_variable(tmp_path: Path) -> None:
    with pytest.raises(MasterKeyUnusable, match=r"KIMBERLY_MASTER_KEY_FILE: .*/none: No such file"):
        LocalKms.from_file(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"not base64!", base64.b64encode(KEY[:31])])
def test_a_wrong_key_file_is_named_with_its_variable(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(MasterKeyUnusable, match=r"KIMBERLY_MASTER_KEY_FILE: .*32 bytes in base64"):
        LocalKms.from_file(path)
