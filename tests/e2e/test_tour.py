"""The tour of README.md, every block of it as it is printed, by a newcomer's bash."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path

import pytest

from local.mesh import Mesh
from tests.mesh import address_of

CHECKOUT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EDGE_PORT = 8443
HERE = (".venv", "client")
"""What the tour takes from the directory that it is read in, beside the state of its mesh."""


def blocks() -> list[str]:
    """Return the blocks of the tour in order."""
    text = (CHECKOUT / "README.md").read_text()
    tour = text.partition("\n## A tour in five minutes\n")[2].partition("\n## ")[0]
    return BLOCK.findall(tour)


def script(mesh: Mesh, directory: Path) -> str:
    """Return the blocks as one script that ends where a command fails, and says how far it is."""
    marked = "".join(f"echo '--- {n}'\n{block}" for n, block in enumerate(blocks()))
    # Another mesh may have the port, and another tour the files.
    here = marked.replace(f":{EDGE_PORT}", f":{port_of(mesh)}").replace("/tmp/", f"{directory}/")
    return f"set -euo pipefail\n{here}"


def port_of(mesh: Mesh) -> str:
    return address_of(mesh).rpartition(":")[2]


@pytest.mark.timeout(180)
async def test_every_command_of_the_tour_does_what_is_said(mesh: Mesh, tmp_path: Path) -> None:
    for name in HERE:
        (tmp_path / name).symlink_to(CHECKOUT / name)
    (tmp_path / ".mesh").symlink_to(mesh.layout.state)
    command = {"KIMBERLY_ADDRESS": f"localhost:{port_of(mesh)}", "COLUMNS": "200"}
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", script(mesh, tmp_path)),
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **command},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    said = re.split(r"^--- \d+\n", output.decode(), flags=re.MULTILINE)[1:]
    assert process.returncode == 0, (said[-1:], errors.decode()[-2000:])
    assert len(said) == len(blocks())
    told = dict(zip(blocks(), said, strict=True))
    for part, expected in (
        ("/healthz", "HTTP/2 200"),
        ("What is Ann allergic to?", "Ann is allergic to hazelnuts"),
        ("colour=red", "MESSAGE_MALFORMED"),
        (":restore", "STATE_ACTIVE"),
        (":export", "I took up the oboe again"),
        ("audit verify", "computed anew here"),
        ("openid-configuration", "token_endpoint"),
        ("agents run", "succeeded"),
        ("describe", "rpc QueryMemories"),
        ("Cem keeps bees", '"created": "2"'),
        ("Who keeps bees?", "Cem keeps bees"),
        ("/v1/user/erasures", "era_"),
    ):
        assert any(part in block and expected in text for block, text in told.items()), expected
    (audited,) = [text for block, text in told.items() if "audit events" in block]
    events = [json.loads(line) for line in audited.splitlines()[-6:]]
    assert any("agentName" in event for event in events)
    refused = [block for block, text in told.items() if '"code"' in text]
    assert ["colour=red" in block for block in refused] == [True]
