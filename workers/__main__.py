"""`python -m workers`: one worker process, until SIGTERM."""

import asyncio
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import grpc
import structlog
import uvloop
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from server import tracing
from server.embedding_models import Embedder, ModelUnusable, load_embedders
from server.garbage import collect_rarely
from server.telemetry import configure, exposed
from workers.auditing import CHECKPOINT, Auditing
from workers.carrying import carrying_trace
from workers.embedding import EMBED, FORMER_EMBED, Embedding
from workers.erasure import ERASE, Erasing
from workers.exporting import EXPIRE, EXPORT, Exporting
from workers.housekeeping import SWEEP_ATTACHMENTS, SWEEP_MEMORIES, Housekeeping
from workers.meditation import PLAN, SHARD, Meditation
from workers.promotion import PROMOTE, Promoting
from workers.reindexing import REINDEX, Reindexing
from workers.rewrapping import REWRAP, Rewrapping
from workers.stream import Handler, Worker
from workers.summarizing import SUMMARIZE, Summarizing

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
    metrics_socket: Path | None = None
    """Unix socket to tell Prometheus on what is measured. Unset: nowhere."""
    otlp_endpoint: str = Field(default="", pattern=tracing.ENDPOINT)
    """Where a collector takes traces by OTLP over gRPC: http://host:port. Unset: no traces."""
    trace_ratio: float = Field(default=0.05, ge=0, le=1)
    """Which part of the jobs is traced that no traced call asked for."""
    log_level: str = "info"
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 4
    """How many jobs are done at once."""
    drain_seconds: Annotated[float, Field(ge=0)] = 5.0
    """How long work goes on after SIGTERM before it is handed back."""
    embedding_models_directory: Path | None = None
    """Holds a folder for each embedding model, under its name; None: this worker has none."""


def main() -> int:
    """Run a worker and return its exit status."""
    try:
        settings = Settings()
    except ValidationError as error:
        sys.stderr.write(explain(error))
        return EXIT_SETTINGS
    configure("worker", settings.log_level)
    if settings.otlp_endpoint:
        tracing.begin("worker", settings.otlp_endpoint, settings.trace_ratio)
    try:
        embedders = _embedders(settings.embedding_models_directory)
    except ModelUnusable as error:
        sys.stderr.write(f"{PREFIX}EMBEDDING_MODELS_DIRECTORY: {error}\n")
        return EXIT_SETTINGS
    collect_rarely()
    uvloop.run(work(settings, embedders))
    return 0


def explain(error: ValidationError) -> str:
    """Say which variables are missing or wrong, one a line."""
    problems = error.errors(include_input=False, include_url=False)
    lines = [
        f"  {PREFIX}{str(problem['loc'][0]).upper()}: {problem['msg']}" for problem in problems
    ]
    return "\n".join(["The environment is not complete:", *lines, ""])


async def work(settings: Settings, embedders: Mapping[str, Embedder]) -> None:
    """Work until SIGTERM or SIGINT."""
    with exposed(settings.metrics_socket):
        await _work(settings, embedders)
    log.info("drained")


async def _work(settings: Settings, embedders: Mapping[str, Embedder]) -> None:
    async with open_channel(settings.outbound_socket) as own:
        channel = carrying_trace(own)
        meditation = Meditation(channel)
        housekeeping = Housekeeping(channel)
        exporting = Exporting(channel)
        worker = Worker(
            own,
            {
                PLAN: meditation.plan,
                SHARD: meditation.score_shard,
                REINDEX: Reindexing(channel).reindex,
                REWRAP: Rewrapping(channel).rewrap,
                SWEEP_ATTACHMENTS: housekeeping.sweep_attachments,
                SWEEP_MEMORIES: housekeeping.sweep_memories,
                CHECKPOINT: Auditing(channel).sign_checkpoints,
                PROMOTE: Promoting(channel).promote,
                ERASE: Erasing(channel).erase,
                EXPORT: exporting.export,
                EXPIRE: exporting.expire,
                SUMMARIZE: Summarizing(channel).summarize,
                **_embedding(channel, embedders),
            },
            concurrency=settings.concurrency,
            drain_seconds=settings.drain_seconds,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.drain)
        log.info("working", concurrency=settings.concurrency, models=sorted(embedders))
        await worker.run()


def _embedders(directory: Path | None) -> Mapping[str, Embedder]:
    return load_embedders(directory) if directory else {}


def _embedding(
    channel: grpc.aio.Channel, embedders: Mapping[str, Embedder]
) -> Mapping[str, Handler]:
    """Return the handler of embedding jobs; a worker without models takes none of them."""
    return (
        dict.fromkeys((EMBED, FORMER_EMBED), Embedding(channel, embedders).embed)
        if embedders
        else {}
    )


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
