"""What is rendered boots, and opens to each peer what is meant for it."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from local import envoy
from local.certificates import Authority
from local.envoy import Binding, Method
from server import access
from server.access import Access
from tests.deploy.envoy.site import (
    KUBERNETES,
    LOCAL,
    LOG_IN,
    NOW,
    RBAC,
    ROLES,
    WORK,
    Site,
    bearer,
    expect,
    rest,
    token,
)


def test_every_role_validates_and_boots_as_in_kubernetes(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="kimberly-") as directory:
        authority = Authority.open(tmp_path / "certificates", now=NOW)
        # A name that resolves everywhere stands for the headless services of a cluster.
        site = Site(Path(directory), authority, KUBERNETES, host="localhost", listen_host="0.0.0.0")
        for role in ROLES:
            check = [*envoy.command(site.write(role)), "--mode", "validate"]
            assert subprocess.run(check, check=False, capture_output=True).returncode == 0, role
        assert "STRICT_DNS" in site.render_edge()
        with site.running(access.EDGE, "memory"), rest(site) as client:
            # Nobody can verify a token while auth is away, which does not make it a wrong one.
            refused = client.get("/v1/user", headers=bearer(token()))
            expect(refused, 503)
            assert refused.json()["code"] == grpc.StatusCode.UNAVAILABLE.value[0]
            expect(client.get("/healthz"), 503)


def test_every_local_role_validates_boots_and_shows_its_certificate(mesh: Site) -> None:
    for role in ROLES:
        check = [*envoy.command(mesh.directory / f"{role}.yaml"), "--mode", "validate"]
        assert subprocess.run(check, check=False, capture_output=True).returncode == 0, role
        shown = mesh.admin(role, "/certs").json()["certificates"]
        names = {
            name.get("uri") for each in shown for name in each["cert_chain"][0]["subject_alt_names"]
        }
        assert LOCAL.identity(role) in names


def policies_of(site: Site, role: str) -> dict[str, set[str]]:
    """Return the exact methods of each RBAC policy, as the running Envoy holds them."""
    filters = list(find(site.admin(role, "/config_dump").json(), RBAC))
    policies = filters[0]["rules"]["policies"] if filters else {}
    return {
        name: {rule["url_path"]["path"]["exact"] for rule in rules}
        for name, policy in policies.items()
        for rules in [policy["permissions"][0]["or_rules"]["rules"]]
    }


def find(node: Any, kind: str) -> Iterator[dict[str, Any]]:
    """Find the messages of one type anywhere in a configuration."""
    if isinstance(node, dict):
        if node.get("@type") == kind:
            yield node
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from find(child, kind)


@pytest.mark.parametrize("process", access.PROCESSES)
def test_a_sidecar_opens_each_method_of_its_process_to_whom_it_is_meant_for(
    mesh: Site, process: str
) -> None:
    services = {*access.PROCESSES[process], "grpc.health.v1.Health"}
    rows = {path: row for path, row in access.METHODS.items() if path.split("/")[1] in services}
    assert policies_of(mesh, process) == {
        row.value: {path for path in rows if rows[path] is row} for row in rows.values()
    }


def test_the_edge_opens_what_is_meant_for_users_and_nothing_else(mesh: Site) -> None:
    assert policies_of(mesh, access.EDGE) == {
        row.value: {path for path, each in access.METHODS.items() if each is row}
        for row in access.PUBLIC
    }


def test_the_sidecar_of_a_worker_has_no_inbound_side(mesh: Site) -> None:
    assert policies_of(mesh, access.WORKER) == {}
    listeners = mesh.admin(access.WORKER, "/listeners?format=json").json()["listener_statuses"]
    assert [listener["name"] for listener in listeners] == ["outbound"]


def test_a_method_without_an_access_row_is_refused() -> None:
    contract = envoy.descriptor_set()
    service = next(file for file in contract.file if file.package == "kimberly.jobs.v1").service[0]
    service.method.add(name="PurgeJobs")
    with pytest.raises(LookupError, match="JobService/PurgeJobs"):
        envoy.methods_of_contract(contract)


def test_an_access_row_without_a_method_is_refused() -> None:
    with pytest.raises(LookupError, match="AuthService/LogIn"):
        envoy.methods_of_contract(FileDescriptorSet())


def test_a_rest_path_without_token_must_be_a_fixed_one() -> None:
    method = Method(LOG_IN, bindings=(Binding("POST", "/v1/login/{name}"),))
    with pytest.raises(ValueError, match="fixed path"):
        envoy.bindings_without_token([method])


def test_rest_calls_without_token_are_those_of_methods_for_anyone() -> None:
    methods = envoy.methods_of_contract(envoy.descriptor_set())
    bindings = {(binding.verb, binding.path) for binding in envoy.bindings_without_token(methods)}
    assert bindings == {
        ("POST", "/v1/signup"),
        ("POST", "/v1/login"),
        ("POST", "/v1/token:refresh"),
        ("POST", "/v1/logout"),
        ("POST", "/v1/user/erasures:receipt"),
        ("GET", "/.well-known/jwks.json"),
        ("GET", "/.well-known/oauth-authorization-server"),
        ("GET", "/.well-known/openid-configuration"),
        ("POST", "/v1/oauth/token"),
        ("POST", "/v1/token:exchange"),
        ("POST", "/v1/password:requestReset"),
        ("POST", "/v1/password:reset"),
        ("POST", "/v1/email:verify"),
    }


def test_a_worker_reaches_the_methods_of_workers_and_a_service_the_keys() -> None:
    assert WORK in envoy.calls_of(access.WORKER)
    assert all(access.METHODS[path] is Access.WORKER for path in envoy.calls_of(access.WORKER))
    assert envoy.calls_of("memory") == envoy.calls_of("jobs") == (envoy.JWKS_METHOD,)
    assert envoy.peers_of("auth") == ("auth",)
