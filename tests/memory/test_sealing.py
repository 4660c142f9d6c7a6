"""Sensitive content, sealed: who opens it, and that every change of it is noticed."""

from __future__ import annotations

import hashlib
import os
from uuid import UUID

import grpc
import pytest
from kimberly.errors.v1 import errors_pb2

from server import ids
from server.caller import Caller
from server.errors import ContentUnreadable
from server.memory.sealing import binding, keyed_hash, seal, unseal
from server.rpc.status import code_of

KEY = bytes(range(32))
ADA = Caller(tenant_id=ids.new_id(), user_id=ids.new_id())
HERE = binding(ADA, ids.new_id())


@pytest.mark.parametrize("content", ["", "a", "PIN 4711", "näher 🙂", "x" * 65_536])
def test_what_was_sealed_opens(content: str) -> None:
    sealed = seal(KEY, content, HERE)
    assert unseal(KEY, sealed, HERE) == content
    assert len(sealed) == len(content.encode()) + 29


def test_sealed_content_shows_neither_the_text_nor_that_two_are_the_same() -> None:
    sealed = [seal(KEY, "PIN 4711", HERE) for _ in range(1000)]
    assert not any(b"PIN" in one or b"4711" in one for one in sealed)
    assert len(set(sealed)) == len({one[1:13] for one in sealed}) == 1000


@pytest.mark.parametrize("part", range(3))
def test_sealed_content_opens_as_no_other_memory(part: int) -> None:
    """A row that somebody moved to another memory, user or tenant."""
    sealed = seal(KEY, "PIN 4711", HERE)
    moved = bytearray(HERE)
    moved[part * 16 + 15] ^= 1
    with pytest.raises(ContentUnreadable):
        unseal(KEY, sealed, bytes(moved))


def test_other_key_opens_nothing() -> None:
    with pytest.raises(ContentUnreadable):
        unseal(os.urandom(32), seal(KEY, "PIN 4711", HERE), HERE)


def test_every_flipped_bit_is_noticed() -> None:
    sealed = seal(KEY, "PIN 4711", HERE)
    for position in range(len(sealed) * 8):
        damaged = bytearray(sealed)
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(ContentUnreadable):
            unseal(KEY, bytes(damaged), HERE)


def test_content_that_was_cut_does_not_open() -> None:
    sealed = seal(KEY, "PIN 4711", HERE)
    for size in range(len(sealed)):
        with pytest.raises(ContentUnreadable):
            unseal(KEY, sealed[:size], HERE)


def test_refusal_tells_nothing_of_the_content() -> None:
    with pytest.raises(ContentUnreadable) as refused:
        unseal(KEY, seal(KEY, "PIN 4711", HERE)[:-1], HERE)
    assert "4711" not in str(refused.value)


def test_same_content_of_one_user_has_one_hash_and_of_two_users_two() -> None:
    assert keyed_hash(KEY, "PIN 4711") == keyed_hash(KEY, "PIN 4711")
    assert keyed_hash(KEY, "PIN 4711") != keyed_hash(KEY, "PIN 4712")
    assert keyed_hash(KEY, "PIN 4711") != keyed_hash(os.urandom(32), "PIN 4711")
    assert len(keyed_hash(KEY, "PIN 4711")) == 32


def test_short_secret_is_not_found_by_trying_all_of_them() -> None:
    guesses = {hashlib.sha256(f"PIN {pin:04}".encode()).digest() for pin in range(10_000)}
    assert hashlib.sha256(b"PIN 4711").digest() in guesses, "a plain hash would be found"
    assert keyed_hash(KEY, "PIN 4711") not in guesses


def test_caller_is_told_that_data_is_lost() -> None:
    assert code_of(ContentUnreadable()) is grpc.StatusCode.DATA_LOSS
    assert errors_pb2.ErrorReason.Value(f"ERROR_REASON_{ContentUnreadable.reason}")


def test_formats_stay_readable() -> None:
    """What is stored today must open for as long as version 1 is known."""
    caller = Caller(tenant_id=UUID(int=1), user_id=UUID(int=2))
    sealed = bytes.fromhex(
        "01d0ee7a33cba555d29ca39e67957acd92d098eff713a77ff2489117f2c5fdef18905ef061"
    )
    assert unseal(KEY, sealed, binding(caller, UUID(int=3))) == "PIN 4711"
    assert (
        keyed_hash(KEY, "PIN 4711").hex()
        == "b7517237e3d0cf2989a0a96b2bd496dc96a0bb6e56715d6084fd3790928610b0"
    )
