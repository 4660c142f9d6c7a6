"""The apps of Fly.io: what their files say, and what their machines are told."""

import datetime as dt
import os
import shlex
import subprocess
import tomllib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from deploy import fly
from deploy.secrets import new_values
from local.layout import CHECKOUT

HOST = "api.kimberly.example"
NOW = dt.datetime.now(dt.UTC)

# --- what Fly's reference of fly.toml knows, as far as we use it (read on 2026-11-23) ------------

Duration = Annotated[str, Field(pattern=r"^\d+s$")]


class Known(BaseModel):
    """A table without any other key."""

    model_config = ConfigDict(extra="forbid")


class Ports(Known):
    port: int
    handlers: list[Literal["http", "tls", "proxy_proto"]] = []
    proxy_proto_options: dict[str, str] = {}


class Concurrency(Known):
    type: Literal["connections"]
    soft_limit: int
    hard_limit: int


class TcpCheck(Known):
    grace_period: Duration
    interval: Duration
    timeout: Duration


class Check(TcpCheck):
    type: Literal["http", "tcp"]
    port: int
    method: Literal["get"] | None = None
    path: str | None = None


class Service(Known):
    protocol: Literal["tcp"]
    internal_port: int
    auto_stop_machines: Literal["off"]
    auto_start_machines: bool
    ports: list[Ports]
    concurrency: Concurrency
    tcp_checks: list[TcpCheck]


class Machine(Known):
    size: Literal["shared-cpu-1x", "shared-cpu-2x"]
    memory: Annotated[str, Field(pattern=r"^\d+mb$")]

    @property
    def mebibytes(self) -> int:
        return int(self.memory.removesuffix("mb"))

    @property
    def cpus(self) -> int:
        return int(self.size[-2])


class Mount(Known):
    source: str
    destination: str
    initial_size: Annotated[str, Field(pattern=r"^\d+gb$")]
    snapshot_retention: int = 5


class Files(Known):
    guest_path: str
    secret_name: str


class Restart(Known):
    policy: Literal["never", "on-failure"]
    retries: int = 10


class App(Known):
    app: str
    primary_region: str
    kill_signal: Literal["SIGTERM", "SIGINT"] = "SIGINT"
    kill_timeout: Annotated[int, Field(gt=0, le=300)] = 5
    processes: dict[str, str] = {}
    env: dict[str, str] = {}
    deploy: dict[Literal["release_command"], str] = {}
    services: list[Service] = []
    checks: dict[str, Check] = {}
    metrics: dict[Literal["port", "path"], int | str] = {}
    vm: Annotated[list[Machine], Field(min_length=1, max_length=1)]
    mounts: list[Mount] = []
    files: list[Files] = []
    restart: list[Restart] = []
    experimental: dict[Literal["cmd"], list[str]] = {}


def app_of(name: str) -> App:
    return App.model_validate(tomllib.loads((CHECKOUT / "fly" / f"{name}.toml").read_text()))


def values() -> dict[str, dict[str, str]]:
    """Return secrets of which none was left empty."""
    made = new_values("fly")
    for name, key in (("s3", "access-key"), ("s3", "secret-key"), ("backup", "access-key")):
        made[name][key] = "given"
    for key in ("secret-key", "erasures-access-key", "erasures-secret-key"):
        made["backup"][key] = "given"
    made["mails"]["smtp-password"] = "given"
    return made


def told(name: str) -> dict[str, str]:
    return fly.variables(name, values(), prefix="kimberly", host_name=HOST, now=NOW)


def dry_run(*more: str, **environment: str) -> list[list[str]]:
    done = subprocess.run(
        [CHECKOUT / "deploy" / "fly.sh", "--dry-run", *(more or (HOST,))],
        env={"PATH": os.environ["PATH"], **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return [shlex.split(line) for line in done.stdout.splitlines() if "flyctl " in line]


def environments() -> dict[str, dict[str, str]]:
    """Return by app what its machines are told: by their file, by the script, and as secrets."""
    found = {}
    for command in dry_run():
        if command[:2] == ["flyctl", "deploy"]:
            name = command[command.index("--app") + 1].removeprefix("kimberly-")
            given = [command[at + 1] for at, word in enumerate(command) if word == "--env"]
            pairs = dict(each.split("=", 1) for each in given)
            found[name] = app_of(name).env | pairs | told(name)
    return found
