"""Both key managers, with master keys that a test rotates and destroys."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import pytest
import pytest_asyncio

from server.kms import Kms
from server.kms.local import LocalKms
from server.kms.vault import Vault, VaultKms, open_vault
from tests.kms.key_files import key_file
from tests.kms.vault_server import TOKEN, VaultServer, running


class Master(Protocol):
    """Master keys, and a process that uses them."""

    @property
    def kms(self) -> Kms:
        """The key manager of the process."""

    def rotate(self) -> None:
        """Add a version."""

    def destroy_oldest(self) -> None:
        """Destroy the first version that is left."""


class LocalMaster:
    """Master keys in a file."""

    def __init__(self, path: Path) -> None:
        self._keys = [os.urandom(32)]
        self._path = key_file(path, *self._keys)
        self.kms = LocalKms(path)

    def rotate(self) -> None:
        self._keys.append(os.urandom(32))
        key_file(self._path, *self._keys)

    def destroy_oldest(self) -> None:
        del self._keys[0]
        key_file(self._path, *self._keys)
        self.kms = LocalKms(self._path)


class VaultMaster:
    """Versions of a key of Vault."""

    def __init__(self, kms: VaultKms, server: VaultServer) -> None:
        self.kms = kms
        self._key = server.keys["kimberly"]

    def rotate(self) -> None:
        self._key.rotate()

    def destroy_oldest(self) -> None:
        self._key.oldest += 1


@pytest.fixture
def vault_server() -> Iterator[VaultServer]:
    """A Vault with a key that is called kimberly."""
    with running() as server:
        yield server


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "vault.token"
    path.touch(mode=0o600)
    path.write_text(f"{TOKEN}\n")
    return path


@asynccontextmanager
async def connected(
    server: VaultServer, token_file: Path, **others: str | Path
) -> AsyncIterator[VaultKms]:
    """Connect to a Vault as a service does."""
    named: dict[str, str | Path] = {"key": "kimberly", **others}
    vault = Vault(address=server.address, token_file=token_file, **named)  # type: ignore[arg-type]
    async with open_vault(vault) as kms:
        yield kms


@pytest_asyncio.fixture
async def vault(vault_server: VaultServer, token_file: Path) -> AsyncIterator[VaultKms]:
    async with connected(vault_server, token_file) as kms:
        yield kms


@pytest.fixture(params=["local", "vault"])
def master(request: pytest.FixtureRequest, tmp_path: Path) -> Master:
    """Every test that asks for it runs with both key managers."""
    if request.param == "local":
        return LocalMaster(tmp_path / "master.key")
    return VaultMaster(request.getfixturevalue("vault"), request.getfixturevalue("vault_server"))
