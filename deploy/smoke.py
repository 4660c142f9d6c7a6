"""Asks a mesh that was just released to do its main job once, as a new user over REST."""

import secrets
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import httpx

_SENTENCE: Final = "The release was tried by nobody but a machine"
_PATIENCE_SECONDS: Final = 60.0


class Failed(Exception):
    """A step did not do what it promises."""


@dataclass(frozen=True, slots=True)
class Account:
    """An account that is there to try releases with."""

    email: str
    password: str


def smoke(
    edge: str,
    trust: ssl.SSLContext | None = None,
    *,
    account: Account | None = None,
    patience_seconds: float = _PATIENCE_SECONDS,
) -> str:
    """Sign up or log in, remember a sentence, find it, delete it, log out.

    Args:
        edge: Base URL.
        trust: What the certificate of the edge is verified with; None: public authorities.
        account: Whom to log in as; None: sign up, which needs a mesh that confirms no emails.
        patience_seconds: How long to wait until the edge reaches every service.

    Returns:
        How long that took.

    Raises:
        Failed: Says which step did not, and what was answered.
    """
    with httpx.Client(
        base_url=edge, verify=trust or ssl.create_default_context(), timeout=15
    ) as client:
        _wait(lambda: client.get("/healthz"), patience_seconds)
        began = time.monotonic()
        _use(client, _log_in(client, account) if account else _sign_up(client))
        return f"{time.monotonic() - began:.2f} s"


def _log_in(client: httpx.Client, account: Account) -> dict[str, str]:
    told = {"email": account.email, "password": account.password}
    return dict(_call(client, "POST", "/v1/login", told)["tokens"])


def _sign_up(client: httpx.Client) -> dict[str, str]:
    told = {
        "email": f"smoke-{secrets.token_hex(8)}@example.com",
        "password": secrets.token_hex(16),
    }
    answer = _call(client, "POST", "/v1/signup", told)
    if "tokens" not in answer:
        raise Failed("POST /v1/signup: a mail has to confirm it; give an account to log in as")
    return dict(answer["tokens"])


def _use(client: httpx.Client, tokens: dict[str, str]) -> None:
    client.headers["authorization"] = f"Bearer {tokens['accessToken']}"
    consent = {"purpose": "CONSENT_PURPOSE_MEMORY_STORE", "granted": True}
    _call(client, "POST", "/v1/user/consents", consent)
    memory = _call(client, "POST", "/v1/memories", {"memory": {"content": _SENTENCE}})["memory"]
    found = _call(client, "POST", "/v1/memories:query", {"query": "who tried the release"})
    if memory["id"] not in {match["memory"]["id"] for match in found["matches"]}:
        raise Failed("what was remembered was not found")
    _call(client, "DELETE", f"/v1/memories/{memory['id']}")
    _call(client, "POST", "/v1/logout", {"refreshToken": tokens["refreshToken"]})


def _call(client: httpx.Client, method: str, path: str, body: object = None) -> Any:
    try:
        answer = client.request(method, path, json=body)
    except httpx.TransportError as error:
        raise Failed(f"{method} {path}: {error!r}") from error
    if answer.status_code != httpx.codes.OK:
        raise Failed(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
    return answer.json()


def _wait(ask: Callable[[], httpx.Response], patience_seconds: float) -> None:
    deadline = time.monotonic() + patience_seconds
    said = ""
    while time.monotonic() < deadline:
        try:
            answer = ask()
        except httpx.TransportError as error:
            said = repr(error)
        else:
            if answer.status_code == httpx.codes.OK:
                return
            said = f"{answer.status_code}"
        time.sleep(0.5)
    raise Failed(f"/healthz: {said}")
