"""The whole mesh on this machine, from the stores to the edge: started, kept running, stopped."""

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from local import envoy
from local.fleet import EDGE_LIMITS, Commands, Fleet, claim_ports
from local.layout import Layout
from local.ports import LOOPBACK, Ports
from local.postgres import APPLICATION, OWNER, SUPERUSER, SYSTEM
from local.private import write_json
from local.processes import POLL_SECONDS, Process, State, run_once, supervise, together
from local.servers import BUCKET, PROCESSES_FILE, Stores, claimed
from server.access import EDGE, WORKER

RENEWAL_SECONDS = 600.0
WHOLE_SECONDS = 30.0
# Stages stop from the highest to the lowest; the stores have the lowest.
SIDECARS, SERVICES, WORKERS, FRONT = 1, 2, 3, 4
REAL = Commands()
SIDECAR_LIMITS = envoy.SidecarLimits()
KEEPER_OF_KEYS = "auth"
"""Every other sidecar asks this one for the keys of tokens before it takes calls."""

Running = TypeVar("Running", "Mesh", Stores)


class Mesh:
    """Everything that `make up` starts.

    Entering the context claims the state directory and begins to start things; `wait_ready` waits
    until they are. What dies is started again. Leaving the context stops everything, in order.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        workers: int = 2,
        replicas: int = 1,
        durable: bool = True,
        commands: Commands = REAL,
        prometheus: str | None = None,
        sidecar_limits: envoy.SidecarLimits = SIDECAR_LIMITS,
        edge_limits: envoy.EdgeLimits = EDGE_LIMITS,
        longest_pause_seconds: float = 10.0,
    ) -> None:
        """Describe a mesh; nothing runs yet.

        Args:
            layout: Where its files are.
            workers: How many.
            replicas: How many edges, and how many of each service behind a sidecar of its own.
            durable: Whether its data outlives a crash of the machine.
            commands: What its processes run.
            prometheus: The program that remembers what is measured; None: nothing does.
            sidecar_limits: What sidecars refuse.
            edge_limits: What edges refuse.
            longest_pause_seconds: How long what ends again and again may stay down.
        """
        self.layout = layout
        self.stores = Stores(layout, durable=durable)
        self._workers = [f"{WORKER}-{number}" for number in range(1, workers + 1)]
        self._replicas = replicas
        self._commands = commands
        self._prometheus = prometheus
        self._sidecar_limits = sidecar_limits
        self._edge_limits = edge_limits
        self._longest_pause_seconds = longest_pause_seconds
        self._started = asyncio.Event()
        self._failure: Exception | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Mesh":
        """Claim the state directory and begin to start.

        Raises:
            AlreadyRunningError: the state directory is in use.
        """
        async with contextlib.AsyncExitStack() as stack:
            await self._plan(stack.enter_context(claimed(self.layout)))
            stack.callback(self.stores.clean)
            stack.callback(self.layout.endpoints.unlink, missing_ok=True)
            record = self.layout.state / PROCESSES_FILE
            self._supervisor = await stack.enter_async_context(
                supervise(record, longest_pause_seconds=self._longest_pause_seconds)
            )
            self._supervisor.listeners.append(lambda _: self._write_endpoints())
            self._supervisor.background(self._start())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *error: object) -> None:
        """Stop everything: edge, workers, services, sidecars, stores."""
        await self._stack.aclose()

    @property
    def edge(self) -> str:
        """The base URL of the edge: of the first, if there are several."""
        return self._fleet.public_url

    @property
    def edges(self) -> Mapping[str, int]:
        """The ports of all edges, by their names."""
        return {name: self._fleet.ports[name] for name in self._fleet.edges}

    @property
    def ca(self) -> Path:
        """The certificate authority that clients of the edge trust."""
        return self.layout.certificates / "ca.pem"

    @property
    def processes(self) -> Mapping[str, Process]:
        """What runs, by name, in the order of starting."""
        return self._supervisor.processes

    @property
    def is_ready(self) -> bool:
        """Whether the start is over and every process was ready when it was last looked at."""
        return (
            self._started.is_set()
            and self._failure is None
            and all(process.state is State.READY for process in self.processes.values())
        )

    def listen(self, changed: Callable[[Process], None]) -> None:
        """Call `changed` whenever a process changes its state or its pid."""
        self._supervisor.listeners.append(changed)

    def process(self, name: str) -> Process:
        """Return one process: a store, a service, `worker-1`, `memory-sidecar`, `edge`."""
        return self.processes[name]

    async def wait_ready(self) -> None:
        """Wait until every process is ready and the edge reaches every service.

        Raises:
            ProcessFailedError: a process did not become ready.
            TimeoutError: all processes run, and still the edge does not reach the services.
        """
        await self._started.wait()
        if self._failure is not None:
            raise self._failure
        await together(*(process.wait_ready() for process in self.processes.values()))
        await self._wait_whole()

    async def _plan(self, ports: Ports) -> None:
        await self.stores.plan(ports)
        self._fleet = Fleet(
            self.layout,
            self.stores,
            claim_ports(ports, self._replicas, self._workers),
            self._workers,
            self._commands,
            self._prometheus,
            sidecar_limits=self._sidecar_limits,
            replicas=self._replicas,
            edge_limits=self._edge_limits,
        )
        ports.save()
        await asyncio.to_thread(self._fleet.prepare)

    async def _start(self) -> None:
        try:
            await self._start_in_order()
        except Exception as error:  # noqa: BLE001 - `wait_ready` raises it
            self._failure = error
        self._started.set()
        self._write_endpoints()
        await self._renew()

    async def _start_in_order(self) -> None:
        """Start everything, each Envoy after those that it asks for their health or their keys.

        One that finds a neighbour missing looks again half a second later. Along the chain from
        the edge to a service that adds up to two seconds.
        """
        await together(
            self._start_database(),
            self.stores.start_cache(self._supervisor),
            self.stores.start_blobs(self._supervisor),
        )
        await together(*(self._start_service(name) for name in self._fleet.services))
        rest = [name for name in self._fleet.sidecars if not self._keeps_keys(name)]
        await together(*(self._start_sidecar(name) for name in rest))
        fronts = [(self._fleet.worker(name), WORKERS) for name in self._workers]
        fronts += [(self._fleet.edge(name), FRONT) for name in self._fleet.edges]
        if watching := self._fleet.prometheus():
            fronts.append((watching, FRONT))
        for program, stage in fronts:
            self._supervisor.start(program, stage=stage)
        await together(*(process.wait_ready() for process in self.processes.values()))
        await self._wait_whole()

    async def _start_service(self, name: str) -> None:
        await self._supervisor.start(self._fleet.service(name), stage=SERVICES).wait_ready()
        if self._keeps_keys(name):
            await self._start_sidecar(name)

    def _keeps_keys(self, name: str) -> bool:
        return self._fleet.services.get(name) == KEEPER_OF_KEYS

    async def _start_sidecar(self, process: str) -> None:
        await self._supervisor.start(self._fleet.sidecar(process), stage=SIDECARS).wait_ready()

    async def _start_database(self) -> None:
        await self.stores.start_database(self._supervisor)
        await run_once(self._fleet.migration())

    async def _wait_whole(self) -> None:
        try:
            async with asyncio.timeout(WHOLE_SECONDS):
                while not await self._fleet.is_whole():  # noqa: ASYNC110 - it is not our event
                    await asyncio.sleep(POLL_SECONDS)
        except TimeoutError:
            raise TimeoutError(
                f"Everything runs, but {self.edge}/healthz does not say that every service can "
                f"be reached; the logs of the Envoys are in {self.layout.logs}"
            ) from None

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            await asyncio.to_thread(self._fleet.renew)

    # --- what others read ----------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Return how to reach the mesh and what runs: the content of `layout.endpoints`.

        Secrets are not in it, only the files that hold them.
        """
        kept, s3 = self.stores.secrets, self.stores.s3
        return {
            "edge": self.edge,
            "host": LOOPBACK,
            "port": self._fleet.ports[EDGE],
            "ca": str(self.ca),
            "pid": os.getpid(),
            "ready": self.is_ready,
            "state": str(self.layout.state),
            "logs": str(self.layout.logs),
            "sockets": str(self.layout.sockets),
            "metrics": self._fleet.metrics_urls(),
            "prometheus": self._fleet.prometheus_url(),
            # A copy: the table asks from a thread of its own.
            "processes": {name: _record(each) for name, each in dict(self.processes).items()},
            "database": {
                "application": str(kept.url_path(APPLICATION)),
                "system": str(kept.url_path(SYSTEM)),
                "owner": str(kept.url_path(OWNER)),
                "superuser": str(kept.url_path(SUPERUSER)),
            },
            "redis": str(kept.url_path("valkey")),
            "s3": {
                "endpoint": s3.endpoint,
                "bucket": BUCKET,
                "access_key": str(kept.path("s3.access")),
                "secret_key": str(kept.path("s3.secret")),
            },
        }

    def _write_endpoints(self) -> None:
        write_json(self.layout.endpoints, self.describe())


def _record(process: Process) -> dict[str, Any]:
    uptime = process.uptime_seconds
    return {
        "pid": process.pid,
        "state": process.state.value,
        "restarts": process.restarts,
        "started_at": None if uptime is None else time.time() - uptime,
        "address": process.program.address,
        "log": str(process.program.log),
    }


@contextlib.contextmanager
def in_background(running: Running) -> Iterator[Running]:
    """Run a mesh or its stores on a thread of their own until the context ends.

    For callers whose own event loop comes and goes, such as the tests of a session: supervision
    goes on in between. Raises what starting raises.
    """
    started: Future[Callable[[], object]] = Future()

    async def run() -> None:
        ending = asyncio.Event()
        try:
            async with running:
                await running.wait_ready()
                loop = asyncio.get_running_loop()
                started.set_result(lambda: loop.call_soon_threadsafe(ending.set))
                await ending.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="mesh")
    thread.start()
    try:
        end = started.result()
        try:
            yield running
        finally:
            end()
    finally:
        thread.join()
