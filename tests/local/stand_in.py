"""Stands in for a service or a worker: `python stand_in.py migrate|auth|memory|jobs|worker`."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from kimberly.auth.v1 import auth_pb2
from kimberly.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from server.access import PROCESSES

# Any key will do: nobody presents a token here.
KEY = auth_pb2.JsonWebKey(
    kty="EC",
    crv="P-256",
    kid="stand-in",
    alg="ES256",
    use="sig",
    x="MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
    y="4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
)


async def get_jwks(request: Any, context: Any) -> auth_pb2.GetJwksResponse:
    return auth_pb2.GetJwksResponse(keys=[KEY])


class Worker(jobs_pb2_grpc.WorkerServiceServicer):
    async def Work(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        async for _ in request_iterator:
            yield jobs_pb2.WorkResponse()


def until_told_to_stop() -> asyncio.Event:
    told = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
    return told


async def serve(process: str) -> None:
    told = until_told_to_stop()
    server = grpc.aio.server()
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    handler = grpc.unary_unary_rpc_method_handler(
        get_jwks,
        request_deserializer=auth_pb2.GetJwksRequest.FromString,
        response_serializer=auth_pb2.GetJwksResponse.SerializeToString,
    )
    methods = {"GetJwks": handler}
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("kimberly.auth.v1.AuthService", methods),)
    )
    jobs_pb2_grpc.add_WorkerServiceServicer_to_server(Worker(), server)
    for service in ("", *PROCESSES[process]):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    server.add_insecure_port(f"unix:{os.environ['KIMBERLY_LISTEN_SOCKET']}")
    await server.start()
    await told.wait()
    await server.stop(0.1)


SOON = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100))


async def nothing() -> AsyncIterator[jobs_pb2.WorkRequest]:
    await asyncio.Event().wait()
    yield jobs_pb2.WorkRequest()


async def work() -> None:
    told = until_told_to_stop()
    address = f"unix:{os.environ['KIMBERLY_OUTBOUND_SOCKET']}"
    while not told.is_set():
        async with grpc.aio.insecure_channel(address, options=SOON) as channel:
            call = jobs_pb2_grpc.WorkerServiceStub(channel).Work(nothing())
            stopping = asyncio.create_task(told.wait())
            ended = asyncio.create_task(call.code())
            await asyncio.wait([stopping, ended], return_when=asyncio.FIRST_COMPLETED)
            stopping.cancel()
            call.cancel()


def main(role: str) -> None:
    if role == "migrate":
        assert "KIMBERLY_OWNER_DATABASE_URL" in os.environ
    else:
        asyncio.run(work() if role == "worker" else serve(role))


if __name__ == "__main__":
    main(sys.argv[1])
