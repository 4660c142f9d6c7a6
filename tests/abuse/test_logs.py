"""Nobody writes a line of a log but who keeps it."""

from __future__ import annotations

import json
import secrets

import httpx
import pytest

from local.mesh import Mesh
from tests.abuse.wire import Wire
from tests.mesh import User, bearer, eventually


@pytest.mark.parametrize(
    "said",
    [
        '","code":200,"forged":"{}',
        '"}}\\n{{"forged":"{}"}}',
        "\x1b[31m{}\x1b[0m\x1b]0;forged\x07",
        "\u2028{}\x85",
        "{}" + "x" * 10_000,
    ],
    ids=["members", "a line", "ANSI", "other line ends", "long"],
)
async def test_what_a_caller_says_is_one_value_on_one_line(
    mesh: Mesh, wire: Wire, bob: User, said: str
) -> None:
    mark = secrets.token_hex(8)
    agent = said.replace("{}", mark)
    answer = await wire.get("/v1/user", [*bearer(bob.token), ("user-agent", agent)])
    assert answer.status in {httpx.codes.OK, httpx.codes.BAD_REQUEST}
    # What comes later in the log: then the line above has been written.
    after = secrets.token_hex(8)
    await wire.get("/v1/user", [*bearer(bob.token), ("user-agent", after)])
    log = mesh.layout.logs / "edge.log"

    async def look() -> list[bytes]:
        return log.read_bytes().split(b"\n")

    lines = await eventually(look, lambda lines: any(after.encode() in line for line in lines))
    told = [line for line in lines if mark.encode() in line]
    assert len(told) <= 1
    for line in told:
        seen = json.loads(line)
        assert mark in seen["agent"]
        assert "forged" not in seen
        assert seen["code"] == answer.status
        assert len(line) < 2000
        assert b"\x1b" not in line
