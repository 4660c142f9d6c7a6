"""`python -m tests.faults.zombie_worker SOCKET LEASES`: stops with leases in hand, then settles.

It is what a worker would be that never looks at the clock. It says how many leases it has, stops
itself by SIGSTOP, and when it is woken it settles all of them on a new stream and says what became
of that, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import uuid
from pathlib import Path
from typing import Any

import grpc
from kimberly.jobs.v1 import jobs_pb2 as pb
from kimberly.jobs.v1 import jobs_pb2_grpc as rpc

from tests.faults.jobs import KIND
from workers.__main__ import open_channel

WORKER_ID = uuid.uuid4().hex


async def opened(stub: rpc.WorkerServiceAsyncStub) -> Any:
    """Open a stream as this worker."""
    call = stub.Work(timeout=60)  # type: ignore[call-arg]
    await call.write(pb.WorkRequest(hello=pb.Hello(worker_id=WORKER_ID, kinds=[KIND])))
    await call.read()
    return call


async def leased(stub: rpc.WorkerServiceAsyncStub, count: int) -> tuple[Any, list[pb.Lease]]:
    """Return a session and so many leases; who takes them too slowly loses all and begins anew."""
    while True:
        call = await opened(stub)
        await call.write(pb.WorkRequest(credit=pb.Credit(jobs=count)))
        leases: list[pb.Lease] = []
        try:
            while len(leases) < count:
                leases += (await call.read()).leased.leases
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
            continue
        return call, leases


def say(value: object) -> None:
    """Write a line of JSON."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def main(socket: Path, count: int) -> None:
    """Take leases, stop, settle."""
    async with open_channel(socket) as channel:
        stub: rpc.WorkerServiceAsyncStub = rpc.WorkerServiceStub(channel)
        call, leases = await leased(stub, count)
        say(len(leases))
        os.kill(os.getpid(), signal.SIGSTOP)
        call.cancel()
        call = await opened(stub)
        result = json.dumps({"by": "zombie"})
        outcomes = [
            pb.Outcome(
                job_id=lease.job_id,
                lease_token=lease.lease_token,
                completed=pb.Completed(result_json=result),
            )
            for lease in leases
        ]
        await call.write(pb.WorkRequest(settle=pb.Settle(outcomes=outcomes)))
        told = {"settled": 0, "lost": 0}
        while sum(told.values()) < count:
            response = await call.read()
            told["settled"] += len(response.settled.job_ids)
            told["lost"] += len(response.lease_lost.job_ids)
        say(told)
        call.cancel()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
