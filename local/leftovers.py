"""What a mesh that was killed leaves outside of its state directory: sockets, under /tmp."""

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from local import lock
from local.layout import Layout
from local.ports import is_unused

_OWNER: Final = "state"
"""Names, beside the sockets of a mesh, its state directory."""
_SEAWEED: Final = Path("/tmp")  # noqa: S108 - its choice
_PORT: Final = re.compile(r"seaweedfs-\w+-grpc-(\d+)\.sock")


def own(layout: Layout) -> None:
    """Note beside the sockets of a mesh whose they are."""
    (layout.sockets / _OWNER).write_text(str(layout.state))


def seaweed_socket(part: str, port: int) -> Path:
    """Return the socket that a part of SeaweedFS makes for its gRPC port."""
    return _SEAWEED / f"seaweedfs-{part}-grpc-{port}.sock"


def clear() -> None:
    """Remove what meshes of ours left that run no more. Those that end in order leave nothing."""
    for note in Path(tempfile.gettempdir()).glob(f"kimberly-{os.getuid()}-*/{_OWNER}"):
        with contextlib.suppress(FileNotFoundError):
            if _is_ours(note):
                _clear(Layout(Path(note.read_text())))
    for socket in _SEAWEED.glob("seaweedfs-*.sock"):
        named = _PORT.fullmatch(socket.name)
        with contextlib.suppress(FileNotFoundError):
            if named and _is_ours(socket) and is_unused(int(named[1])):
                socket.unlink()


def _is_ours(path: Path) -> bool:
    return path.lstat().st_uid == os.getuid()


def _clear(layout: Layout) -> None:
    with lock.kept_free(layout.state) as is_free:
        if is_free:
            shutil.rmtree(layout.postgres_sockets, ignore_errors=True)
            shutil.rmtree(layout.sockets, ignore_errors=True)
