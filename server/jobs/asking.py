"""What users may ask for: kinds of job, what each may be told, and how each comes about."""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from server.caller import Caller
from server.database import Connection
from server.errors import InvalidArgument, StateConflict

Payload = Mapping[str, Any]
Ask = Callable[[Connection, Caller, Payload], Awaitable[UUID | None]]
"""Enqueues a job in the caller's transaction and returns its id, or that of the unfinished one of
the same purpose; None if the user's settings and consents rule it out."""

_FIELD: Final = "payload_json"
_LONGEST: Final = 1000
_TYPES: Final[Mapping[type, str]] = {bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of job that users may ask for."""

    ask: Ask
    fields: Mapping[str, type] = field(default_factory=dict)
    """What it may be told, by name; each may be left out."""

    def check(self, payload: Payload) -> None:
        """Refuse what it cannot be told.

        Raises:
            InvalidArgument: A field is unknown or of another type; the violation names it.
        """
        for name, value in payload.items():
            if name not in self.fields:
                known = ", ".join(self.fields) or "nothing"
                raise InvalidArgument(f"{_FIELD}.{name}", f"is unknown: it may be {known}")
            if type(value) is not self.fields[name]:
                raise InvalidArgument(f"{_FIELD}.{name}", f"must be {_TYPES[self.fields[name]]}")


class Kinds:
    """All kinds that users may ask for. What they do is other slices' to say."""

    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = dict(kinds)

    def payload(self, kind: str, payload_json: str) -> Payload:
        """Return what a job of a kind is told.

        Args:
            kind: As the caller named it.
            payload_json: A JSON object; empty for one without fields.

        Raises:
            InvalidArgument: It is no kind that users may ask for, or cannot be told that.
        """
        if kind not in self._kinds:
            raise InvalidArgument("kind", f"must be one of {', '.join(sorted(self._kinds))}")
        payload = _object(payload_json)
        self._kinds[kind].check(payload)
        return payload

    async def ask(
        self, connection: Connection, caller: Caller, kind: str, payload: Payload
    ) -> UUID:
        """Enqueue a job in the caller's transaction.

        Args:
            connection: The transaction.
            caller: Whose job it is.
            kind: A kind that `payload` let pass, perhaps that of another release.
            payload: What `payload` returned.

        Returns:
            Id of the job, or of the unfinished one of the same purpose.

        Raises:
            StateConflict: The user's settings and consents rule it out, or it is not known here.
            Problem: Whatever else the kind refuses for.
        """
        if kind not in self._kinds:
            raise StateConflict(f"{kind} is nothing that this release does")
        job_id = await self._kinds[kind].ask(connection, caller, payload)
        if job_id is None:
            raise StateConflict(f"settings and consents rule {kind} out")
        return job_id


def _object(text: str) -> Payload:
    if len(text) > _LONGEST:
        raise InvalidArgument(_FIELD, f"must have at most {_LONGEST} characters")
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(_FIELD, "must be JSON") from error
    if not isinstance(value, dict):
        raise InvalidArgument(_FIELD, "must be a JSON object")
    return value
