"""Certificates are replaced while the mesh runs: new connections notice, and none breaks."""

import asyncio
import datetime as dt
import enum
import re
from collections.abc import Iterable
from typing import Final, assert_never

from local import probes
from local.certificates import Authority, current, locked
from local.envoy import Domain
from local.fleet import PUBLIC, identities
from local.layout import Layout
from local.processes import POLL_SECONDS
from server.access import EDGE

_SHOWN_SECONDS: Final = 30.0


class Step(enum.StrEnum):
    """How another authority takes over."""

    PUBLISH = "publish"
    """It is trusted beside the one that signs."""

    SIGN = "sign"
    """It signs, and the one before is still trusted."""

    WITHDRAW = "withdraw"
    """The one before is trusted no more."""


def rotate_leaves(layout: Layout) -> None:
    """Issue every identity anew, by the same authority."""
    now = dt.datetime.now(dt.UTC)
    with locked(layout.certificates):
        _issue(Authority.open(layout.certificates, now=now), now)


def rotate_authority(layout: Layout, step: Step) -> None:
    """Take one step towards another authority, and issue every identity anew.

    Raises:
        FileNotFoundError: no authority was published that could sign.
    """
    now = dt.datetime.now(dt.UTC)
    with locked(layout.certificates):
        authority = Authority.open(layout.certificates, now=now)
        match step:
            case Step.PUBLISH:
                authority = authority.publish(now=now)
            case Step.SIGN:
                authority = authority.sign()
            case Step.WITHDRAW:
                authority = authority.withdraw()
            case _:
                assert_never(step)
        _issue(authority, now)


async def wait_shown(layout: Layout, envoys: Iterable[str]) -> None:
    """Wait until Envoys show the certificates that are current.

    Args:
        layout: Of the mesh that runs.
        envoys: The edge, and processes that have a sidecar.

    Raises:
        TimeoutError: one of them still shows another.
    """
    async with asyncio.timeout(_SHOWN_SECONDS):
        for name in envoys:
            while not await _shows(layout, name):  # noqa: ASYNC110 - it is not our event
                await asyncio.sleep(POLL_SECONDS)


def _issue(authority: Authority, now: dt.datetime) -> None:
    for name, names in identities(Domain()).items():
        authority.issue(name, names, now=now)


async def _shows(layout: Layout, name: str) -> bool:
    admin = probes.Endpoint(socket=layout.admin_socket(name))
    answer = await probes.http(admin, "GET", "/certs")
    # The answer comes in chunks, perhaps.
    text = re.sub(rb"\r\n[0-9a-f]+\r\n", b"", answer.body).decode()
    shown = {int(serial, 16) for serial in re.findall(r'"serial_number": "([0-9a-f]+)"', text)}
    needed = [current(layout.certificates / identity) for identity in _identities_of(name)]
    return shown >= {leaf.serial_number for leaf in needed if leaf}


def _identities_of(name: str) -> tuple[str, ...]:
    # Replicas share one: that of jobs-2 is jobs.
    process = name.partition("-")[0]
    return (EDGE, PUBLIC) if process == EDGE else (process,)
