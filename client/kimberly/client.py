"""A small client: one channel through the edge, tokens kept fresh, safe calls retried."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import cast

import grpc
from google.rpc import error_details_pb2, status_pb2

from kimberly.agents.v1 import agents_pb2_grpc
from kimberly.auth.v1 import auth_pb2, auth_pb2_grpc
from kimberly.jobs.v1 import jobs_pb2_grpc
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.users.v1 import users_pb2_grpc

_MESSAGE_BYTES = 8 * 1024 * 1024
_REFRESH_AT = 0.8
"""Part of an access token's lifetime after which it is replaced."""

_SAFE_TO_REPEAT = [
    {"service": "kimberly.memory.v1.MemoryService", "method": method}
    for method in (
        "GetMemory",
        "ListMemories",
        "QueryMemories",
        "GetAttachment",
        "ListAttachments",
        "GetTranscript",
        "GetUsage",
        "ListMemoryVersions",
        "GetImport",
        "GetMeditation",
        "ListMeditations",
        "UndoMeditation",
        "GetGoal",
        "ListGoals",
    )
]
_SAFE_TO_REPEAT += [
    {"service": "kimberly.jobs.v1.JobService", "method": method}
    for method in (
        "GetJob",
        "ListJobs",
        "RetryJob",
        "CancelJob",
        "WatchJob",
        "GetSchedule",
        "ListSchedules",
        "PauseSchedule",
        "ResumeSchedule",
    )
]
_SAFE_TO_REPEAT += [
    {"service": "kimberly.agents.v1.AgentService", "method": method}
    for method in (
        "GetAgent",
        "ListAgents",
        "DisableAgent",
        "EnableAgent",
        "GetAgentTask",
        "ListAgentTasks",
    )
]
_SAFE_TO_REPEAT += [{"service": "kimberly.users.v1.UserService"}]
_SAFE_TO_REPEAT += [{"service": "kimberly.auth.v1.AuthService", "method": "LeaveTenant"}]
_SERVICE_CONFIG = json.dumps(
    {
        "methodConfig": [
            {
                "name": _SAFE_TO_REPEAT,
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1},
    }
)


Renew = Callable[[auth_pb2.Tokens], Awaitable[auth_pb2.Tokens]]
"""Returns the tokens that come after others."""


class Client:
    """Speaks to one mesh as one user. Open it with `connect`.

    The stubs are the generated ones; what they need of tokens is done underneath.
    """

    def __init__(self, channel: grpc.aio.Channel, session: "_Session") -> None:
        self._session = session
        self.auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(channel)
        self.users: users_pb2_grpc.UserServiceAsyncStub = users_pb2_grpc.UserServiceStub(channel)
        self.memory: memory_pb2_grpc.MemoryServiceAsyncStub = memory_pb2_grpc.MemoryServiceStub(
            channel
        )
        self.agents: agents_pb2_grpc.AgentServiceAsyncStub = agents_pb2_grpc.AgentServiceStub(
            channel
        )
        self.jobs: jobs_pb2_grpc.JobServiceAsyncStub = jobs_pb2_grpc.JobServiceStub(channel)

    async def sign_up(self, email: str, password: str) -> auth_pb2.SignUpResponse:
        """Create an account and act as its user from now on.

        Where a mail has to confirm it first the answer is empty, and nobody is logged in.
        """
        answer = await self.auth.SignUp(auth_pb2.SignUpRequest(email=email, password=password))
        if answer.HasField("tokens"):
            self._session.begin(answer.tokens, self._refresh)
        return answer

    async def log_in(self, email: str, password: str) -> None:
        """Act as the user of an account from now on."""
        answer = await self.auth.LogIn(auth_pb2.LogInRequest(email=email, password=password))
        self._session.begin(answer.tokens, self._refresh)

    async def switch_tenant(self, tenant_id: str) -> auth_pb2.SwitchTenantResponse:
        """Act as whom the account is in another of its tenants from now on."""
        request = auth_pb2.SwitchTenantRequest(tenant_id=tenant_id)
        answer = await self.auth.SwitchTenant(request)
        self._session.begin(answer.tokens, self._refresh)
        return answer

    async def use_api_key(self, api_key: str) -> None:
        """Act as the user of an API key from now on, as far as its scopes go."""
        request = auth_pb2.ExchangeTokenRequest(api_key=api_key)

        async def exchange(_tokens: auth_pb2.Tokens) -> auth_pb2.Tokens:
            answer = await self.auth.ExchangeToken(request, wait_for_ready=True)
            return auth_pb2.Tokens(
                access_token=answer.access_token,
                access_token_lifetime=answer.access_token_lifetime,
            )

        self._session.begin(await exchange(auth_pb2.Tokens()), exchange)

    @property
    def access_token(self) -> str:
        """The access token that calls carry at the moment; empty before log-in."""
        return self._session.tokens.access_token

    async def _refresh(self, tokens: auth_pb2.Tokens) -> auth_pb2.Tokens:
        request = auth_pb2.RefreshTokenRequest(refresh_token=tokens.refresh_token)
        return (await self.auth.RefreshToken(request, wait_for_ready=True)).tokens


@asynccontextmanager
async def connect(
    address: str, ca: Path | None = None, *, access_token: str = ""
) -> AsyncIterator[Client]:
    """Open a client of the mesh whose edge is at `address`, such as "localhost:8443".

    Args:
        address: Host and port of the edge.
        ca: PEM file of the authority that signed the edge's certificate; None for those that
            gRPC trusts by itself.
        access_token: Whom to act as, until the token expires; empty for somebody who logs in.
    """
    session = _Session(access_token)
    credentials = _credentials(ca, session)
    options = (
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.max_receive_message_length", _MESSAGE_BYTES),
    )
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        try:
            yield Client(channel, session)
        finally:
            await session.end()


def _credentials(ca: Path | None, session: "_Session") -> grpc.ChannelCredentials:
    return grpc.composite_channel_credentials(
        grpc.ssl_channel_credentials(ca.read_bytes() if ca else None),
        grpc.metadata_call_credentials(session),
    )


def reason_of(error: grpc.aio.AioRpcError) -> str:
    """Return the reason of a refused call, a name of ErrorReason without its prefix; or ""."""
    trailers = cast("tuple[tuple[str, str | bytes], ...]", tuple(error.trailing_metadata() or ()))
    for key, value in trailers:
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


class _Session(grpc.AuthMetadataPlugin):
    """The tokens of a user: put on every call, replaced before they expire."""

    def __init__(self, access_token: str) -> None:
        self.tokens = auth_pb2.Tokens(access_token=access_token)
        self._keeper: asyncio.Task[None] | None = None

    def __call__(
        self,
        _context: grpc.AuthMetadataContext,
        callback: grpc.AuthMetadataPluginCallback,
    ) -> None:
        token = self.tokens.access_token
        callback((("authorization", f"Bearer {token}"),) if token else (), None)

    def begin(self, tokens: auth_pb2.Tokens, renew: Renew) -> None:
        if self._keeper:
            self._keeper.cancel()
        self.tokens = tokens
        self._keeper = asyncio.create_task(self._keep_fresh(renew))

    async def end(self) -> None:
        if self._keeper:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

    async def _keep_fresh(self, renew: Renew) -> None:
        """Renew until the session or key ends; after that, calls say UNAUTHENTICATED."""
        while True:
            lifetime = self.tokens.access_token_lifetime.ToTimedelta().total_seconds()
            await asyncio.sleep(lifetime * _REFRESH_AT)
            self.tokens = await renew(self.tokens)
