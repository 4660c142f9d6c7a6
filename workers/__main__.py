"""`python -m workers`: one worker process, until SIGTERM."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import grpc
import structlog
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.telemetry import configure
from workers.meditation import PLAN, SHARD, Meditation
from workers.stream import Worker

log = structlog.get_logger()

PREFIX = "KIMBERLY_"
EXIT_SETTINGS = 78
"""EX_CONFIG of sysexits.h."""

_LARGEST_MESSAGE = 8 * 1024 * 1024


class Settings(BaseSettings):
    """Settings of a worker; each is the environment variable of its name, after KIMBERLY_."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True)

    outbound_socket: Path
    """Unix socket of the sidecar's outbound listener."""
    log_level: str = "info"
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many jobs are done at once."""
    drain_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long work goes on after SIGTERM before it is handed back."""


def main() -> int:
    """Run a worker and return its exit status."""
    try:
        settings = Settings()
    except ValidationError as error:
        sys.stderr.write(explain(error))
        return EXIT_SETTINGS
    configure("worker", settings.log_level)
    asyncio.run(work(settings))
    return 0


def explain(error: ValidationError) -> str:
    """Say which variables are missing or wrong, one a line."""
    problems = error.errors(include_input=False, include_url=False)
    lines = [
        f"  {PREFIX}{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in problems
    ]
    return "\n".join(["The environment is not complete:", *lines, ""])


async def work(settings: Settings) -> None:
    """Work until SIGTERM or SIGINT."""
    async with open_channel(settings.outbound_socket) as channel:
        meditation = Meditation(channel)
        worker = Worker(
            channel,
            {PLAN: meditation.plan, SHARD: meditation.score_shard},
            concurrency=settings.concurrency,
            drain_seconds=settings.drain_seconds,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.drain)
        log.info("working", concurrency=settings.concurrency)
        await worker.run()
    log.info("drained")


def open_channel(outbound_socket: Path) -> grpc.aio.Channel:
    """Return the channel to every peer: the sidecar's outbound listener routes by method."""
    return grpc.aio.insecure_channel(
        f"unix:{outbound_socket}",
        options=(
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2_000),
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
