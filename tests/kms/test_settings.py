"""What the person who starts a service is told about key managers."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from server.settings import Settings, explain

GIVEN = {
    "database_url": "postgresql://a",
    "system_database_url": "postgresql://b",
    "redis_url": "redis://c",
    "s3_endpoint": "s3:80",
    "s3_access_key": "d",
    "s3_secret_key": "e",
    "listen_socket": "/run/f",
    "outbound_socket": "/run/g",
    "token_issuer": "https://h",
    "trust_domain": "i",
    "namespace": "j",
}
VAULT = {"kms": "vault", "vault_address": "https://vault:8200", "vault_token_file": "/run/token"}


def told(**settings: str) -> str:
    with pytest.raises(ValidationError) as refused:
        Settings(**(GIVEN | settings))  # type: ignore[arg-type]
    return explain(refused.value)


def test_each_key_manager_asks_for_what_it_needs() -> None:
    assert "KIMBERLY_MASTER_KEY_FILE: Field required with KIMBERLY_KMS=local" in told()
    assert "MASTER_KEY_FILE" not in told(kms="vault")
    assert "KIMBERLY_VAULT_ADDRESS: Field required with KIMBERLY_KMS=vault" in told(kms="vault")
    assert "KIMBERLY_VAULT_TOKEN_FILE: Field required with KIMBERLY_KMS=vault" in told(kms="vault")
    assert "KIMBERLY_KMS: Input should be 'local' or 'vault'" in told(kms="paper")
    Settings(**(GIVEN | {"master_key_file": "/run/key"}))  # type: ignore[arg-type]
    Settings(**(GIVEN | VAULT))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "address", ["http://vault:8200", "vault:8200", "https://", "https://u:p@vault", "https://v?a=b"]
)
def test_token_is_never_sent_in_the_clear(address: str) -> None:
    assert "KIMBERLY_VAULT_ADDRESS: must be https://" in told(
        **(VAULT | {"vault_address": address})
    )


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8200", "http://localhost:1", "http://[::1]/"]
)
def test_vault_of_this_machine_needs_no_certificate(address: str) -> None:
    Settings(**(GIVEN | VAULT | {"vault_address": address}))  # type: ignore[arg-type]


@pytest.mark.parametrize("key", ["", "../sys/seal", "a/b", "a?b"])
def test_name_of_a_key_leads_nowhere_else(key: str) -> None:
    assert "KIMBERLY_VAULT_KEY: " in told(**(VAULT | {"vault_key": key}))
