"""Runs a machine of Fly.io on this one: `machine_here.py PROCESS {"name of a peer": "address"}`.

It is what `python -m deploy.machine serve` does, but that addresses stand for the names that only
Fly's name servers know.
"""

import asyncio
import json
import sys

from deploy.machine import Machine

if __name__ == "__main__":
    machine = Machine.told(sys.argv[1])
    machine.prepare()
    config = machine.config.read_text()
    for name, address in json.loads(sys.argv[2]).items():
        config = config.replace(name, address)
    machine.config.write_text(config)
    sys.exit(asyncio.run(machine.run()))
