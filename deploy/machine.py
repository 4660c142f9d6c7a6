"""What a machine of Fly.io runs: `python -m deploy.machine serve memory`, Envoy and a process.

A pod has a container for each, on Fly containers share no socket: here both are processes of one.
The order in which they start and end is that of a pod. `migrate` runs once and ends.
"""

import asyncio
import base64
import http
import os
import signal
import subprocess
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from deploy import pods
from deploy.drain import Admin, drain
from deploy.pods import Places, PodSettings
from server.access import EDGE, WORKER
from server.settings import PREFIX, explain

EXIT_SETTINGS: Final = 78
"""EX_CONFIG of sysexits.h."""
_POLL_SECONDS: Final = 0.05
_START_SECONDS: Final = 30.0
_DRAINS: Final = {EDGE: "10"}
"""For how long an Envoy drains when it is told to, as in pods; others: 2 s."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class FlySettings(BaseSettings):
    """What Fly.io tells every machine."""

    model_config = SettingsConfigDict(env_prefix="FLY_", frozen=True)

    machine_id: str
    private_ip: str
    """The address within the private network of the organization."""


class MachineSettings(BaseSettings):
    """What is told besides a pod's settings; files come as base64, as secrets of Fly do."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    identity_certificate: SecretStr
    """In PEM, as the next ones: names the SPIFFE id of the process."""
    identity_key: SecretStr
    identity_authority: SecretStr
    public_certificate: SecretStr = SecretStr("")
    """For the edge: what clients see."""
    public_key: SecretStr = SecretStr("")
    master_key: SecretStr = SecretStr("")
    """For auth and memory: the file of the local key manager."""
    listen_address: str = "::"
    """What Envoy listens on: the proxy and the checks of Fly come by IPv4, peers by IPv6."""
    machine_directory: Path = Path("/tmp/kimberly")  # noqa: S108 - a machine has one user
    """Made if it is not there. Short: a socket lies below it."""
    envoy_program: Path = Path("/usr/local/bin/envoy")
    settle_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long the proxy of Fly may take to send an edge nothing new."""
    leave_seconds: Annotated[float, Field(ge=0)] = 25.0
    """How long clients of an edge get, from then on, to connect anew."""

    @field_validator("*")
    @classmethod
    def _is_base64(cls, value: Any) -> Any:
        if isinstance(value, SecretStr):
            try:
                base64.b64decode(value.get_secret_value(), validate=True)
            except ValueError as error:
                raise PydanticCustomError("base64", "Input should be base64") from error
        return value


class Machine:
    """Envoy, and beside it a process unless this is the edge."""

    def __init__(self, process: str, told: MachineSettings, pod: PodSettings) -> None:
        self._process = process
        self._told = told
        self._pod = pod
        root = told.machine_directory
        self._places = Places(root / "mesh", root / "identity", root / "public")

    @classmethod
    def told(cls, process: str) -> "Machine":
        """Return the one that the environment speaks of.

        Raises:
            ValidationError: It does not say all that is needed.
        """
        told, fly = MachineSettings(), FlySettings()
        pod = PodSettings(
            process=process,
            pod_name=fly.machine_id,
            pod_ip=fly.private_ip,
            listen_address=told.listen_address,
        )
        return cls(process, told, pod)

    @property
    def config(self) -> Path:
        """The configuration of Envoy."""
        return self._places.config

    def prepare(self) -> None:
        """Write what Envoy and the process read. Again changes nothing."""
        for directory in (self._told.machine_directory, self._places.shared):
            directory.mkdir(mode=0o700, exist_ok=True)
        for path, secret in self._files().items():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.touch(mode=0o600)
            path.write_bytes(base64.b64decode(secret.get_secret_value()))
        pods.prepare(self._pod, self._places)

    async def run(self) -> int:
        """Run until told to end, or until something ends by itself; return the exit status."""
        ended = _end_signal()
        envoy = await asyncio.create_subprocess_exec(*self._envoy_command())
        try:
            await asyncio.to_thread(self._await_live, envoy)
            return await self._serve(envoy, ended)
        finally:
            await _end(envoy)

    async def _serve(self, envoy: Process, ended: asyncio.Event) -> int:
        if self._process == EDGE:
            status = await _first(ended, envoy)
            if status is None:
                await self._leave(envoy)
            return status or 0
        beside = await asyncio.create_subprocess_exec(*self._command(), env=self._environment())
        try:
            status = await _first(ended, envoy, beside)
        finally:
            # It says that it goes, and finishes what it is at, while its Envoy still serves it.
            await _end(beside)
        return beside.returncode or 0 if status is None else status

    async def _leave(self, envoy: Process) -> None:
        await asyncio.sleep(self._told.settle_seconds)
        with suppress(OSError):
            await asyncio.to_thread(drain, self._places.sockets / "admin")
        with suppress(TimeoutError):
            await asyncio.wait_for(envoy.wait(), self._told.leave_seconds)

    def _await_live(self, envoy: Process) -> None:
        """Return when Envoy has opened what it listens on, or has ended.

        Raises:
            TimeoutError: It does neither.
        """
        deadline = time.monotonic() + _START_SECONDS
        while envoy.returncode is None and not self._answers():
            if time.monotonic() > deadline:
                raise TimeoutError("Envoy does not start")
            time.sleep(_POLL_SECONDS)

    def _answers(self) -> bool:
        admin = Admin(self._places.sockets / "admin")
        try:
            admin.request("GET", "/ready")
            return admin.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            admin.close()

    def _envoy_command(self) -> Sequence[str]:
        return (
            str(self._told.envoy_program),
            *("--config-path", str(self.config), "--disable-hot-restart"),
            *("--concurrency", "1", "--log-level", "warning"),
            *("--drain-time-s", _DRAINS.get(self._process, "2")),
        )

    def _command(self) -> Sequence[str]:
        module = ("workers",) if self._process == WORKER else ("server", self._process)
        return (sys.executable, "-m", *module)

    def _environment(self) -> Mapping[str, str]:
        """Return what the process is told: not the keys by which its Envoy is known."""
        ours = {f"{PREFIX}{name}".upper() for name in MachineSettings.model_fields}
        sockets = self._places.sockets
        return {name: value for name, value in os.environ.items() if name not in ours} | {
            f"{PREFIX}LISTEN_SOCKET": str(sockets / "app"),
            f"{PREFIX}OUTBOUND_SOCKET": str(sockets / "out"),
            f"{PREFIX}METRICS_SOCKET": str(sockets / "metrics"),
            f"{PREFIX}MASTER_KEY_FILE": str(self._master_key),
        }

    @property
    def _master_key(self) -> Path:
        return self._told.machine_directory / "key" / "master.key"

    def _files(self) -> Mapping[Path, SecretStr]:
        told, places = self._told, self._places
        files = {
            places.identity / "tls.crt": told.identity_certificate,
            places.identity / "tls.key": told.identity_key,
            places.identity / "ca.crt": told.identity_authority,
            places.public / "tls.crt": told.public_certificate,
            places.public / "tls.key": told.public_key,
            # Pods have it in all three files; whom clients of the edge trust is theirs to know.
            places.public / "ca.crt": told.public_certificate,
            self._master_key: told.master_key,
        }
        return {path: secret for path, secret in files.items() if secret.get_secret_value()}


def _end_signal() -> asyncio.Event:
    ended = asyncio.Event()
    running = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        running.add_signal_handler(number, ended.set)
    return ended


async def _first(ended: asyncio.Event, *running: Process) -> int | None:
    """Wait for the end of one of them; return a failure, or None if it was asked for."""
    told = asyncio.create_task(ended.wait())
    waiting = [told, *(asyncio.create_task(each.wait()) for each in running)]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        return None if told.done() else 1
    finally:
        for task in waiting:
            task.cancel()


async def _end(child: Process) -> None:
    if child.returncode is None:
        child.terminate()
    await child.wait()


@app.command()
def serve(
    process: Annotated[str, typer.Argument(help="edge, auth, memory, jobs or worker")],
) -> None:
    """Run a process of the mesh with its Envoy, until SIGTERM."""
    try:
        machine = Machine.told(process)
    except ValidationError as error:
        typer.echo(explain(error), err=True)
        sys.exit(EXIT_SETTINGS)
    machine.prepare()
    sys.exit(asyncio.run(machine.run()))


@app.command()
def migrate() -> None:
    """Bring roles, extensions and tables up to date. Safe to run again."""
    for command in ("provision", "migrate"):
        done = subprocess.run([sys.executable, "-m", "server", command], check=False)
        if done.returncode:
            sys.exit(done.returncode)


if __name__ == "__main__":
    app(prog_name="python -m deploy.machine")
