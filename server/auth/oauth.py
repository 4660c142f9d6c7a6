"""OAuth 2.0 at the token endpoint: forms, clients, and the standard's own words for errors."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote_plus

FORM: Final = "application/x-www-form-urlencoded"
REFRESH_TOKEN: Final = "refresh_token"  # noqa: S105 - the name of a grant
CLIENT_CREDENTIALS: Final = "client_credentials"
TOKEN_EXCHANGE: Final = "urn:ietf:params:oauth:grant-type:token-exchange"  # noqa: S105 - a name
ACCESS_TOKEN_TYPE: Final = "urn:ietf:params:oauth:token-type:access_token"  # noqa: S105 - a name
API_KEY_TYPE: Final = "urn:kimberly:token-type:api-key"
GRANTS: Final = (REFRESH_TOKEN, CLIENT_CREDENTIALS, TOKEN_EXCHANGE)

_MOST_FIELDS: Final = 20


class OAuthError(Exception):
    """A refusal in the words of RFC 6749, section 5.2."""

    def __init__(self, error: str, description: str, status: int = 400) -> None:
        super().__init__(description)
        self.error = error
        self.description = description
        self.status = status


@dataclass(frozen=True, slots=True)
class Client:
    """Who a client says it is; empty where it says nothing."""

    id: str = ""
    secret: str = ""


def read_form(content_type: str, body: bytes) -> Mapping[str, str]:
    """Return the fields of a form. Empty ones count as absent (RFC 6749, section 3.2).

    Raises:
        OAuthError: It is no form, or a field comes twice.
    """
    if content_type.partition(";")[0].strip().lower() != FORM:
        raise OAuthError("invalid_request", f"the body must be {FORM}")
    try:
        pairs = parse_qsl(body.decode(), strict_parsing=bool(body), max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise OAuthError("invalid_request", "the body is no form") from error
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise OAuthError("invalid_request", "a parameter comes twice")
    return fields


def client_of(authorization: str, form: Mapping[str, str]) -> Client:
    """Return who the client is, from the one place where it says so (RFC 6749, section 2.3.1).

    Raises:
        OAuthError: It says so in two places, or not understandably.
    """
    if not authorization.lower().startswith("basic "):
        return Client(form.get("client_id", ""), form.get("client_secret", ""))
    if "client_secret" in form:
        raise OAuthError("invalid_request", "the client authenticates twice")
    try:
        decoded = base64.b64decode(authorization[6:].strip(), validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise OAuthError("invalid_client", "the Authorization header is damaged", 401) from error
    client_id, _, secret = decoded.partition(":")
    return Client(unquote_plus(client_id), unquote_plus(secret))


def need(form: Mapping[str, str], name: str) -> str:
    """Return a field of the form.

    Raises:
        OAuthError: It is not there.
    """
    if name not in form:
        raise OAuthError("invalid_request", f"{name} is missing")
    return form[name]
