"""What a pod's Envoy reads: `python -m deploy.pods`, the first container of every pod of the mesh.

The configuration comes from the same templates as that of a local mesh, and from the contract and
the table of access of the very image that runs beside it: the two cannot drift apart.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import kimberly
import typer
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from local import envoy
from local.certificates import sds_resources
from server import tracing
from server.access import EDGE, PROCESSES, WORKER
from server.settings import PREFIX, explain

EDGE_PORT: Final = 8443
PEER_PORT: Final = 9443
"""Where sidecars take calls of their peers."""
HEALTH_PORT: Final = 8081
EXIT_SETTINGS: Final = 78
"""EX_CONFIG of sysexits.h."""


class PodSettings(BaseSettings):
    """What a pod is told for its Envoy; each is the environment variable of its name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    process: str = Field(pattern="^(edge|auth|memory|jobs|worker)$")
    pod_name: str
    pod_ip: str
    """The pod's own address, of whichever family."""
    listen_address: str = ""
    """What Envoy listens on; unset: the pod's own address."""
    trust_domain: str
    namespace: str
    peer_names: str = "{process}.{namespace}.svc.cluster.local"
    """The name behind which all pods of a process are."""
    token_issuer: str
    token_audience: str
    host_names: str = "localhost"
    """Names by which clients may call the edge, apart by commas."""
    proxy_protocol: bool = False
    """Whether a load balancer tells the edge the address of each client in the PROXY protocol."""
    cors_origins: str = ""
    """Pages that may call the edge, apart by commas."""
    otlp_endpoint: str = Field(default="", pattern=tracing.ENDPOINT)
    """Where a collector takes traces by OTLP over gRPC: http://host:port. Unset: no traces."""
    trace_ratio: float = Field(default=0.05, ge=0, le=1)
    """Which part of the calls the edge has traced."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a pod keeps what its containers share."""

    shared: Path = Path("/run/mesh")
    """A volume of the pod's; everything below belongs to the one user that all containers are."""
    identity: Path = Path("/run/identity")
    """tls.crt, tls.key and ca.crt with the SPIFFE id of the process, as a mounted secret."""
    public: Path = Path("/run/public")
    """The certificate that clients of the edge see."""

    @property
    def config(self) -> Path:
        """The configuration of Envoy."""
        return self.shared / "envoy.yaml"

    @property
    def descriptor(self) -> Path:
        """The contract."""
        return self.shared / "kimberly.binpb"

    @property
    def sockets(self) -> Path:
        """Directory of the sockets app, out, metrics and admin; 0700, as services demand."""
        return self.shared / "sockets"


def prepare(told: PodSettings, places: Places) -> None:
    """Write what Envoy reads, and make the directory of the sockets. Again changes nothing."""
    places.sockets.mkdir(mode=0o700, exist_ok=True)
    contract = contract_of_stubs()
    places.descriptor.write_bytes(contract.SerializeToString())
    for name, secret in (("identity", places.identity), ("public", places.public)):
        directory = places.shared / name
        directory.mkdir(mode=0o700, exist_ok=True)
        for file, text in sds_resources(secret, secret).items():
            (directory / file).write_text(text)
    methods = envoy.methods_of_contract(contract)
    if told.process == EDGE:
        places.config.write_text(envoy.render_edge(_edge(told, places), methods))
    else:
        places.config.write_text(envoy.render_sidecar(_sidecar(told, places), methods))


def contract_of_stubs() -> FileDescriptorSet:
    """Return the contract as the generated stubs hold it, imports included and before importers."""
    found: dict[str, FileDescriptor] = {}
    for root in map(Path, kimberly.__path__):
        for stub in sorted(root.glob("*/v1/*_pb2.py")):
            module = ".".join(("kimberly", *stub.relative_to(root).with_suffix("").parts))
            _collect(importlib.import_module(module).DESCRIPTOR, found)
    contract = FileDescriptorSet()
    for file in found.values():
        file.CopyToProto(contract.file.add())
    return contract


def _collect(file: FileDescriptor, found: dict[str, FileDescriptor]) -> None:
    for needed in file.dependencies:
        _collect(needed, found)
    found[file.name] = file


def _edge(told: PodSettings, places: Places) -> envoy.Edge:
    return envoy.Edge(
        name=told.pod_name,
        listen=_here(told, EDGE_PORT),
        peers=_peers(told),
        admin_socket=places.sockets / "admin",
        sds=places.shared / "identity",
        public_sds=places.shared / "public",
        descriptor=places.descriptor,
        domain=_domain(told),
        tokens=_tokens(told),
        host_names=_words(told.host_names),
        health=_here(told, HEALTH_PORT),
        proxy_protocol=told.proxy_protocol,
        cors_origins=_words(told.cors_origins),
        traces=envoy.Traces.to(told.otlp_endpoint, told.trace_ratio),
    )


def _sidecar(told: PodSettings, places: Places) -> envoy.Sidecar:
    serves = told.process != WORKER
    return envoy.Sidecar(
        process=told.process,
        name=told.pod_name,
        inbound=_here(told, PEER_PORT) if serves else None,
        app_socket=places.sockets / "app" if serves else None,
        health=_here(told, HEALTH_PORT),
        metrics_socket=places.sockets / "metrics",
        outbound_socket=places.sockets / "out",
        peers=_peers(told),
        admin_socket=places.sockets / "admin",
        sds=places.shared / "identity",
        descriptor=places.descriptor,
        domain=_domain(told),
        tokens=_tokens(told),
        traces=envoy.Traces.to(told.otlp_endpoint, told.trace_ratio),
    )


def _here(told: PodSettings, port: int) -> envoy.Address:
    return envoy.Address(told.listen_address or told.pod_ip, port)


def _peers(told: PodSettings) -> envoy.Peers:
    """Return where the sidecars are: behind names that give every pod.

    Who asks for itself, as the sidecar of auth does for the keys, needs no name: it would get none
    before its pod is ready, and another pod's after that.
    """
    return {
        process: (
            envoy.Address(
                told.pod_ip
                if process == told.process
                else told.peer_names.format(process=process, namespace=told.namespace),
                PEER_PORT,
            ),
        )
        for process in PROCESSES
    }


def _domain(told: PodSettings) -> envoy.Domain:
    return envoy.Domain(told.trust_domain, told.namespace)


def _tokens(told: PodSettings) -> envoy.Tokens:
    return envoy.Tokens(issuer=told.token_issuer, audience=told.token_audience)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


USUAL: Final = Places()


def main(
    shared: Path = USUAL.shared, identity: Path = USUAL.identity, public: Path = USUAL.public
) -> None:
    """Write what the pod's Envoy reads."""
    try:
        told = PodSettings()
    except ValidationError as error:
        typer.echo(explain(error), err=True)
        sys.exit(EXIT_SETTINGS)
    prepare(told, Places(shared, identity, public))


if __name__ == "__main__":
    typer.run(main)
