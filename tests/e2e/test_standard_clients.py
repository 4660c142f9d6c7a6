"""Clients that know OAuth 2.0 and nothing of us get along with the mesh."""

from __future__ import annotations

import asyncio
import ssl
from typing import Any

import grpc
import httpx
import jwt
import pytest
import pytest_asyncio
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.httpx_client import AsyncOAuth2Client
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata
from authlib.oauth2.rfc8414 import get_well_known_url as oauth_url
from authlib.oidc.discovery import get_well_known_url as oidc_url
from google.api import httpbody_pb2
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.client import connect, reason_of
from kimberly.users.v1 import users_pb2 as users

from local.mesh import Mesh
from tests.mesh import User, address_of, sign_up
from tests.transports import Grpc

API_KEY_TYPE = "urn:kimberly:token-type:api-key"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"


@pytest_asyncio.fixture(scope="module")
async def discovered(mesh: Mesh, http: httpx.AsyncClient) -> dict[str, Any]:
    """What a client learns of the mesh that knows its URL and nothing else."""
    found: dict[str, Any] = (await http.get(oidc_url(mesh.edge, external=True))).json()
    return found


@pytest_asyncio.fixture
async def eve(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> User:
    """Somebody new."""
    return await sign_up(http, channel)


@pytest_asyncio.fixture
async def key(eve: User) -> auth.CreateApiKeyResponse:
    """An API key of hers."""
    request = auth.CreateApiKeyRequest(name="a script", scopes=["memory.read", "profile.read"])
    made: auth.CreateApiKeyResponse = await eve.rest(request)
    return made


def client(mesh: Mesh, trust: ssl.SSLContext, **options: Any) -> AsyncOAuth2Client:
    return AsyncOAuth2Client(verify=trust, **options)


async def verified(mesh: Mesh, discovered: dict[str, Any], token: str) -> dict[str, Any]:
    """Return the claims of a token that PyJWT verifies by what was discovered."""
    context = ssl.create_default_context(cafile=mesh.ca)
    keys = jwt.PyJWKClient(discovered["jwks_uri"], ssl_context=context)
    key = await asyncio.to_thread(keys.get_signing_key_from_jwt, token)
    claims: dict[str, Any] = jwt.decode(
        token,
        key,
        algorithms=discovered["id_token_signing_alg_values_supported"],
        audience="kimberly",
        issuer=mesh.edge,
        options={"require": ["exp", "iat", "sub", "aud", "iss"]},
    )
    return claims


async def test_the_discovery_document_names_what_is_there(
    mesh: Mesh, http: httpx.AsyncClient, discovered: dict[str, Any]
) -> None:
    # OpenID Connect Discovery 1.0, section 4.3: it must name whom it was asked of.
    assert discovered["issuer"] == mesh.edge
    assert discovered["token_endpoint"] == f"{mesh.edge}/v1/oauth/token"
    assert discovered["jwks_uri"] == f"{mesh.edge}/.well-known/jwks.json"
    assert (await http.get(discovered["jwks_uri"])).json()["keys"]
    other = (await http.get(oauth_url(mesh.edge, external=True))).json()
    assert other == discovered
    AuthorizationServerMetadata(other).validate()
    assert {"refresh_token", "client_credentials", TOKEN_EXCHANGE} == {
        *discovered["grant_types_supported"]
    }


@pytest.mark.parametrize("method", ["client_secret_basic", "client_secret_post"])
async def test_an_api_key_is_client_credentials(
    mesh: Mesh,
    trust: ssl.SSLContext,
    discovered: dict[str, Any],
    eve: User,
    key: auth.CreateApiKeyResponse,
    method: str,
) -> None:
    options = {"client_id": key.api_key.id, "client_secret": key.secret}
    async with client(mesh, trust, **options, token_endpoint_auth_method=method) as session:
        token = await session.fetch_token(discovered["token_endpoint"], scope="profile.read")
        assert (token["token_type"], token["scope"]) == ("Bearer", "profile.read")
        claims = await verified(mesh, discovered, token["access_token"])
        assert (claims["sub"], claims["tid"]) == (eve.id, eve.tenant_id)
        assert (await session.get(f"{mesh.edge}/v1/user")).json()["user"]["id"] == eve.id
        assert (await session.get(f"{mesh.edge}/v1/memories")).status_code == 403


async def test_a_refresh_token_is_refreshed_and_rotates(
    mesh: Mesh, trust: ssl.SSLContext, discovered: dict[str, Any], eve: User
) -> None:
    options = {"client_id": "anything", "token_endpoint_auth_method": "none"}
    async with client(mesh, trust, **options) as session:
        first = await session.refresh_token(
            discovered["token_endpoint"], refresh_token=eve.tokens.refresh_token
        )
        second = await session.refresh_token(
            discovered["token_endpoint"], refresh_token=first["refresh_token"]
        )
        assert second["refresh_token"] != first["refresh_token"]
        claims = await verified(mesh, discovered, second["access_token"])
        assert (claims["sub"], claims["scope"]) == (eve.id, "user")
        assert (await session.get(f"{mesh.edge}/v1/user")).json()["user"]["email"] == eve.email


async def test_a_client_refreshes_by_itself_when_its_token_expires(
    mesh: Mesh, trust: ssl.SSLContext, discovered: dict[str, Any], eve: User
) -> None:
    token = {
        "access_token": "old",
        "refresh_token": eve.tokens.refresh_token,
        "token_type": "Bearer",
        "expires_at": 1,
    }
    endpoint = {"token_endpoint": discovered["token_endpoint"]}
    async with client(mesh, trust, client_id="anything", token=token, **endpoint) as session:
        assert (await session.get(f"{mesh.edge}/v1/user")).json()["user"]["id"] == eve.id


async def test_a_token_is_exchanged(
    mesh: Mesh,
    trust: ssl.SSLContext,
    discovered: dict[str, Any],
    eve: User,
    key: auth.CreateApiKeyResponse,
) -> None:
    async with client(mesh, trust, token_endpoint_auth_method="none") as session:
        token = await session.fetch_token(
            discovered["token_endpoint"],
            grant_type=TOKEN_EXCHANGE,
            subject_token=key.secret,
            subject_token_type=API_KEY_TYPE,
        )
        assert token["issued_token_type"] == "urn:ietf:params:oauth:token-type:access_token"
        assert (await verified(mesh, discovered, token["access_token"]))["sub"] == eve.id


async def test_a_client_hears_of_errors_in_its_own_words(
    mesh: Mesh, trust: ssl.SSLContext, discovered: dict[str, Any]
) -> None:
    async with client(mesh, trust, client_id="key_0", client_secret="none") as session:
        with pytest.raises(AuthlibBaseError) as refused:
            await session.fetch_token(discovered["token_endpoint"])
        assert refused.value.error == "invalid_client"
        with pytest.raises(AuthlibBaseError) as refused:
            await session.refresh_token(discovered["token_endpoint"], refresh_token="none")
        assert refused.value.error == "invalid_grant"


FORM = "application/x-www-form-urlencoded"


@pytest.mark.parametrize(
    ("body", "content_type", "status", "error"),
    [
        ("", FORM, 400, "invalid_request"),
        ("rubbish", FORM, 400, "invalid_request"),
        ("grant_type=refresh_token", FORM, 400, "invalid_request"),
        ("grant_type=refresh_token&refresh_token=x", FORM, 400, "invalid_grant"),
        ("grant_type=refresh_token&refresh_token=x&refresh_token=y", FORM, 400, "invalid_request"),
        ("grant_type=password&username=a&password=b", FORM, 400, "unsupported_grant_type"),
        ("grant_type=client_credentials", FORM, 401, "invalid_client"),
        (
            "grant_type=client_credentials&client_secret=x",
            f"{FORM}; charset=utf-8",
            401,
            "invalid_client",
        ),
        ('{"grant_type": "refresh_token"}', "application/json", 400, "invalid_request"),
        ("&".join(f"a{number}=1" for number in range(50)), FORM, 400, "invalid_request"),
    ],
)
async def test_the_endpoint_refuses_as_the_standard_says(
    http: httpx.AsyncClient, body: str, content_type: str, status: int, error: str
) -> None:
    headers = {"content-type": content_type}
    response = await http.post("/v1/oauth/token", content=body, headers=headers)
    assert (response.status_code, response.json()["error"]) == (status, error), response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert ("www-authenticate" in response.headers) == (status == 401)
    assert "x-oauth-status" not in response.headers


async def test_a_key_under_anothers_id_is_no_client(
    http: httpx.AsyncClient, key: auth.CreateApiKeyResponse
) -> None:
    for client_id in ("", "key_" + "0" * 32, key.api_key.prefix):
        form = {
            "grant_type": "client_credentials",
            "client_id": client_id,
            "client_secret": key.secret,
        }
        response = await http.post("/v1/oauth/token", data=form)
        assert (response.status_code, response.json()["error"]) == (401, "invalid_client")


async def test_a_scope_that_the_key_lacks_is_refused(
    http: httpx.AsyncClient, key: auth.CreateApiKeyResponse
) -> None:
    form = {"grant_type": "client_credentials", "scope": "memory.write"}
    response = await http.post("/v1/oauth/token", data=form, auth=(key.api_key.id, key.secret))
    assert (response.status_code, response.json()["error"]) == (400, "invalid_scope")


async def test_a_script_with_a_key_needs_nothing_else(
    mesh: Mesh, eve: User, key: auth.CreateApiKeyResponse
) -> None:
    async with connect(address_of(mesh), mesh.ca) as script:
        await script.use_api_key(key.secret)
        assert (await script.users.GetUser(users.GetUserRequest())).user.id == eve.id
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await script.auth.ListApiKeys(auth.ListApiKeysRequest())
        assert reason_of(refused.value) == "SCOPE_MISSING"


async def test_over_grpc_an_error_is_an_answer(channel: grpc.aio.Channel) -> None:
    form = httpbody_pb2.HttpBody(content_type=FORM, data=b"grant_type=password")
    answer = await Grpc(channel)(auth.IssueTokenRequest(form=form))
    assert b"unsupported_grant_type" in answer.json.data
