"""A key manager that is a key of HashiCorp Vault's transit engine, over its HTTP API."""

import asyncio
import base64
import random
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import structlog

from server.errors import StoreUnavailable
from server.kms import KmsUnusable, UnwrapFailed
from server.kms.private_files import read_private

log = structlog.get_logger()

_KEY_TYPE: Final = "aes256-gcm96"
_TRIES: Final = 4
_TRY_SECONDS: Final = 2.0
_ALL_TRIES_SECONDS: Final = 5.0
_FIRST_PAUSE_SECONDS: Final = 0.1
_CIPHERTEXT: Final = re.compile(rb"(vault:v[1-9][0-9]*):[A-Za-z0-9+/=]+")
_PASSING: Final = {412, 429, 500, 502, 503, 504}
"""412: a replica of Vault that is still behind. 429: it was asked too often."""
_UNAUTHENTIC: Final = "message authentication failed"
"""Several versions of Vault say this of a wrong context with status 500 (vault#10842)."""


@dataclass(frozen=True, slots=True)
class Vault:
    """Where the key is, and how to be let in."""

    address: str
    token_file: Path
    """Read anew for every call: an agent renews it."""
    key: str
    mount: str = "transit"
    namespace: str = ""
    ca_file: Path | None = None
    """None: the authorities that the system trusts."""


class _Refused(Exception):
    """Vault answered, and asking again will not help."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason or 'no reason given'}")
        self.status = status
        self.reason = reason


class VaultKms:
    """Wraps with a transit key that never leaves Vault; `rewrap` shows the secret to nobody.

    The context goes into the derivation of the key, which transit ignores unless the key was made
    with `derived=true`: so a key that was not is refused. (`associated_data` would bind as well,
    but `rewrap` of Vault knows nothing of it: vault#31791.)
    """

    def __init__(self, vault: Vault, client: httpx.AsyncClient) -> None:
        self._vault = vault
        self._client = client
        self._is_checked = False

    async def check(self) -> None:
        """Look at the key before it is used.

        Raises:
            KmsUnusable: There is no such key, it is of another kind, or Vault does not let us in.
            StoreUnavailable: Vault does not answer.
        """
        await self._read_key()
        self._is_checked = True

    async def wrap(self, secret: bytes, *, context: bytes) -> bytes:
        """Encrypt a secret; see `server.kms.Kms`."""
        if not self._is_checked:
            await self.check()
        body = {"plaintext": _base64(secret), "context": _base64(context)}
        try:
            answer = await self._post("encrypt", body)
        except _Refused as error:
            raise self._unavailable("encrypt", error) from error
        return self._ciphertext("encrypt", answer)

    async def unwrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the secret.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
            StoreUnavailable: Vault does not answer, or does not let us in.
        """
        answer = await self._post_wrapped("decrypt", wrapped, context)
        try:
            return base64.b64decode(answer["plaintext"], validate=True)
        except (KeyError, TypeError, ValueError) as error:
            raise self._unavailable("decrypt", "no plaintext in the answer") from error

    async def rewrap(self, wrapped: bytes, *, context: bytes) -> bytes:
        """Return the same secret, wrapped by the newest version.

        Raises:
            UnwrapFailed: Another key, another context, or damage.
            StoreUnavailable: Vault does not answer, or does not let us in.
        """
        return self._ciphertext("rewrap", await self._post_wrapped("rewrap", wrapped, context))

    async def newest_version(self) -> str:
        """Return the name of the newest version of the key, such as "vault:v3"."""
        data = await self._read_key()
        return f"vault:v{max(map(int, data['keys']))}"

    def version_of(self, wrapped: bytes) -> str:
        """Return the name of the version that wrapped a secret."""
        match = _CIPHERTEXT.fullmatch(wrapped)
        return match[1].decode() if match else "unknown"

    async def _read_key(self) -> Mapping[str, Any]:
        """Return what Vault tells of the key, if it is of the kind that we need."""
        name = f"{self._vault.mount}/keys/{self._vault.key}"
        try:
            data = await self._ask("GET", f"/v1/{name}")
        except _Refused as error:
            raise KmsUnusable(f"KIMBERLY_VAULT_KEY: {name}: {error}") from error
        if data.get("type") != _KEY_TYPE or not data.get("derived") or not data.get("keys"):
            raise KmsUnusable(
                f"KIMBERLY_VAULT_KEY: {name} must be a derived key of type {_KEY_TYPE}; make one "
                f"with: vault write {name} type={_KEY_TYPE} derived=true"
            )
        return data

    async def _post_wrapped(
        self, operation: str, wrapped: bytes, context: bytes
    ) -> Mapping[str, Any]:
        if not _CIPHERTEXT.fullmatch(wrapped):
            raise UnwrapFailed("wrapped by another key manager than Vault, or damaged")
        body = {"ciphertext": wrapped.decode(), "context": _base64(context)}
        try:
            return await self._post(operation, body)
        except _Refused as error:
            if error.status in (400, 500):
                raise UnwrapFailed(f"Vault: {error}") from error
            raise self._unavailable(operation, error) from error

    async def _post(self, operation: str, body: Mapping[str, str]) -> Mapping[str, Any]:
        return await self._ask(
            "POST", f"/v1/{self._vault.mount}/{operation}/{self._vault.key}", body
        )

    async def _ask(
        self, method: str, path: str, body: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        """Return the `data` of an answer; ask several times while that may help."""
        try:
            async with asyncio.timeout(_ALL_TRIES_SECONDS):
                for number in range(_TRIES):
                    try:
                        return await self._try(method, path, body)
                    except StoreUnavailable:
                        if number == _TRIES - 1:
                            raise
                    pause = _FIRST_PAUSE_SECONDS * 2**number
                    await asyncio.sleep(pause * random.uniform(0.5, 1))  # noqa: S311 - spreads
        except TimeoutError as error:
            raise self._unavailable(path, error) from error
        raise AssertionError("the last try returns or raises")

    async def _try(
        self, method: str, path: str, body: Mapping[str, str] | None
    ) -> Mapping[str, Any]:
        try:
            response = await self._client.request(method, path, headers=self._headers(), json=body)
        except httpx.TransportError as error:
            raise self._unavailable(path, error) from error
        if response.status_code != httpx.codes.OK:
            refused = _Refused(response.status_code, _reason(response))
            if refused.status in _PASSING and _UNAUTHENTIC not in refused.reason:
                raise self._unavailable(path, refused)
            raise refused
        data = _object(response).get("data")
        if not isinstance(data, dict):
            raise self._unavailable(path, "an answer without data")
        return data

    def _headers(self) -> dict[str, str]:
        headers = {"X-Vault-Request": "true", "X-Vault-Token": _token(self._vault.token_file)}
        if self._vault.namespace:
            headers["X-Vault-Namespace"] = self._vault.namespace
        return headers

    def _ciphertext(self, operation: str, answer: Mapping[str, Any]) -> bytes:
        wrapped = str(answer.get("ciphertext")).encode()
        if not _CIPHERTEXT.fullmatch(wrapped):
            raise self._unavailable(operation, "no ciphertext in the answer")
        return wrapped

    def _unavailable(self, what: str, error: Exception | str) -> StoreUnavailable:
        log.warning("vault out of reach", request=what, error=str(error) or repr(error))
        return StoreUnavailable("the key manager")


@asynccontextmanager
async def open_vault(vault: Vault) -> AsyncIterator[VaultKms]:
    """Connect to Vault. One that does not answer yet is waited for by those who need it.

    Raises:
        KmsUnusable: The key, the token or the certificate authority is not what it should be.
    """
    async with httpx.AsyncClient(
        base_url=vault.address,
        verify=_trust(vault.ca_file),
        timeout=_TRY_SECONDS,
        # No proxy of the environment sees the token, and no redirect carries it elsewhere.
        trust_env=False,
        follow_redirects=False,
    ) as client:
        kms = VaultKms(vault, client)
        try:
            await kms.check()
        except StoreUnavailable:
            log.warning("vault does not answer yet", address=vault.address)
        yield kms


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise KmsUnusable(
            f"KIMBERLY_VAULT_CA_FILE: {ca_file}: {error.strerror or 'holds no certificates'}"
        ) from error


def _token(path: Path) -> str:
    # What a header cannot hold would be quoted in the error, and so in the log.
    token = read_private(path, "KIMBERLY_VAULT_TOKEN_FILE").strip().decode(errors="replace")
    if not (token.isascii() and token.isprintable() and token and " " not in token):
        raise KmsUnusable(f"KIMBERLY_VAULT_TOKEN_FILE: {path} must hold one token and nothing else")
    return token


def _reason(response: httpx.Response) -> str:
    """Return what Vault says went wrong: {"errors": ["…"]}, possibly on several lines."""
    errors = _object(response).get("errors")
    return " ".join(" ".join(map(str, errors)).split()) if isinstance(errors, list) else ""


def _object(response: httpx.Response) -> Mapping[str, Any]:
    try:
        content = response.json()
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
