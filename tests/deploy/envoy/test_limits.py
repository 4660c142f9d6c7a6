"""Who calls too often is told when to come back."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import status_pb2

from local import envoy
from server import access
from tests.deploy.envoy.site import (
    GET_USER,
    LOCAL,
    Site,
    bearer,
    eventually,
    expect,
    free_port,
    rest,
    token,
)

WAIT_SECONDS = 600


@contextlib.contextmanager
def strict(mesh: Site, **limits: int) -> Iterator[Site]:
    """Run another edge of the same mesh, whose buckets are not filled again during the test."""
    directory = Path(tempfile.mkdtemp(prefix="kimberly-"))
    ports = {**mesh.ports, access.EDGE: free_port()}
    edge_limits = envoy.EdgeLimits(retry_seconds=WAIT_SECONDS, **limits)
    site = Site(directory, mesh.authority, LOCAL, edge_limits, ports=ports)
    with site.running(access.EDGE), rest(site) as client:
        # Health counts against no limit.
        eventually(lambda: expect(client.get("/healthz"), 200))
        yield site
    shutil.rmtree(directory)


def retry_in(details: object) -> str:
    """Return when the details of a refusal say to come back."""
    assert isinstance(details, list)
    assert details[0]["reason"] == "RATE_LIMITED"
    delay: str = details[1]["retryDelay"]
    return delay


def call_over_grpc(site: Site) -> grpc.RpcError:
    bundle = site.authority.bundle.read_bytes()
    address = f"127.0.0.1:{site.ports[access.EDGE]}"
    metadata = tuple(bearer(token()).items())
    with (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(bundle)) as channel,
        pytest.raises(grpc.RpcError) as refused,
    ):
        channel.unary_unary(GET_USER, bytes, bytes)(b"", metadata=metadata, timeout=5)
    return refused.value


def expect_limited_over_grpc(site: Site) -> None:
    error: Any = call_over_grpc(site)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(error.trailing_metadata())
    assert trailing["retry-after"] == f"{WAIT_SECONDS}"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    assert retry_in(json_format.MessageToDict(status)["details"]) == f"{WAIT_SECONDS}s"


def test_an_address_over_its_limit_is_told_when_to_come_back_on_both_transports(
    mesh: Site,
) -> None:
    with strict(mesh, calls_per_second_per_address=1) as site, rest(site) as client:
        answers = [client.get("/v1/user") for _ in range(WAIT_SECONDS + 20)]
        assert {answer.status_code for answer in answers[:WAIT_SECONDS]} == {401}
        refused = answers[-1]
        expect(refused, 429)
        assert refused.headers["retry-after"] == f"{WAIT_SECONDS}"
        assert refused.json()["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert retry_in(refused.json()["details"]) == f"{WAIT_SECONDS}s"
        expect_limited_over_grpc(site)
        # What one claims changes nothing; where one is does.
        expect(client.get("/v1/user", headers={"x-forwarded-for": "192.0.2.1"}), 429)
        with rest(site, "127.0.0.2") as elsewhere:
            expect(elsewhere.get("/v1/user"), 401)


def test_a_user_over_their_limit_is_told_so_wherever_they_call_from(mesh: Site) -> None:
    with strict(mesh, calls_per_second_per_user=1) as site, rest(site) as client:
        # It has to fetch the keys that tokens are verified with: somebody else waits for that.
        eventually(lambda: expect(client.get("/v1/user", headers=bearer(token(sub="usr_3"))), 200))
        mine, others = bearer(token()), bearer(token(sub="usr_2"))
        answers = [client.get("/v1/user", headers=mine) for _ in range(WAIT_SECONDS + 20)]
        assert {answer.status_code for answer in answers[:WAIT_SECONDS]} == {200}
        expect(answers[-1], 429)
        assert answers[-1].headers["retry-after"] == f"{WAIT_SECONDS}"
        assert retry_in(answers[-1].json()["details"]) == f"{WAIT_SECONDS}s"
        expect_limited_over_grpc(site)
        with rest(site, "127.0.0.2") as elsewhere:
            expect(elsewhere.get("/v1/user", headers=mine), 429)
        expect(client.get("/v1/user", headers=others), 200)
