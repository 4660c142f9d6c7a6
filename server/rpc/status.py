"""Problems of the domain as google.rpc.Status."""

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Final

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from server import errors

DOMAIN = "kimberly"
STATUS_METADATA_KEY = "grpc-status-details-bin"
RETRY_METADATA_KEY = "retry-after"
"""Where a call was refused before it began to answer, to a REST client it is a header."""

_STORE_DELAY: Final = timedelta(seconds=1)

_CODES: Mapping[type[errors.Problem], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessage: grpc.StatusCode.INVALID_ARGUMENT,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.ProofInvalid: grpc.StatusCode.PERMISSION_DENIED,
    errors.RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ConsentMissing: grpc.StatusCode.FAILED_PRECONDITION,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.EtagMismatch: grpc.StatusCode.ABORTED,
    errors.StateConflict: grpc.StatusCode.FAILED_PRECONDITION,
    errors.MailsNotSent: grpc.StatusCode.FAILED_PRECONDITION,
    errors.RequestIdReused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.QuotaExceeded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.LeaseLost: grpc.StatusCode.FAILED_PRECONDITION,
    errors.UploadMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ReaderTooSlow: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ContentUnreadable: grpc.StatusCode.DATA_LOSS,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
}


class Internal(errors.Problem):
    """Something unforeseen, of which the caller learns nothing more."""

    def __init__(self) -> None:
        super().__init__("internal error")


def code_of(problem: errors.Problem) -> grpc.StatusCode:
    """Return the status code of a problem; a subclass has that of its nearest ancestor."""
    for ancestor in type(problem).__mro__:
        if ancestor in _CODES:
            return _CODES[ancestor]
    return grpc.StatusCode.INTERNAL


def to_status(problem: errors.Problem) -> status_pb2.Status:
    """Return the status of a problem with its details: reason, fields, quota, retry delay."""
    status = status_pb2.Status(code=code_of(problem).value[0], message=problem.message)
    info = error_details_pb2.ErrorInfo(reason=problem.reason, domain=DOMAIN)
    for detail in (info, *_details(problem)):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def metadata_of(problem: errors.Problem) -> tuple[tuple[str, str | bytes], ...]:
    """Return the trailing metadata of a refusal: its status, and when to retry, in seconds."""
    status = (STATUS_METADATA_KEY, to_status(problem).SerializeToString())
    delay = _retry_delay(problem)
    if delay is None:
        return (status,)
    return status, (RETRY_METADATA_KEY, str(max(1, math.ceil(delay.total_seconds()))))


def _retry_delay(problem: errors.Problem) -> timedelta | None:
    if isinstance(problem, errors.StoreUnavailable):
        return _STORE_DELAY
    return problem.retry_after if isinstance(problem, errors.RateLimited) else None


def _details(problem: errors.Problem) -> list[object]:
    if isinstance(problem, errors.InvalidArgument):
        return [
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field, description=violation.description
                    )
                    for violation in problem.violations
                ]
            )
        ]
    if isinstance(problem, errors.QuotaExceeded):
        failure = error_details_pb2.QuotaFailure.Violation(
            subject=problem.subject, description=problem.message
        )
        return [error_details_pb2.QuotaFailure(violations=[failure])]
    if (retry_delay := _retry_delay(problem)) is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(retry_delay)
        return [error_details_pb2.RetryInfo(retry_delay=delay)]
    return []
