"""A Prometheus beside the mesh, where the machine has one: it remembers what status asks for."""

import json
import shutil
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from local import probes
from local.layout import CHECKOUT, Layout
from local.ports import LOOPBACK
from local.processes import Program

NAME = "prometheus"
"""The program, and what it is called in the table. Debian's package of that name has it."""
_UNPACKED = CHECKOUT / "build" / NAME / "usr" / "bin" / NAME
"""Where it is if that package was unpacked rather than installed."""

_KEPT = "24h"
_EVERY = "5s"


def find_prometheus() -> str | None:
    """Return the program, if the machine has it."""
    return shutil.which(NAME) or (str(_UNPACKED) if _UNPACKED.exists() else None)


def program(
    command: str, layout: Layout, port: int, targets: Mapping[str, Sequence[str]]
) -> Program:
    """Return the program that asks every process of the mesh, and write what it reads.

    Args:
        command: The program.
        layout: Where its configuration, its data and its log are.
        port: Of the loopback interface, where it is asked.
        targets: What to ask, by the name of the process.
    """
    layout.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    config = layout.state / "prometheus.json"
    config.write_text(json.dumps(configuration(targets), indent=2) + "\n")
    endpoint = probes.Endpoint(port=port)

    async def is_ready() -> bool:
        return (await probes.http(endpoint, "GET", "/-/ready")).status == 200

    return Program(
        name=NAME,
        command=(
            command,
            f"--config.file={config}",
            f"--storage.tsdb.path={layout.data / NAME}",
            f"--storage.tsdb.retention.time={_KEPT}",
            f"--web.listen-address={LOOPBACK}:{port}",
        ),
        directory=layout.state,
        log=layout.logs / f"{NAME}.log",
        is_ready=is_ready,
        address=f"http://{LOOPBACK}:{port}",
    )


def configuration(targets: Mapping[str, Sequence[str]]) -> dict[str, object]:
    """Return what Prometheus reads: JSON is YAML.

    The label `job` is the process, as it is in a cluster; `path` tells what the process measures
    from what its Envoy does.
    """
    asked = [
        (name.partition("-")[0], name, urlsplit(url))
        for name, urls in targets.items()
        for url in urls
    ]
    paths = sorted({url.path for _, _, url in asked})
    return {
        "global": {"scrape_interval": _EVERY, "scrape_timeout": "4s"},
        "scrape_configs": [
            {
                "job_name": path,
                "metrics_path": path,
                "static_configs": [
                    {
                        "targets": [url.netloc],
                        "labels": {"job": process, "instance": name, "path": path},
                    }
                    for process, name, url in asked
                    if url.path == path
                ],
            }
            for path in paths
        ],
    }
