"""Files that hold a secret."""

import stat
from pathlib import Path
from typing import Final

from server.kms import KmsUnusable

_OTHERS_AND_WRITERS: Final = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP


def read_private(path: Path, variable: str) -> bytes:
    """Read a file that nobody else may read.

    Its mode is 0600 or less; 0640 is taken from root, for so Kubernetes mounts secrets.

    Raises:
        KmsUnusable: There is no such file, or others may read it. Names the variable.
    """
    try:
        with path.open("rb") as file:
            status = path.stat()
            content = file.read()
    except OSError as error:
        raise KmsUnusable(f"{variable}: {path}: {error.strerror}") from error
    if _is_open_to_others(status.st_mode, status.st_uid):
        raise KmsUnusable(
            f"{variable}: {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
            f"close it with: chmod 600 {path}"
        )
    return content


def _is_open_to_others(mode: int, owner: int) -> bool:
    return bool(mode & (_OTHERS_AND_WRITERS if owner == 0 else stat.S_IRWXO | stat.S_IRWXG))
