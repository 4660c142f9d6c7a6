"""Master keys in HashiCorp Vault: what it is asked, and what happens when it does not answer."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import ssl
from pathlib import Path

import pytest
import structlog

from local.certificates import Authority, Names
from server.errors import StoreUnavailable
from server.kms import KmsUnusable, UnwrapFailed
from server.kms.vault import VaultKms
from tests.kms.conftest import connected
from tests.kms.vault_server import TOKEN, TransitKey, VaultServer, running

SEALED = json.dumps({"errors": ["Vault is sealed"]}).encode()
BEHIND = json.dumps({"errors": ["required index state not present"]}).encode()


def renew(token_file: Path, token: str, mode: int = 0o600) -> None:
    """Write a token as an agent of Vault does."""
    token_file.write_text(token)
    token_file.chmod(mode)


async def test_calls_are_those_of_the_transit_engine(
    vault_server: VaultServer, token_file: Path
) -> None:
    async with connected(vault_server, token_file, namespace="teams/memory") as kms:
        wrapped = await kms.wrap(b"secret", context=b"here")
        await kms.unwrap(wrapped, context=b"here")
        await kms.rewrap(wrapped, context=b"here")
    assert wrapped.startswith(b"vault:v1:")
    assert [(request.method, request.path) for request in vault_server.seen] == [
        ("GET", "/v1/transit/keys/kimberly"),
        ("POST", "/v1/transit/encrypt/kimberly"),
        ("POST", "/v1/transit/decrypt/kimberly"),
        ("POST", "/v1/transit/rewrap/kimberly"),
    ]
    for request in vault_server.seen:
        assert request.headers["X-Vault-Token"] == TOKEN
        assert request.headers["X-Vault-Namespace"] == "teams/memory"
        assert request.headers["X-Vault-Request"] == "true"


@pytest.mark.parametrize(
    "failure", [(503, SEALED), (500, b""), (412, BEHIND), (429, b"{}"), (0, b"")]
)
async def test_what_passes_is_asked_again(
    vault: VaultKms, vault_server: VaultServer, failure: tuple[int, bytes]
) -> None:
    vault_server.failures.extend([failure, failure])
    wrapped = await vault.wrap(b"secret", context=b"here")
    vault_server.failures.append(failure)
    assert await vault.unwrap(wrapped, context=b"here") == b"secret"


async def test_what_does_not_pass_is_unavailable_after_a_few_tries(
    vault: VaultKms, vault_server: VaultServer
) -> None:
    vault_server.failures.extend([(503, SEALED)] * 100)
    asked = len(vault_server.seen)
    with pytest.raises(StoreUnavailable, match="the key manager does not answer"):
        await vault.wrap(b"secret", context=b"here")
    assert len(vault_server.seen) - asked == 4


async def test_vault_that_does_not_answer_is_given_up_in_time(
    vault: VaultKms, vault_server: VaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.kms.vault._ALL_TRIES_SECONDS", 0.2)
    vault_server.answers.clear()
    asked = len(vault_server.seen)
    with pytest.raises(StoreUnavailable):
        await vault.wrap(b"secret", context=b"here")
    # In the middle of the first try, which by itself may take longer.
    assert len(vault_server.seen) - asked <= 1


async def test_deadline_of_the_call_is_not_taken_for_a_slow_vault(
    vault: VaultKms, vault_server: VaultServer
) -> None:
    vault_server.answers.clear()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await vault.wrap(b"secret", context=b"here")


@pytest.mark.parametrize("status", [400, 500])
async def test_wrong_context_is_no_outage_whatever_its_status(
    vault: VaultKms, vault_server: VaultServer, status: int
) -> None:
    vault_server.unauthentic = status
    wrapped = await vault.wrap(b"secret", context=b"here")
    asked = len(vault_server.seen)
    with pytest.raises(UnwrapFailed, match="message authentication failed"):
        await vault.unwrap(wrapped, context=b"there")
    assert len(vault_server.seen) - asked == 1


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b'{"data": null}', b'{"data": {}}'])
async def test_answer_that_is_none_of_vaults_is_unavailable(
    vault: VaultKms, vault_server: VaultServer, answer: bytes
) -> None:
    wrapped = await vault.wrap(b"secret", context=b"here")
    vault_server.failures.extend([(200, answer)] * 8)
    with pytest.raises(StoreUnavailable):
        await vault.wrap(b"secret", context=b"here")
    with pytest.raises(StoreUnavailable):
        await vault.unwrap(wrapped, context=b"here")


@pytest.mark.parametrize("status", [301, 307, 403, 404])
async def test_token_is_carried_nowhere_else_and_a_refusal_is_not_repeated(
    vault: VaultKms, vault_server: VaultServer, status: int
) -> None:
    wrapped = await vault.wrap(b"secret", context=b"here")
    asked = len(vault_server.seen)
    vault_server.failures.append((status, b""))
    with pytest.raises(StoreUnavailable):
        await vault.unwrap(wrapped, context=b"here")
    assert len(vault_server.seen) - asked == 1


async def test_proxy_of_the_environment_sees_no_token(
    vault_server: VaultServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running() as proxy:
        for variable in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(variable, proxy.address)
        async with connected(vault_server, token_file) as kms:
            await kms.wrap(b"secret", context=b"here")
        assert not proxy.seen


async def test_renewed_token_is_taken_up_without_a_restart(
    vault: VaultKms, vault_server: VaultServer, token_file: Path
) -> None:
    vault_server.token = "hvs.renewed"
    with pytest.raises(StoreUnavailable):
        await vault.wrap(b"secret", context=b"here")
    renew(token_file, "hvs.renewed")
    assert await vault.wrap(b"secret", context=b"here")


async def test_key_that_ignores_the_context_is_refused(
    vault_server: VaultServer, token_file: Path
) -> None:
    vault_server.keys["plain"] = TransitKey(derived=False)
    with pytest.raises(KmsUnusable, match=r"KIMBERLY_VAULT_KEY: .*plain must be a derived key"):
        async with connected(vault_server, token_file, key="plain"):
            pass
    # Why: it would unwrap one user's data key as another's.
    plain = vault_server.keys["plain"]
    assert plain.decrypt(plain.encrypt(b"secret", b"ada"), b"bob", unauthentic=400) == b"secret"


@pytest.mark.parametrize(
    ("key", "reason"), [("missing", "status 404"), ("signing", "must be a derived key of type")]
)
async def test_unusable_key_stops_the_start(
    vault_server: VaultServer, token_file: Path, key: str, reason: str
) -> None:
    vault_server.keys["signing"] = TransitKey(type="ed25519")
    with pytest.raises(KmsUnusable, match=f"KIMBERLY_VAULT_KEY: transit/keys/{key}.*{reason}"):
        async with connected(vault_server, token_file, key=key):
            pass


async def test_wrong_token_stops_the_start_and_is_not_named(
    vault_server: VaultServer, token_file: Path
) -> None:
    vault_server.token = "another"
    with pytest.raises(KmsUnusable, match="status 403: permission denied") as refused:
        async with connected(vault_server, token_file):
            pass
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("content", ["", "two words", f"{TOKEN}\nX-Forged: yes", "\x00", "ünsafe"])
async def test_token_file_that_holds_no_token_is_named_without_its_content(
    vault_server: VaultServer, token_file: Path, content: str
) -> None:
    renew(token_file, content)
    with pytest.raises(
        KmsUnusable, match=r"KIMBERLY_VAULT_TOKEN_FILE: .* must hold one"
    ) as refused:
        async with connected(vault_server, token_file):
            pass
    assert TOKEN not in str(refused.value)


async def test_token_file_that_others_may_read_is_refused(
    vault_server: VaultServer, token_file: Path
) -> None:
    renew(token_file, TOKEN, mode=0o644)
    with pytest.raises(KmsUnusable, match=r"KIMBERLY_VAULT_TOKEN_FILE: .* open to others"):
        async with connected(vault_server, token_file):
            pass


async def test_start_does_not_wait_for_a_vault_that_is_away_but_its_first_use_checks_the_key(
    vault_server: VaultServer, token_file: Path
) -> None:
    vault_server.keys["kimberly"].derived = False
    vault_server.failures.extend([(503, SEALED)] * 4)
    async with connected(vault_server, token_file) as kms:
        with pytest.raises(KmsUnusable):
            await kms.wrap(b"secret", context=b"here")
        vault_server.keys["kimberly"].derived = True
        assert await kms.wrap(b"secret", context=b"here")


async def test_neither_token_nor_secret_is_logged(
    vault: VaultKms, vault_server: VaultServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as logs:
        wrapped = await vault.wrap(b"a secret to keep", context=b"here")
        with pytest.raises(UnwrapFailed):
            await vault.unwrap(wrapped, context=b"there")
        vault_server.failures.extend([(503, SEALED)] * 4)
        with pytest.raises(StoreUnavailable):
            await vault.unwrap(wrapped, context=b"here")
        vault_server.token = "another"
        with pytest.raises(StoreUnavailable):
            await vault.unwrap(wrapped, context=b"here")
    told = repr(logs) + caplog.text
    assert "Vault is sealed" in told
    for secret in (TOKEN, "a secret to keep", "YSBzZWNyZXQgdG8ga2VlcA", wrapped.decode()):
        assert secret not in told


async def test_vault_is_trusted_by_its_certificate_only(tmp_path: Path, token_file: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    authority = Authority.open(tmp_path / "ca", now=now)
    authority.ensure("vault", Names(addresses=("127.0.0.1",)), now=now)
    files = authority.identity("vault") / "current"
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files / "tls.crt", files / "tls.key")
    with running(tls) as server:
        async with connected(server, token_file, ca_file=files / "ca.crt") as kms:
            wrapped = await kms.wrap(b"secret", context=b"here")
            assert await kms.unwrap(wrapped, context=b"here") == b"secret"
        asked = len(server.seen)
        async with connected(server, token_file) as kms:
            with pytest.raises(StoreUnavailable):
                await kms.wrap(b"secret", context=b"here")
        assert len(server.seen) == asked


@pytest.mark.parametrize("content", [None, b"no certificate"])
async def test_authority_that_is_none_is_named(
    vault_server: VaultServer, token_file: Path, tmp_path: Path, content: bytes | None
) -> None:
    ca_file = tmp_path / "ca.pem"
    if content:
        ca_file.write_bytes(content)
    with pytest.raises(KmsUnusable, match=r"KIMBERLY_VAULT_CA_FILE: .*ca.pem: "):
        async with connected(vault_server, token_file, ca_file=ca_file):
            pass
