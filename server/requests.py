"""Idempotency: a request id makes one resource, however often the request is sent."""

import hashlib
import os
from collections.abc import Sequence
from uuid import UUID

from server.caller import Caller
from server.database import Connection
from server.errors import InvalidArgument, RequestIdReused

_LONGEST = 64


def check_request_id(request_id: str) -> None:
    """Refuse a request id that cannot be kept.

    Raises:
        InvalidArgument: It has more than 64 characters, or holds a NUL.
    """
    if len(request_id) > _LONGEST:
        raise InvalidArgument("request_id", f"must have at most {_LONGEST} characters")
    if "\0" in request_id:
        raise InvalidArgument("request_id", "must not hold the character NUL")


def fingerprint_of(contents: bytes) -> bytes:
    """Return what a request is recognised by."""
    return hashlib.sha256(contents).digest()


async def claim(
    connection: Connection,
    caller: Caller,
    method: str,
    request_id: str,
    contents: bytes,
    resource_id: UUID,
) -> UUID:
    """Claim a request id for a resource that this transaction is about to make.

    Two transactions that claim one id at the same time are served one after the other.

    Args:
        connection: The transaction that makes the resource.
        caller: Whose request it is.
        method: Name of the method; each has request ids of its own.
        request_id: Chosen by the client.
        contents: The request, to recognise a retry by.
        resource_id: Id of the resource that will be made.

    Returns:
        `resource_id`, or the id of the resource that an earlier request made: the caller of
        this function then makes nothing and answers with that one.

    Raises:
        RequestIdReused: The earlier request had other contents.
    """
    fingerprint = fingerprint_of(contents)
    claimed = await connection.fetchval(
        """
        INSERT INTO requests (tenant_id, user_id, method, request_id, fingerprint, resource_id)
        VALUES ($1, $2, $3, $4, $5, $6)
        ON CONFLICT DO NOTHING
        RETURNING resource_id
        """,
        caller.tenant_id,
        caller.user_id,
        method,
        request_id,
        fingerprint,
        resource_id,
    )
    if claimed is not None:
        return resource_id
    earlier = await connection.fetchrow(
        """
        SELECT fingerprint, resource_id
          FROM requests
         WHERE tenant_id = $1 AND user_id = $2 AND method = $3 AND request_id = $4
        """,
        caller.tenant_id,
        caller.user_id,
        method,
        request_id,
    )
    if earlier["fingerprint"] != fingerprint:
        raise RequestIdReused
    return UUID(int=earlier["resource_id"].int)


async def made(connection: Connection, caller: Caller, method: str, request_id: str) -> UUID | None:
    """Return what an earlier request made, whatever its contents; None if there was none."""
    found = await connection.fetchval(
        """
        SELECT resource_id
          FROM requests
         WHERE tenant_id = $1 AND user_id = $2 AND method = $3 AND request_id = $4
        """,
        caller.tenant_id,
        caller.user_id,
        method,
        request_id,
    )
    return None if found is None else UUID(int=found.int)


async def redirect(
    connection: Connection, caller: Caller, method: str, request_id: str, resource_id: UUID
) -> None:
    """Let a request id that this transaction claimed stand for an earlier resource."""
    await connection.execute(
        """
        UPDATE requests
           SET resource_id = $5
         WHERE tenant_id = $1 AND user_id = $2 AND method = $3 AND request_id = $4
        """,
        caller.tenant_id,
        caller.user_id,
        method,
        request_id,
        resource_id,
    )


async def claim_parts(
    connection: Connection,
    caller: Caller,
    method: str,
    request_id: str,
    resource_ids: Sequence[UUID],
) -> None:
    """Note what a request that this transaction claimed has made when it is more than one thing."""
    await connection.execute(
        """
        INSERT INTO requests (tenant_id, user_id, method, request_id, fingerprint, resource_id)
        SELECT $1, $2, $3 || '/' || lpad(place::text, 4, '0'), $4, ''::bytea, id
          FROM unnest($5::uuid[]) WITH ORDINALITY AS part (id, place)
        """,
        caller.tenant_id,
        caller.user_id,
        method,
        request_id,
        list(resource_ids),
    )


async def parts(connection: Connection, caller: Caller, method: str, request_id: str) -> list[UUID]:
    """Return, in order, the things that an earlier request made."""
    rows = await connection.fetch(
        """
        SELECT resource_id
          FROM requests
         WHERE tenant_id = $1 AND user_id = $2 AND request_id = $3
           AND method BETWEEN $4 || '/' AND $4 || '/9999'
         ORDER BY method
        """,
        caller.tenant_id,
        caller.user_id,
        request_id,
        method,
    )
    return [UUID(int=row["resource_id"].int) for row in rows]


async def forget(connection: Connection, caller: Caller, resource_ids: Sequence[UUID]) -> None:
    """Put chance in the place of the fingerprints of the requests that made some things.

    What they said cannot be guessed from these any more. A retry of one of them is refused from
    now on: nothing tells that it is one.
    """
    await connection.execute(
        """
        UPDATE requests AS claimed
           SET fingerprint = $4
          FROM requests AS made
         WHERE made.tenant_id = $1 AND made.user_id = $2 AND made.resource_id = ANY ($3)
           AND claimed.tenant_id = $1 AND claimed.user_id = $2
           AND claimed.method = split_part(made.method, '/', 1)
           AND claimed.request_id = made.request_id
        """,
        caller.tenant_id,
        caller.user_id,
        list(resource_ids),
        os.urandom(32),
    )
