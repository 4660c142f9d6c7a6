"""A small Vault: the HTTP contract of its transit engine, with keys that rotate and can fail."""

from __future__ import annotations

import base64
import json
import os
import ssl
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

TOKEN = "hvs.CAESIJ-not-a-real-token"


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, error: str) -> None:
        self.status = status
        self.error = error


@dataclass
class TransitKey:
    """A named key with its versions."""

    type: str = "aes256-gcm96"
    derived: bool = True
    oldest: int = 1
    versions: list[bytes] = field(default_factory=lambda: [os.urandom(32)])

    def rotate(self) -> None:
        self.versions.append(os.urandom(32))

    def described(self) -> Mapping[str, Any]:
        keys = {str(number + 1): 1442851412 for number in range(len(self.versions))}
        return {"type": self.type, "derived": self.derived, "keys": keys}

    def encrypt(self, plaintext: bytes, context: bytes) -> str:
        nonce = os.urandom(12)
        sealed = self._cipher(len(self.versions), context).encrypt(nonce, plaintext, None)
        return f"vault:v{len(self.versions)}:{base64.b64encode(nonce + sealed).decode()}"

    def decrypt(self, ciphertext: str, context: bytes, *, unauthentic: int) -> bytes:
        _, version, data = ciphertext.split(":")
        if int(version[1:]) < self.oldest:
            raise Refusal(400, "ciphertext or signature version is disallowed by policy (too old)")
        sealed = base64.b64decode(data)
        try:
            return self._cipher(int(version[1:]), context).decrypt(sealed[:12], sealed[12:], None)
        except ValueError as error:
            raise Refusal(400, "invalid ciphertext: could not decode") from error
        except InvalidTag as error:
            raise Refusal(unauthentic, "cipher: message authentication failed") from error

    def _cipher(self, version: int, context: bytes) -> AESGCM:
        if not self.derived:  # as Vault does: a context is then ignored
            return AESGCM(self.versions[version - 1])
        if not context:
            raise Refusal(400, "missing 'context' for key derivation")
        derivation = HKDF(hashes.SHA256(), 32, salt=None, info=context)
        return AESGCM(derivation.derive(self.versions[version - 1]))


@dataclass(frozen=True)
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class VaultServer:
    """What the server keeps, and how it is to fail."""

    keys: dict[str, TransitKey] = field(default_factory=lambda: {"kimberly": TransitKey()})
    token: str = TOKEN
    unauthentic: int = 400
    """Status of a failed authentication; several versions of Vault say 500."""
    answers: threading.Event = field(default_factory=threading.Event)
    """Not set, it takes requests and lets them wait."""
    failures: deque[tuple[int, bytes]] = field(default_factory=deque)
    """Answers to the next requests, in place of the true ones. Status 0 hangs up."""
    seen: list[Seen] = field(default_factory=list)
    address: str = ""

    def answer(self, method: str, path: str, token: str, body: Mapping[str, str]) -> object:
        if token != self.token:
            raise Refusal(403, "permission denied")
        match method, path.strip("/").split("/"):
            case "GET", ["v1", "transit", "keys", name]:
                return self._key(name, 404).described()
            case "POST", ["v1", "transit", "encrypt", name]:
                plaintext = base64.b64decode(body["plaintext"])
                return {"ciphertext": self._key(name).encrypt(plaintext, _context(body))}
            case "POST", ["v1", "transit", "decrypt", name]:
                return {"plaintext": base64.b64encode(self._decrypt(name, body)).decode()}
            case "POST", ["v1", "transit", "rewrap", name]:
                plaintext = self._decrypt(name, body)
                return {"ciphertext": self._key(name).encrypt(plaintext, _context(body))}
        raise Refusal(404, f"no handler for route {path!r}")

    def _decrypt(self, name: str, body: Mapping[str, str]) -> bytes:
        key = self._key(name)
        return key.decrypt(body["ciphertext"], _context(body), unauthentic=self.unauthentic)

    def _key(self, name: str, missing: int = 400) -> TransitKey:
        if name not in self.keys:
            raise Refusal(missing, "" if missing == 404 else "encryption key not found")
        return self.keys[name]


def _context(body: Mapping[str, str]) -> bytes:
    return base64.b64decode(body.get("context", ""))


class Listener(ThreadingHTTPServer):
    """Serves a Vault."""

    daemon_threads = True

    def __init__(self, vault: VaultServer, tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.vault = vault
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True)

    def handle_error(self, *_arguments: object) -> None:
        """Say nothing of clients that hang up, or that trust no certificate."""


class Handler(BaseHTTPRequestHandler):
    """Speaks HTTP with one client."""

    protocol_version = "HTTP/1.1"
    server: Listener

    def do_GET(self) -> None:
        self._serve({})

    def do_POST(self) -> None:
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: Mapping[str, str]) -> None:
        vault = self.server.vault
        vault.seen.append(Seen(self.command, self.path, dict(self.headers)))
        vault.answers.wait()
        if vault.failures:
            self._send(*vault.failures.popleft())
            return
        token = self.headers.get("X-Vault-Token", "")
        try:
            data = vault.answer(self.command, self.path, token, body)
            self._send(200, json.dumps({"request_id": "1", "data": data}).encode())
        except Refusal as refusal:
            errors = [refusal.error] if refusal.error else []
            self._send(refusal.status, json.dumps({"errors": errors}).encode())

    def _send(self, status: int, content: bytes) -> None:
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Location", "http://elsewhere.invalid/")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_arguments: object) -> None:
        """Say nothing."""


@contextmanager
def running(tls: ssl.SSLContext | None = None) -> Iterator[VaultServer]:
    """Run a Vault on a port of the loopback interface."""
    vault = VaultServer()
    vault.answers.set()
    listener = Listener(vault, tls)
    vault.address = f"http{'s' if tls else ''}://127.0.0.1:{listener.server_port}"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield vault
    finally:
        vault.answers.set()
        listener.shutdown()
        listener.server_close()
        thread.join()
