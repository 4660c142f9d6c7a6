"""Backups: `kimberly backup …`, for whoever stands where the server is.

They are the server's, with passwords of its stores: nobody can ask a mesh for them. This command is
its command, by the name by which people look for it.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import typer

_UNKNOWN = 2
"""What this command ends with if it cannot tell."""


def backup(context: typer.Context) -> None:
    """Make, verify, list and restore backups. In an image or a checkout of the server only."""
    if not _is_here():
        typer.echo(
            "the server is not here: backups are made and restored in its image, or in a checkout",
            err=True,
        )
        raise typer.Exit(_UNKNOWN)
    os.execv(sys.executable, [sys.executable, "-m", "server", "backup", *context.args])  # noqa: S606 - of ours


def _is_here() -> bool:
    """Tell whether the package `server` is the one that makes backups, without importing it."""
    found = find_spec("server")
    places = (found and found.submodule_search_locations) or ()
    return any((Path(place) / "backup" / "manifest.py").exists() for place in places)
