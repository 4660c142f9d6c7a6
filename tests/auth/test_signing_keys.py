"""The keys that sign access tokens: made once, rotated, withdrawn, and known to all services."""

import asyncio
from collections import deque
from datetime import timedelta
from pathlib import Path

import asyncpg
import grpc
import pytest
from joserfc import jws
from kimberly.auth.v1 import auth_pb2 as pb
from kimberly.auth.v1 import auth_pb2_grpc as rpc

from server import ids
from server.access import Scope
from server.auth.access_tokens import Mint
from server.auth.key_store import KeyStore
from server.auth.keyring import Keyring
from server.auth.service import AuthService
from server.caller import Caller, Credentials
from server.errors import NotFound, Unauthenticated
from server.kms import UnwrapFailed
from server.kms.local import LocalKms
from server.tokens import PublicKeys, RemoteKeys, TokenVerifier
from tests.auth.conftest import (
    ACCESS_TOKEN_SECONDS,
    AUDIENCE,
    ISSUER,
    Auth,
    sign_up,
)
from tests.conftest import FakeClock, Serve
from tests.kms.key_files import key_file

CREDENTIALS = Credentials(
    Caller(tenant_id=ids.new_id(), user_id=ids.new_id()),
    ids.SESSION,
    ids.new_id(),
    frozenset({Scope.USER}),
)
JWKS_CACHE_SECONDS = 20


def kid_of(token: str) -> str:
    return str(jws.extract_compact(token.encode()).headers()["kid"])


async def test_ten_replicas_that_start_at_once_agree_on_one_key(
    key_store: KeyStore, kms: LocalKms, clock: FakeClock
) -> None:
    replicas = [
        Keyring(key_store, kms, access_token_seconds=ACCESS_TOKEN_SECONDS, clock=clock)
        for _ in range(10)
    ]
    await asyncio.gather(*(replica.ensure_signing_key() for replica in replicas))
    assert len({(await replica.signer()).kid for replica in replicas}) == 1
    assert len(await key_store.list_keys()) == 1


async def test_a_restarted_process_signs_with_the_key_it_had(
    keyring: Keyring, key_store: KeyStore, kms: LocalKms, clock: FakeClock
) -> None:
    await keyring.ensure_signing_key()
    restarted = Keyring(key_store, kms, access_token_seconds=600, clock=clock)
    assert (await restarted.signer()).kid == (await keyring.signer()).kid


async def test_the_private_key_is_stored_wrapped_only(
    keyring: Keyring, owner: asyncpg.Connection
) -> None:
    private = (await keyring.signer()).as_dict(private=True)["d"]
    row = await owner.fetchrow("SELECT signing_keys::text AS whole FROM signing_keys")
    wrapped = await owner.fetchval("SELECT wrapped_private_key FROM signing_keys")
    assert str(private) not in row["whole"]
    assert str(private).encode() not in wrapped


async def test_another_master_key_stops_the_start(
    keyring: Keyring, key_store: KeyStore, clock: FakeClock, tmp_path: Path
) -> None:
    await keyring.ensure_signing_key()
    other = LocalKms(key_file(tmp_path / "other.key", bytes(32)))
    stranger = Keyring(key_store, other, access_token_seconds=600, clock=clock)
    with pytest.raises(UnwrapFailed, match="another master key"):
        await stranger.ensure_signing_key()


async def test_concurrent_rotations_are_one_rotation(keyring: Keyring, key_store: KeyStore) -> None:
    await keyring.ensure_signing_key()
    taking_over = await asyncio.gather(*(keyring.rotate() for _ in range(5)))
    assert len({key.kid for key in taking_over}) == 1
    assert len(await key_store.list_keys()) == 2


async def test_a_key_signs_a_minute_after_it_was_published_and_stays_for_its_tokens(
    keyring: Keyring, clock: FakeClock
) -> None:
    old = (await keyring.signer()).kid
    new = (await keyring.rotate()).kid
    assert keyring.keys.keys() == {old, new}
    clock.advance(seconds=59)
    assert (await keyring.signer()).kid == old
    clock.advance(seconds=1)
    assert (await keyring.signer()).kid == new
    clock.advance(seconds=659)
    await keyring.refresh()
    assert keyring.keys.keys() == {old, new}
    clock.advance(seconds=1)
    await keyring.refresh()
    assert keyring.keys.keys() == {new}


async def test_a_key_in_the_wrong_hands_is_replaced_at_once(
    keyring: Keyring, owner: asyncpg.Connection
) -> None:
    lost = (await keyring.signer()).kid
    replacement = (await keyring.withdraw(str(lost))).kid
    assert (await keyring.signer()).kid == replacement
    assert keyring.keys.keys() == {replacement}
    stored = "SELECT wrapped_private_key FROM signing_keys WHERE kid = $1"
    assert await owner.fetchval(stored, lost) is None
    for unknown in (lost, "none"):
        with pytest.raises(NotFound):
            await keyring.withdraw(str(unknown))
    assert (await keyring.signer()).kid == replacement


async def test_withdrawing_a_key_that_signs_no_more_makes_no_other(
    keyring: Keyring, clock: FakeClock
) -> None:
    old = (await keyring.signer()).kid
    new = (await keyring.rotate()).kid
    clock.advance(minutes=1)
    assert (await keyring.withdraw(str(old))).kid == new
    assert keyring.keys.keys() == {new}


async def test_a_key_that_waits_to_sign_does_not_sign_early_for_one_that_was_lost(
    keyring: Keyring, clock: FakeClock
) -> None:
    lost = (await keyring.signer()).kid
    waiting = (await keyring.rotate()).kid
    between = (await keyring.withdraw(str(lost))).kid
    assert between not in {lost, waiting}
    clock.advance(minutes=1)
    assert (await keyring.signer()).kid == waiting


async def test_withdrawing_a_key_destroys_its_private_half(
    keyring: Keyring, clock: FakeClock, owner: asyncpg.Connection
) -> None:
    await keyring.rotate()
    clock.advance(minutes=20)
    await keyring.refresh()
    rows = await owner.fetch(
        "SELECT wrapped_private_key, withdrawn_at FROM signing_keys ORDER BY signs_from"
    )
    assert rows[0]["wrapped_private_key"] is None
    assert rows[0]["withdrawn_at"] == clock.now
    assert rows[1]["wrapped_private_key"] is not None


async def test_rotation_fails_no_call_although_key_sets_are_cached(
    keyring: Keyring, key_store: KeyStore, kms: LocalKms, mint: Mint, clock: FakeClock
) -> None:
    """Two replicas sign, one of them a reload late; verifiers hold key sets of 30 s ago."""
    replicas = [keyring, Keyring(key_store, kms, access_token_seconds=600, clock=clock)]
    step = 5
    published: deque[PublicKeys] = deque(maxlen=JWKS_CACHE_SECONDS // step + 1)
    living: deque[str] = deque(maxlen=2 * ACCESS_TOKEN_SECONDS // step)
    signers = set()
    for elapsed in range(0, 900, step):
        if elapsed == 60:
            await replicas[1].rotate()
        await replicas[elapsed // step % 2].refresh()
        published.append(replicas[elapsed // step % 2].keys)
        for replica in replicas:
            key = await replica.signer()
            signers.add(key.kid)
            living.append(mint.make(CREDENTIALS, key, clock.now, clock.now + mint.lifetime))
        oldest_copy = published[0]
        assert {kid_of(token) for token in living} <= oldest_copy.keys()
        clock.advance(seconds=step)
    assert len(signers) == 2
    assert len(keyring.keys) == 1


async def test_the_key_set_has_exactly_the_members_of_its_standard(
    auth: Auth, keyring: Keyring
) -> None:
    tokens = await sign_up(auth)
    await keyring.rotate()
    response = await auth.GetJwks(pb.GetJwksRequest())
    assert len(response.keys) == 2
    for key in response.keys:
        assert (key.kty, key.crv, key.use, key.alg) == ("EC", "P-256", "sig", "ES256")
        assert (len(key.x), len(key.y)) == (43, 43)
    assert kid_of(tokens.access_token) in {key.kid for key in response.keys}


async def test_other_processes_keep_the_last_good_key_set_while_auth_is_away(
    service: AuthService, keyring: Keyring, clock: FakeClock, mint: Mint, tmp_path: Path
) -> None:
    server = grpc.aio.server()
    rpc.add_AuthServiceServicer_to_server(service, server)
    server.add_insecure_port(f"unix:{tmp_path}/auth")
    await server.start()
    key = await keyring.signer()
    token = mint.make(CREDENTIALS, key, clock.now, clock.now + timedelta(minutes=10))
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/auth") as channel:
        remote = RemoteKeys(channel, refresh_seconds=30)
        checks = TokenVerifier(remote, issuer=ISSUER, audience=AUDIENCE, ended=(), clock=clock)
        assert await checks.verify(token) == CREDENTIALS
        known = remote.keys
        await remote.refresh()
        assert remote.keys is known
        await server.stop(None)
        await remote.refresh()
        assert remote.keys is known
        assert await checks.verify(token) == CREDENTIALS


async def test_other_processes_forget_a_withdrawn_key_with_their_next_fetch(
    serve: Serve, service: AuthService, keyring: Keyring, clock: FakeClock
) -> None:
    channel = await serve(lambda server: rpc.add_AuthServiceServicer_to_server(service, server))
    remote = RemoteKeys(channel, refresh_seconds=30)
    old = (await keyring.signer()).kid
    await keyring.rotate()
    await remote.refresh()
    assert old in remote.keys
    clock.advance(minutes=20)
    await keyring.refresh()
    await remote.refresh()
    assert old not in remote.keys


async def test_a_token_of_a_withdrawn_key_is_refused(
    keyring: Keyring, mint: Mint, clock: FakeClock, verifier: TokenVerifier
) -> None:
    key = await keyring.signer()
    await keyring.rotate()
    clock.advance(minutes=20)
    await keyring.refresh()
    token = mint.make(CREDENTIALS, key, clock.now, clock.now + mint.lifetime)
    with pytest.raises(Unauthenticated):
        await verifier.verify(token)
