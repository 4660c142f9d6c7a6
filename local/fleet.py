"""The processes of the mesh beside the stores: what each of them runs, is told, and trusts."""

import base64
import datetime as dt
import os
import re
import secrets
import ssl
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from local import envoy, probes, prometheus
from local.certificates import Authority, Names, locked
from local.layout import CHECKOUT, Layout
from local.ports import LOOPBACK, Ports
from local.postgres import APPLICATION, OWNER, SYSTEM
from local.processes import Probe, Program
from local.prometheus import NAME as PROMETHEUS
from local.servers import BUCKET, Stores
from server.access import EDGE, PROCESSES, WORKER

EDGE_PORT = 8443
PUBLIC = "public"
"""The identity that clients of the edge see."""
MASTER_KEY = "master.key"
# As for plans: here everybody has one address, and may ask for all that there is.
EDGE_LIMITS = envoy.EdgeLimits(
    calls_per_second_per_address=20_000, calls_per_second_per_user=20_000
)
_ENDPOINT = "KIMBERLY_OTLP_ENDPOINT"
_RATIO = "KIMBERLY_TRACE_RATIO"
_MODELS = "KIMBERLY_EMBEDDING_MODELS_DIRECTORY"
_QUESTION_MODELS = "KIMBERLY_QUESTION_MODELS_DIRECTORY"


@dataclass(frozen=True, slots=True)
class Commands:
    """What the processes of ours run. Tests put stand-ins here."""

    migrate: tuple[str, ...] = (sys.executable, "-m", "server", "migrate")
    service: tuple[str, ...] = (sys.executable, "-m", "server")
    """Followed by the name of the process."""
    worker: tuple[str, ...] = (sys.executable, "-m", "workers")


@dataclass(frozen=True, slots=True)
class Fleet:
    """Describes services, workers, their sidecars and the edge of one mesh."""

    layout: Layout
    stores: Stores
    ports: Mapping[str, int]
    """Of the edge, of the inbound listener of each sidecar, of the health of every Envoy, and of
    Prometheus."""
    workers: Sequence[str]
    commands: Commands
    watcher: str | None = None
    """The Prometheus that remembers what is measured; None: nothing does."""
    domain: envoy.Domain = field(default_factory=envoy.Domain)
    sidecar_limits: envoy.SidecarLimits = field(default_factory=envoy.SidecarLimits)
    replicas: int = 1
    """How many there are of the edge and of each service, each behind a sidecar of its own."""
    edge_limits: envoy.EdgeLimits = EDGE_LIMITS

    @property
    def edges(self) -> tuple[str, ...]:
        """The edges that run. What is outside reaches any of them, as a load balancer sees fit."""
        return replicas_of(EDGE, self.replicas)

    @property
    def services(self) -> dict[str, str]:
        """What each service that runs is a replica of, by its name."""
        return services(self.replicas)

    @property
    def public_url(self) -> str:
        """Where clients find the edge: the first of them."""
        return f"https://{LOOPBACK}:{self.ports[EDGE]}"

    @property
    def tokens(self) -> envoy.Tokens:
        """Which access tokens are accepted: standard clients expect them from where they look."""
        return envoy.Tokens(issuer=self.public_url)

    @property
    def sidecars(self) -> tuple[str, ...]:
        """The processes that have a sidecar."""
        return (*self.services, *self.workers)

    def prepare(self) -> None:
        """Make the master key, the certificates and the Envoy configurations."""
        self.stores.secrets.get(MASTER_KEY, new_master_key)
        self.renew()
        methods = envoy.methods_of_contract(envoy.descriptor_set())
        for name in self.edges:
            self._config(name).write_text(envoy.render_edge(self._edge(name), methods))
        for name in self.sidecars:
            rendered = envoy.render_sidecar(self._sidecar(name), methods)
            self._config(name).write_text(rendered)

    def renew(self) -> None:
        """Issue the certificates that do not exist or have lived half their life."""
        now = dt.datetime.now(dt.UTC)
        with locked(self.layout.certificates):
            authority = Authority.open(self.layout.certificates, now=now)
            for name, names in identities(self.domain).items():
                authority.ensure(name, names, now=now)

    # --- programs ------------------------------------------------------------------------------

    def migration(self) -> Program:
        """Return the program that brings the tables up to date, and ends."""
        told = {"KIMBERLY_OWNER_DATABASE_URL": self.stores.dsn(OWNER)}
        return self._python("migrate", self.commands.migrate, told, _never)

    def service(self, name: str) -> Program:
        """Return the program of a replica of a service."""
        socket = self.layout.app_socket(name)

        async def is_ready() -> bool:
            return await probes.grpc_serving(socket)

        told = self._store_settings() | self._mesh_settings(name) | _lent(_QUESTION_MODELS)
        command = (*self.commands.service, self.services[name])
        return self._python(name, command, told, is_ready, f"unix:{socket.name}")

    def worker(self, name: str) -> Program:
        """Return the program of a worker. It is told of no store and gets no password."""

        async def is_ready() -> bool:
            return await self._is_listening_for_work(name)

        told = self._mesh_settings(name) | _lent(_MODELS)
        return self._python(name, self.commands.worker, told, is_ready)

    def sidecar(self, process: str) -> Program:
        """Return the program of a sidecar."""
        inbound = (
            f"{LOOPBACK}:{self.ports[process]}" if process in self.services else "outbound only"
        )
        return self._envoy(f"{process}-sidecar", process, inbound)

    def edge(self, name: str = EDGE) -> Program:
        """Return the program of an edge."""
        return self._envoy(name, name, f"https://{LOOPBACK}:{self.ports[name]}")

    def metrics_urls(self) -> dict[str, list[str]]:
        """Return where Prometheus asks: for each process what it measures, then what Envoy does."""
        bases = {name: f"http://{self._health(name)}" for name in (*self.edges, *self.sidecars)}
        own = {name: [f"{bases[name]}/metrics"] for name in self.sidecars}
        return {
            name: [*own.get(name, []), f"{base}/stats/prometheus"] for name, base in bases.items()
        }

    def prometheus(self) -> Program | None:
        """Return the program that remembers what is measured; None: nothing does."""
        if self.watcher is None:
            return None
        return prometheus.program(
            self.watcher, self.layout, self.ports[PROMETHEUS], self.metrics_urls()
        )

    def prometheus_url(self) -> str | None:
        """Return where that is asked; None: nowhere."""
        return f"http://{LOOPBACK}:{self.ports[PROMETHEUS]}" if self.watcher else None

    async def is_whole(self) -> bool:
        """Tell whether the edges reach every service and every Envoy has the keys of tokens."""
        trust = ssl.create_default_context(cafile=self.layout.certificates / "ca.pem")
        for name in self.edges:
            edge = probes.Endpoint(port=self.ports[name], tls=trust)
            if (await probes.http(edge, "GET", "/healthz")).status != 200:
                return False
        keepers = (*self.edges, *self.services)
        return all([await self._stat(name, r"jwks_fetch_success") for name in keepers])

    def _python(
        self,
        name: str,
        command: tuple[str, ...],
        told: Mapping[str, str],
        is_ready: Probe,
        address: str = "",
    ) -> Program:
        return Program(
            name=name,
            command=command,
            directory=CHECKOUT,
            environment={**_inherited(), **told},
            log=self.layout.logs / f"{name}.log",
            is_ready=is_ready,
            address=address,
            # It drains: it reports NOT_SERVING, then waits for the calls under way.
            stop_seconds=4.0,
        )

    def _envoy(self, name: str, process: str, address: str) -> Program:
        admin = probes.Endpoint(socket=self.layout.admin_socket(process))

        async def is_ready() -> bool:
            return (await probes.http(admin, "GET", "/ready")).status == 200

        return Program(
            name=name,
            command=envoy.command(self._config(process)),
            directory=self.layout.envoy,
            log=self.layout.logs / f"{name}.log",
            is_ready=is_ready,
            address=address,
            stop_seconds=1.0,
        )

    # --- what they are told --------------------------------------------------------------------

    def _mesh_settings(self, process: str) -> dict[str, str]:
        return {
            "KIMBERLY_LISTEN_SOCKET": str(self.layout.app_socket(process)),
            "KIMBERLY_OUTBOUND_SOCKET": str(self.layout.outbound_socket(process)),
            "KIMBERLY_TRUST_DOMAIN": self.domain.trust_domain,
            "KIMBERLY_NAMESPACE": self.domain.namespace,
            "KIMBERLY_METRICS_SOCKET": str(self.layout.metrics_socket(process)),
            # So that whoever looks sees what they just did.
            "KIMBERLY_METRICS_SECONDS": "5",
        }

    def _store_settings(self) -> dict[str, str]:
        stores = self.stores
        return {
            "KIMBERLY_DATABASE_URL": stores.dsn(APPLICATION),
            "KIMBERLY_SYSTEM_DATABASE_URL": stores.dsn(SYSTEM),
            "KIMBERLY_REDIS_URL": stores.valkey.url,
            "KIMBERLY_S3_ENDPOINT": stores.s3.endpoint,
            "KIMBERLY_S3_SECURE": "false",
            "KIMBERLY_S3_ACCESS_KEY": stores.s3.access_key,
            "KIMBERLY_S3_SECRET_KEY": stores.s3.secret_key,
            "KIMBERLY_S3_BUCKET": BUCKET,
            # So that whoever tries the mesh sees a checkpoint of what they just did.
            "KIMBERLY_AUDIT_CHECKPOINT_SECONDS": "5",
            # Plans are for many users of many machines: here one may ask for all that there is.
            "KIMBERLY_RATE_LIMIT_SCALE": "50",
            "KIMBERLY_MASTER_KEY_FILE": str(stores.secrets.path(MASTER_KEY)),
            "KIMBERLY_MAIL_DIRECTORY": str(self.layout.mails),
            # So that whoever signs up can begin.
            "KIMBERLY_SIGN_UP_CONFIRMS_EMAIL": "false",
            "KIMBERLY_TOKEN_ISSUER": self.tokens.issuer,
            "KIMBERLY_TOKEN_AUDIENCE": self.tokens.audience,
        }

    # --- Envoys --------------------------------------------------------------------------------

    def _edge(self, name: str) -> envoy.Edge:
        return envoy.Edge(
            listen=envoy.Address(LOOPBACK, self.ports[name]),
            peers=self._peers(),
            admin_socket=self.layout.admin_socket(name),
            sds=self.layout.certificates / EDGE,
            public_sds=self.layout.certificates / PUBLIC,
            health=self._health(name),
            domain=self.domain,
            tokens=self.tokens,
            traces=_traces(),
            limits=self.edge_limits,
        )

    def _sidecar(self, name: str) -> envoy.Sidecar:
        serves = name in self.services
        process = self.services.get(name, WORKER)
        return envoy.Sidecar(
            process=process,
            name=name,
            inbound=envoy.Address(LOOPBACK, self.ports[name]) if serves else None,
            app_socket=self.layout.app_socket(name) if serves else None,
            health=self._health(name),
            metrics_socket=self.layout.metrics_socket(name),
            outbound_socket=self.layout.outbound_socket(name),
            peers=self._peers(),
            admin_socket=self.layout.admin_socket(name),
            sds=self.layout.certificates / process,
            domain=self.domain,
            tokens=self.tokens,
            traces=_traces(),
            limits=self.sidecar_limits,
        )

    def _peers(self) -> dict[str, tuple[envoy.Address, ...]]:
        return {
            process: tuple(
                envoy.Address(LOOPBACK, self.ports[name])
                for name, served in self.services.items()
                if served == process
            )
            for process in PROCESSES
        }

    def _health(self, name: str) -> envoy.Address:
        return envoy.Address(LOOPBACK, self.ports[health_port(name)])

    def _config(self, process: str) -> Path:
        return self.layout.envoy / f"{process}.yaml"

    async def _is_listening_for_work(self, worker: str) -> bool:
        """Tell whether the worker's stream to the jobs service is open, as its sidecar sees it."""
        return await self._stat(worker, r"cluster\.jobs\.upstream_rq_active")

    async def _stat(self, process: str, name: str) -> bool:
        """Tell whether a statistic of an Envoy is above zero."""
        admin = probes.Endpoint(socket=self.layout.admin_socket(process))
        answer = await probes.http(admin, "GET", f"/stats?filter={name}$")
        return re.search(rb": [1-9]", answer.body) is not None


def identities(domain: envoy.Domain) -> dict[str, Names]:
    """Return whom each identity of a local mesh names; PUBLIC is no workload."""
    workloads = (EDGE, WORKER, *PROCESSES)
    return {
        **{process: Names(spiffe_id=domain.identity(process)) for process in workloads},
        PUBLIC: Names(dns_names=("localhost",), addresses=(LOOPBACK,)),
    }


def replicas_of(process: str, replicas: int) -> tuple[str, ...]:
    """Return the names of so many: the first is called as the process is, others jobs-2, jobs-3."""
    return (process, *(f"{process}-{number}" for number in range(2, replicas + 1)))


def services(replicas: int) -> dict[str, str]:
    """Return what each of so many replicas of every service is one of, by its name."""
    return {name: process for process in PROCESSES for name in replicas_of(process, replicas)}


def claim_ports(ports: Ports, replicas: int, workers: Collection[str]) -> dict[str, int]:
    """Claim the ports of edges, and of the sidecars of services and workers."""
    edges, served = replicas_of(EDGE, replicas), services(replicas)
    healths = [health_port(name) for name in (*edges, *served, *workers)]
    return {
        EDGE: ports.claim(EDGE, preferred=[EDGE_PORT]),
        **{name: ports.claim(name) for name in (*edges[1:], *served, *healths, PROMETHEUS)},
    }


def health_port(name: str) -> str:
    """Return what the port is called at which an Envoy tells its health and its metrics."""
    return f"{name}-health"


def new_master_key() -> str:
    """Return 32 random bytes in base64."""
    return base64.b64encode(secrets.token_bytes(32)).decode()


def _inherited() -> dict[str, str]:
    """Return the little that a process of ours gets from our own environment."""
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in {"HOME", "KIMBERLY_LOG_LEVEL", _ENDPOINT, _RATIO}
    }
    return {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "client")]),
        "KIMBERLY_LOG_LEVEL": "info",
    } | passed


def _traces() -> envoy.Traces | None:
    """Return where spans go, if whoever starts the mesh names a place. Here every call has some."""
    return envoy.Traces.to(os.environ.get(_ENDPOINT, ""), float(os.environ.get(_RATIO, "1")))


def _lent(name: str) -> dict[str, str]:
    """Return where the models are that whoever starts the mesh lends it by this name, if any."""
    directory = os.environ.get(name)
    return {name: str(Path(directory).resolve())} if directory else {}


async def _never() -> bool:
    return False
