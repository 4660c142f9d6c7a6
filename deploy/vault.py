"""The secrets of production where they lie: in Vault, by its own program."""

import json
import subprocess
from collections.abc import Iterable, Mapping
from typing import Any, Final

_MOUNT: Final = "-mount=secret"
NAMES: Final = ("database", "database-owner", "backup", "backup-identity")
"""Those of which some value is ours to make; a provider gives the others."""


def read(names: Iterable[str] = NAMES) -> dict[str, dict[str, str]]:
    """Return the values of secrets.

    Raises:
        subprocess.CalledProcessError: Vault does not tell; its program has said why.
    """
    return {name: _read(name)["data"] for name in names}


def write(name: str, values: Mapping[str, str]) -> None:
    """Keep new values of a secret, which is all of them, unless somebody else just did.

    Raises:
        subprocess.CalledProcessError: Vault does not take them; its program has said why.
    """
    version = _read(name)["metadata"]["version"]
    # By its standard input: who looks at the processes of this machine sees none.
    command = ["vault", "kv", "put", _MOUNT, f"-cas={version}", f"kimberly/{name}", "-"]
    subprocess.run(
        command, input=json.dumps(values), check=True, text=True, stdout=subprocess.DEVNULL
    )


def _read(name: str) -> dict[str, Any]:
    command = ["vault", "kv", "get", _MOUNT, "-format=json", f"kimberly/{name}"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told: dict[str, Any] = json.loads(done.stdout)["data"]
    return told
