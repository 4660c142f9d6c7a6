"""Files and directories that nobody else can read or take the place of."""

import contextlib
import json
import os
import pwd
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def make_private(directory: Path, user: str | None = None) -> None:
    """Make a directory that only `user`, or else we, can enter.

    Raises:
        PermissionError: it exists and belongs to somebody else: /tmp is open to everybody.
    """
    owner = os.geteuid() if user is None else pwd.getpwnam(user).pw_uid
    _make(directory, 0o700, {owner, os.geteuid()})
    os.chown(directory, owner, -1)
    directory.chmod(0o700)


def make_passable(directory: Path) -> None:
    """Make a directory of ours that others can pass through but neither list nor write.

    Raises:
        PermissionError: it exists and belongs to somebody else.
    """
    _make(directory, 0o711, {os.geteuid()})
    directory.chmod(0o711)


def _make(directory: Path, mode: int, owners: set[int]) -> None:
    with contextlib.suppress(FileExistsError):
        directory.mkdir(mode=mode, parents=True)
    if directory.is_symlink() or directory.stat().st_uid not in owners:
        raise PermissionError(f"{directory} belongs to somebody else")


def write_private(path: Path, content: str) -> None:
    """Replace a file by a new one that only we can read, in one step."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(content)
    draft.replace(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with `write_private`."""
    write_private(path, json.dumps(content, indent=2) + "\n")
