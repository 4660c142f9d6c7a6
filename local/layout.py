"""Where everything of one local mesh lives on disk."""

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Layout:
    """Directories and files of one mesh. Two meshes never share a state directory."""

    state: Path

    @classmethod
    def default(cls) -> "Layout":
        """Return the layout under KIMBERLY_STATE, or .mesh in the checkout."""
        return cls(Path(os.environ.get("KIMBERLY_STATE", CHECKOUT / ".mesh")).resolve())

    @property
    def sockets(self) -> Path:
        """Directory of Unix sockets, 0700. Its path is short: the kernel allows 107 bytes."""
        name = hashlib.sha256(str(self.state).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"kimberly-{os.getuid()}-{name}"

    @property
    def postgres_sockets(self) -> Path:
        """Directory of the socket of PostgreSQL, which may run as another user."""
        return self.sockets.with_name(f"{self.sockets.name}-postgres")

    @property
    def secrets(self) -> Path:
        """Passwords and keys of the stores, 0700, made on first start."""
        return self.state / "secrets"

    @property
    def certificates(self) -> Path:
        """The local CA and one directory of SDS files an identity."""
        return self.state / "certificates"

    @property
    def envoy(self) -> Path:
        """Rendered Envoy configurations."""
        return self.state / "envoy"

    @property
    def logs(self) -> Path:
        """One log file a process."""
        return self.state / "log"

    @property
    def mails(self) -> Path:
        """The mails that services sent, a file each."""
        return self.state / "mails"

    @property
    def data(self) -> Path:
        """Data directories of the stores."""
        return self.state / "data"

    @property
    def endpoints(self) -> Path:
        """JSON file that tells clients, tests and the CLI how to reach the running mesh."""
        return self.state / "mesh.json"

    def app_socket(self, process: str) -> Path:
        """Return the socket that a service listens on."""
        return self.sockets / f"{process}.app"

    def outbound_socket(self, process: str) -> Path:
        """Return the socket through which a process reaches its peers: its sidecar's outbound."""
        return self.sockets / f"{process}.out"

    def metrics_socket(self, process: str) -> Path:
        """Return the socket that a process tells on what it measures."""
        return self.sockets / f"{process}.metrics"

    def admin_socket(self, process: str) -> Path:
        """Return the socket of the admin interface of a process's Envoy."""
        return self.sockets / f"{process}.admin"
