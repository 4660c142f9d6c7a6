"""What workers send, checked: values of the domain, or InvalidArgument."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from kimberly.jobs.v1 import jobs_pb2 as pb

from server import ids
from server.errors import InvalidArgument
from server.jobs.model import Beat, Completed, Failed, Held, Outcome, Stopped

M = TypeVar("M")
T = TypeVar("T")

MOST_JOBS: Final = 1000
"""How many jobs one worker may hold or have room for."""

_MOST_KINDS = 100
_LONGEST_NAME = 64
_LONGEST_RESULT = 64 * 1024
_LONGEST_ERROR = 2000
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")
"""An escaped NUL, which Postgres stores in no jsonb; not a backslash before "u0000"."""


def hello_from(request: pb.WorkRequest) -> pb.Hello:
    """Return the first message of a stream.

    Raises:
        InvalidArgument: It is another message, or names no worker or no kinds.
    """
    if request.WhichOneof("message") != "hello":
        raise InvalidArgument("message", "must be hello at first")
    hello = request.hello
    if not 16 <= len(hello.worker_id) <= _LONGEST_NAME:
        raise InvalidArgument("hello.worker_id", f"must have 16 to {_LONGEST_NAME} characters")
    if not 1 <= len(hello.kinds) <= _MOST_KINDS:
        raise InvalidArgument("hello.kinds", f"must be 1 to {_MOST_KINDS}")
    if "\0" in hello.worker_id or any("\0" in kind for kind in hello.kinds):
        raise InvalidArgument("hello", "must hold no NUL")
    return hello


def credit_from(credit: pb.Credit) -> int:
    """Return for how many more jobs there is room.

    Raises:
        InvalidArgument: It is not 1 to 1000.
    """
    if not 1 <= credit.jobs <= MOST_JOBS:
        raise InvalidArgument("credit.jobs", f"must be 1 to {MOST_JOBS}")
    return credit.jobs


def beats_from(heartbeat: pb.Heartbeat) -> list[Beat]:
    """Return the leases that a worker still holds.

    Raises:
        InvalidArgument: An id is malformed, a progress is not 0 to 1, or there are too many.
    """
    if len(heartbeat.leases) > MOST_JOBS:
        raise InvalidArgument("heartbeat.leases", f"must be at most {MOST_JOBS}")
    return _each(heartbeat.leases, "heartbeat.leases", _beat)


def outcomes_from(settle: pb.Settle) -> list[Outcome]:
    """Return how leases ended.

    Raises:
        InvalidArgument: An id is malformed, an outcome is missing, a result is no JSON object
            of at most 64 KiB, columns differ in length, or there are too many.
    """
    if len(settle.outcomes) + len(settle.done.lease_tokens) > MOST_JOBS:
        raise InvalidArgument("settle.outcomes", f"must be at most {MOST_JOBS}")
    done = [Completed(held, None) for held in _held_in(settle.done, "settle.done")]
    return [*_each(settle.outcomes, "settle.outcomes", _outcome), *done]


def _held_in(columns: pb.LeaseColumns, path: str) -> list[Held]:
    if len(columns.job_ids) != ids.BYTES * len(columns.lease_tokens):
        raise InvalidArgument(f"{path}.job_ids", f"must be {ids.BYTES} bytes for each lease token")
    return list(map(Held, ids.unpacked(columns.job_ids), columns.lease_tokens))


def _each(messages: Iterable[M], path: str, read: Callable[[M], T]) -> list[T]:
    """Read messages; a refusal names the field of the one that is at fault."""
    values: list[T] = []
    for message in messages:
        try:
            values.append(read(message))
        except InvalidArgument as error:
            (violation,) = error.violations
            field = f"{path}[{len(values)}].{violation.field}"
            raise InvalidArgument(field, violation.description) from error
    return values


def _beat(lease: pb.LeaseProgress) -> Beat:
    if not 0 <= lease.progress <= 1:
        raise InvalidArgument("progress", "must be 0 to 1")
    return Beat(_held(lease), lease.progress)


def _outcome(outcome: pb.Outcome) -> Outcome:
    held = _held(outcome)
    match outcome.WhichOneof("result"):
        case "completed":
            return Completed(held, _result(outcome.completed.result_json))
        case "failed":
            # Postgres stores no NUL.
            return Failed(held, outcome.failed.error.replace("\0", "")[:_LONGEST_ERROR])
        case "stopped":
            return Stopped(held)
        case _:
            raise InvalidArgument("result", "must be completed, failed or stopped")


def _held(message: pb.Outcome | pb.LeaseProgress) -> Held:
    return Held(ids.parse(ids.JOB, message.job_id, "job_id"), message.lease_token)


def _result(text: str) -> str | None:
    if not text or text == "{}":
        return text or None
    field = "completed.result_json"
    if len(text) > _LONGEST_RESULT:
        raise InvalidArgument(field, f"must have at most {_LONGEST_RESULT} characters")
    try:
        value = _DECODER.decode(text)
        # A number like 1e999 has become an infinite one, which is none in JSON.
        canonical = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(field, "must be JSON") from error
    if not isinstance(value, dict):
        raise InvalidArgument(field, "must be a JSON object")
    try:
        canonical.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(field, "must hold whole characters") from error
    if _NUL.search(canonical):
        raise InvalidArgument(field, "must hold no NUL")
    return canonical


def _no_json(constant: str) -> None:
    raise ValueError(constant)


# Made once: `json.loads` would make one for every result.
_DECODER: Final = json.JSONDecoder(parse_constant=_no_json)
