"""What was asked of the mesh, and what it answered: the one source that all runs are judged by."""

import enum
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc


class Outcome(enum.Enum):
    """What is known of an operation after its call has ended."""

    OK = "ok"
    FAIL = "fail"
    """It has certainly no effect."""
    INFO = "info"
    """It may have happened or not; the same request id will tell."""


PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
"""What a caller may be told while something is away."""


@dataclass(frozen=True, slots=True)
class Op:
    """One call."""

    op: str
    user: str
    key: str
    """The request id of a create; every try of an import has the same key."""
    values: Sequence[str]
    """Contents that are to be stored, or the one that was asked for."""
    start: float
    end: float
    deadline_seconds: float
    outcome: Outcome
    code: str
    answer: str = ""
    """Id of the memory, where the call answered with one."""

    @property
    def writes(self) -> bool:
        """Whether it is meant to change something."""
        return self.op in {"create", "import"}


@dataclass(slots=True)
class History:
    """Every call of a run, in the order of their ends."""

    ops: list[Op] = field(default_factory=list)
    unforeseen: list[str] = field(default_factory=list)
    """Answers that no fault explains."""

    def writes(self) -> Iterator[Op]:
        """Yield the operations that were meant to change something."""
        return (op for op in self.ops if op.writes)

    def save(self, path: Path) -> None:
        """Write JSON Lines."""
        with path.open("w") as file:
            for op in self.ops:
                file.write(json.dumps({**asdict(op), "outcome": op.outcome.value}) + "\n")
