"""`python -m local up` with stand-ins for the services and for its one worker."""

import asyncio
import contextlib
import sys
from pathlib import Path

from local.__main__ import run
from local.fleet import Commands
from local.layout import Layout
from local.mesh import Mesh

STAND_IN = str(Path(__file__).with_name("stand_in.py"))
COMMANDS = Commands(
    migrate=(sys.executable, STAND_IN, "migrate"),
    service=(sys.executable, STAND_IN),
    worker=(sys.executable, STAND_IN, "worker"),
)

if __name__ == "__main__":
    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(run(Mesh(Layout.default(), workers=1, commands=COMMANDS)))
