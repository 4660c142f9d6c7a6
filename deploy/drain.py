"""Lets the Envoy of an edge pod end gently: `python -m deploy.drain` waits in it for its SIGTERM.

Envoy closes its listeners at once when it is told to end. Told by this process beforehand, it
goes on serving, asks clients to connect anew, and refuses new connections in the end.
"""

import http.client
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Annotated, Final

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.settings import PREFIX, explain

EXIT_SETTINGS: Final = 78
"""EX_CONFIG of sysexits.h."""
_ANSWER_SECONDS: Final = 5.0


class DrainSettings(BaseSettings):
    """What it is told; each is the environment variable of its name."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    admin_socket: Path
    """Unix socket of Envoy's admin interface."""
    settle_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long load balancers may take to send nothing new."""


class Admin(http.client.HTTPConnection):
    """A connection to the admin interface of an Envoy."""

    def __init__(self, path: Path) -> None:
        """Prepare to connect to a Unix socket."""
        super().__init__("envoy", timeout=_ANSWER_SECONDS)
        self._path = path

    def connect(self) -> None:
        """Connect.

        Raises:
            OSError: Nobody listens.
        """
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(self._path))


def drain(admin_socket: Path) -> int:
    """Tell Envoy to drain, and return the status of its answer. It ends by its own SIGTERM."""
    admin = Admin(admin_socket)
    try:
        admin.request("POST", "/drain_listeners?graceful&skip_exit")
        return admin.getresponse().status
    finally:
        admin.close()


def main() -> int:
    """Wait to be ended, then drain."""
    try:
        told = DrainSettings()
    except ValidationError as error:
        sys.stderr.write(f"{explain(error)}\n")
        return EXIT_SETTINGS
    # The first process of a container does not even notice a signal that it does not ask for.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    sys.stderr.write("waiting for the end of the pod\n")
    signal.sigwait(ends)
    time.sleep(told.settle_seconds)
    return 0 if drain(told.admin_socket) == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
