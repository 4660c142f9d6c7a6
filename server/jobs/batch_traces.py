"""Which traces the batches of a worker's stream are part of."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from server import tracing
from server.jobs.model import Held, Lease

_STREAM: Final = "kimberly.jobs.v1.WorkerService/Work"


class BatchTraces:
    """Notes a span for each batch of a stream, linked to the stream's and to those of its jobs.

    The batch is nobody's child: it serves jobs that several calls asked for, on a stream that
    outlives them all. What a worker does for a job is a child of the call that asked for it.
    """

    def __init__(self) -> None:
        """Begin with a stream that just opened."""
        self._stream = tracing.began(_STREAM, {"rpc.system": "grpc"})
        self._traced: dict[Held, str] = {}
        """Of leases that this stream brought and did not settle; it ends with the stream."""

    def leased(self, leases: Sequence[Lease], seconds: float) -> None:
        """Note that jobs were leased together, and how long that took."""
        if tracing.has_begun():
            traced = {lease.held: lease.traceparent for lease in leases if lease.traceparent}
            self._traced |= traced
            self._note("lease batch", "receive", seconds, len(leases), traced.values())

    def settled(self, leases: Collection[Held], seconds: float) -> None:
        """Note that leases were settled together, and how long that took."""
        if tracing.has_begun():
            traced = [self._traced.pop(held, "") for held in leases]
            self._note("settle batch", "settle", seconds, len(leases), traced)

    def _note(
        self, name: str, operation: str, seconds: float, jobs: int, traced: Iterable[str]
    ) -> None:
        # Named as OpenTelemetry names what is done with messages.
        attributes: tracing.Attributes = {
            "messaging.operation.type": operation,
            "messaging.batch.message_count": jobs,
        }
        tracing.batch_has_been(name, seconds, (self._stream, *traced), attributes)
