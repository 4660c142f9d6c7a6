"""Nothing that a user said, and nothing that opens a door, is in logs, metrics or traces.

The services log at debug level, and every call is traced. That the same look finds what is there
is shown by the ids of requests and users, which are.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator
from typing import Final
from uuid import UUID

import grpc
import httpx
import pytest
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb

from local.fleet import MASTER_KEY
from local.mesh import Mesh
from tests.e2e.canary import Haystack, Place, found_in, word
from tests.mesh import PASSWORD, User, eventually, mailed_token
from tests.telemetry.receiver import Receiver
from tests.telemetry.test_metrics import meditate
from tests.transports import Grpc, Refused, Rest, Transport

STRANGE: Final = "\N{SNOWMAN}"


class Telling:
    """What a mesh tells of itself: logs, metrics and spans."""

    def __init__(self, mesh: Mesh, receiver: Receiver) -> None:
        self._mesh = mesh
        self._receiver = receiver

    async def find(self, needle: re.Pattern[str]) -> dict[Place, str]:
        return await found_in(self._all(), needle)

    async def _all(self) -> AsyncIterator[tuple[Place, str]]:
        async for each in Haystack(self._mesh).logs():
            yield each
        async with httpx.AsyncClient(timeout=60) as client:
            for process, urls in self._mesh.describe()["metrics"].items():
                for url in urls:
                    yield ("metrics", process), (await client.get(url)).text
        for span in self._receiver.spans:
            yield ("spans", f"{span.service} {span.name}"), span.text


async def use(call: Transport, said: str) -> None:
    """Say a word wherever telemetry might pick it up: bodies, paths, queries, refusals."""
    memory = pb.Memory(content=f"{said} content", tags=[f"{said} tag"], speaker=said)
    created = (await call(pb.CreateMemoryRequest(memory=memory, request_id=said))).memory
    await call(pb.QueryMemoriesRequest(query=f"{said} {STRANGE}", tags=[f"{said} tag"]))
    await call(pb.ListMemoriesRequest(tags=[f"{said} tag"]))
    await call(pb.CreateGoalRequest(goal=pb.Goal(content=f"{said} goal")))
    turn = pb.SessionTurn(content=f"{said} turn", speaker=said)
    await call(pb.AppendToSessionRequest(session_id=f"{said} talk", turns=[turn]))
    await call(pb.EndSessionRequest(session_id=f"{said} talk", keep=pb.SESSION_KEEP_ALL))
    await call(pb.GetMemoryRequest(id=created.id))
    refused = (
        pb.GetMemoryRequest(id=said),
        pb.CreateMemoryRequest(memory=pb.Memory(content=said * 10_000)),
        pb.ListMemoriesRequest(page_token=said),
        jobs.GetJobRequest(id=said),
        auth.LogInRequest(email=f"{said}@example.com", password=said),
        auth.RefreshTokenRequest(refresh_token=said),
    )
    for request in refused:
        with pytest.raises(Refused):
            await call(request)


@pytest.mark.timeout(180)
async def test_telemetry_repeats_nothing_of_what_it_watches(
    mesh: Mesh,
    user: User,
    receiver: Receiver,
    http: httpx.AsyncClient,
    channel: grpc.aio.Channel,
) -> None:
    said = {name: secrets.token_hex(10) for name in user.transports}
    for name, call in user.transports.items():
        await use(call, said[name])
    await meditate(user)
    password = secrets.token_hex(12)
    changed = auth.ChangePasswordRequest(current_password=PASSWORD, new_password=password)
    await user.rest(changed)
    opened = [
        await stranger(auth.LogInRequest(email=user.email, password=password))
        for stranger in (Grpc(channel), Rest(http))
    ]
    key = await user.grpc(auth.CreateApiKeyRequest(name="canary", scopes=["memory.read"]))
    exchanged = await Rest(http)(auth.ExchangeTokenRequest(api_key=key.secret))
    mailed = await mailed_token(mesh, user.email)
    await Rest(http)(auth.VerifyEmailRequest(token=mailed))
    tokens = [user.tokens, *(answer.tokens for answer in opened)]
    secret = {
        **{f"what was said over {name}": text for name, text in said.items()},
        "password": PASSWORD,
        "new password": password,
        "mailed token": mailed,
        "API key": key.secret,
        "its access token": exchanged.access_token,
        **{f"access token {n}": each.access_token for n, each in enumerate(tokens)},
        **{f"refresh token {n}": each.refresh_token for n, each in enumerate(tokens)},
        "master key": mesh.stores.secrets.path(MASTER_KEY).read_text().strip(),
        "object store's key": mesh.stores.s3.secret_key,
        "email": user.email,
    }
    telling = Telling(mesh, receiver)
    # All that was done so far is in a trace by now: what is done last comes last.
    dashed = str(UUID(user.id.removeprefix("usr_")))

    async def last() -> bool:
        return any("VerifyEmail" in span.name for span in receiver.spans)

    await eventually(last, bool)
    found = await telling.find(re.compile(re.escape(dashed)))
    assert "spans" in {place for place, _ in found}
    for name, text in secret.items():
        assert await telling.find(word(text)) == {}, name
