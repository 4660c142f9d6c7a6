"""The yardstick: a bare grpc.aio server that answers GetMemory with bytes it was given.

No TLS, no proxy, no token, no database: what any Python service could reach at best.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import uvloop
from kimberly.memory.v1 import memory_pb2, memory_pb2_grpc


class Echo(memory_pb2_grpc.MemoryServiceServicer):
    """Answers every GetMemory with the same memory."""

    def __init__(self, answer: memory_pb2.GetMemoryResponse) -> None:
        self._answer = answer

    async def GetMemory(
        self, request: memory_pb2.GetMemoryRequest, context: Any
    ) -> memory_pb2.GetMemoryResponse:
        """Return the memory."""
        return self._answer


async def serve(socket: Path, answer: memory_pb2.GetMemoryResponse) -> None:
    """Serve until SIGTERM."""
    server = grpc.aio.server()
    echo = Echo(answer)  # type: ignore[abstract] # one method is called
    memory_pb2_grpc.add_MemoryServiceServicer_to_server(echo, server)
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    await stopped.wait()
    await server.stop(None)


@asynccontextmanager
async def running(
    answer: memory_pb2.GetMemoryResponse,
) -> AsyncIterator["memory_pb2_grpc.MemoryServiceAsyncStub"]:
    """Run the server in a process of its own and return a stub of it."""
    with TemporaryDirectory() as directory:
        socket, file = Path(directory, "echo"), Path(directory, "answer")
        file.write_bytes(answer.SerializeToString())
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.echo", str(socket), str(file)
        )
        try:
            async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
                await asyncio.wait_for(channel.channel_ready(), timeout=10)
                yield memory_pb2_grpc.MemoryServiceStub(channel)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await process.wait()


if __name__ == "__main__":
    uvloop.run(
        serve(
            Path(sys.argv[1]),
            memory_pb2.GetMemoryResponse.FromString(Path(sys.argv[2]).read_bytes()),
        )
    )
