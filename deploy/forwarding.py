"""Reaches what nothing outside of a cluster can reach: by a port that the API server passes on."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LISTENS: Final = re.compile(r"Forwarding from (127\.0\.0\.1:\d+) ->")


class Unreachable(Exception):
    """The cluster does not pass the port on."""


@contextmanager
def forwarded(service: str, port: int, namespace: str = "kimberly") -> Iterator[str]:
    """Pass on a port of a service, as whom kubectl is, and yield its URL here.

    No network policy is in its way: the kubelet connects from within the pod.

    Raises:
        Unreachable: There is no such service, it has no pod that runs, or kubectl may not.
    """
    command = ["kubectl", "-n", namespace, "port-forward", f"service/{service}", f":{port}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as kubectl:
        try:
            # Nothing, if it ends.
            said = kubectl.stdout.readline() if kubectl.stdout else ""
            listens = _LISTENS.match(said)
            if listens is None:
                kubectl.terminate()
                raise Unreachable(f"kubectl: {kubectl.communicate()[1].strip()}")
            yield f"http://{listens[1]}"
        finally:
            kubectl.terminate()
