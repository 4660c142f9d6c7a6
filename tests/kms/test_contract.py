"""What both key managers promise."""

from __future__ import annotations

import pytest

from server.kms import UnwrapFailed
from tests.kms.conftest import Master


async def test_what_was_wrapped_comes_back(master: Master) -> None:
    wrapped = await master.kms.wrap(b"secret", context=b"here")
    assert b"secret" not in wrapped
    assert await master.kms.unwrap(wrapped, context=b"here") == b"secret"


async def test_secret_is_wrapped_differently_each_time(master: Master) -> None:
    first = await master.kms.wrap(b"secret", context=b"here")
    assert await master.kms.wrap(b"secret", context=b"here") != first


async def test_secret_is_bound_to_its_context(master: Master) -> None:
    wrapped = await master.kms.wrap(b"secret", context=b"here")
    with pytest.raises(UnwrapFailed):
        await master.kms.unwrap(wrapped, context=b"there")
    with pytest.raises(UnwrapFailed):
        await master.kms.rewrap(wrapped, context=b"there")


@pytest.mark.parametrize("position", [0, 8, 20, -5])
async def test_flipped_bit_is_noticed(master: Master, position: int) -> None:
    wrapped = bytearray(await master.kms.wrap(b"secret", context=b"here"))
    wrapped[position] ^= 1
    with pytest.raises(UnwrapFailed):
        await master.kms.unwrap(bytes(wrapped), context=b"here")


async def test_what_an_older_version_wrapped_is_wrapped_anew_by_the_newest(master: Master) -> None:
    kms = master.kms
    old = await kms.wrap(b"secret", context=b"here")
    assert kms.version_of(old) == await kms.newest_version()
    master.rotate()
    assert kms.version_of(old) != await kms.newest_version()
    assert await kms.unwrap(old, context=b"here") == b"secret"
    new = await kms.rewrap(old, context=b"here")
    assert kms.version_of(new) == await kms.newest_version()
    assert kms.version_of(await kms.wrap(b"", context=b"here")) == await kms.newest_version()
    master.destroy_oldest()
    assert await master.kms.unwrap(new, context=b"here") == b"secret"


async def test_what_a_destroyed_version_wrapped_is_lost(master: Master) -> None:
    old = await master.kms.wrap(b"secret", context=b"here")
    master.rotate()
    master.destroy_oldest()
    with pytest.raises(UnwrapFailed):
        await master.kms.unwrap(old, context=b"here")
    with pytest.raises(UnwrapFailed):
        await master.kms.rewrap(old, context=b"here")


async def test_what_the_other_key_manager_wrapped_is_no_riddle(master: Master) -> None:
    for foreign in (bytes(60), b"vault:v1:AAAA", b""):
        with pytest.raises(UnwrapFailed):
            await master.kms.unwrap(foreign, context=b"here")
