"""Files of master keys, as an operator makes them."""

import base64
from pathlib import Path


def key_file(path: Path, *keys: bytes) -> Path:
    """Write master keys to a file, oldest first, and return its path."""
    path.touch(mode=0o600)
    path.write_bytes(b"".join(base64.b64encode(key) + b"\n" for key in keys))
    return path
