"""Signed checkpoints of the audit log: what a chain was, beyond the reach of the database.

Who owns the tables can rewrite events, links and recorded heads so that all of them agree, and no
look at PostgreSQL alone can tell. A checkpoint can: it is an object in S3 that says which hash a
tenant's chain had at one place, signed with a key that the database holds only wrapped by the KMS.
The owner of the tables can neither sign another nor remove one. A rewritten log gets no further
checkpoints either: before a head is signed, the chain must lead through the checkpoint before it.

What this cannot tell: changes behind the newest checkpoint, until the next one is signed; and the
doings of somebody who also removes objects from S3, or signs with the rights of the auth process.
Against those, a client remembers what it has seen, as `kimberly audit verify` does.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from server import ids
from server.tokens import ALGORITHM
from server.users.chain import Break, Head

TYP: Final = "kimberly-audit-checkpoint"
"""In the signed header: nothing else that the key may ever sign passes for a checkpoint."""
LONGEST_BYTES: Final = 4096
"""More than any checkpoint has."""

_OBJECT: Final = re.compile(r"audit/[0-9a-f]{32}/([0-9]{20})\.jws")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A tenant's chain had this hash at this place."""

    tenant_id: UUID
    position: int
    hash: bytes
    signed_at: datetime
    key_id: str
    token: str
    """The signed form: a JWS in compact serialization (RFC 7515)."""


@dataclass(frozen=True, slots=True)
class Witness:
    """An object that must be a checkpoint, and whether it is one."""

    position: int
    checkpoint: Checkpoint | None
    problem: str = ""
    """Why it is none."""


class CheckpointForged(Exception):
    """It is not signed by a key of this mesh, or it does not say what it was stored as."""


def sign(tenant_id: UUID, head: Head, now: datetime, key: ECKey) -> Checkpoint:
    """Return the checkpoint of a head, signed with a private key."""
    claims = {
        "tenant": ids.show(ids.TENANT, tenant_id),
        "position": head.position,
        "hash": head.hash.hex(),
        "time": now.isoformat(),
    }
    header = {"alg": ALGORITHM, "kid": key.thumbprint(), "typ": TYP}
    token = jws.serialize_compact(header, json.dumps(claims), key, algorithms=[ALGORITHM])
    return Checkpoint(tenant_id, head.position, head.hash, now, key.thumbprint(), token)


def read(token: str, keys: Mapping[str, ECKey]) -> Checkpoint:
    """Return what a checkpoint says.

    Args:
        token: Its signed form.
        keys: The keys of this mesh, by key id.

    Raises:
        CheckpointForged: None of them signed it, or it was not meant to be a checkpoint.
    """
    try:
        header = jws.extract_compact(token.encode()).headers()
        key = keys[header["kid"]]
        claims = json.loads(jws.deserialize_compact(token, key, algorithms=[ALGORITHM]).payload)
        if header["typ"] != TYP:
            raise CheckpointForged
        return Checkpoint(
            tenant_id=ids.parse(ids.TENANT, claims["tenant"], "tenant"),
            position=int(claims["position"]),
            hash=bytes.fromhex(claims["hash"]),
            signed_at=datetime.fromisoformat(claims["time"]),
            key_id=header["kid"],
            token=token,
        )
    except (JoseError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointForged from error


def directory(tenant_id: UUID) -> str:
    """Return what the keys of a tenant's objects begin with."""
    return f"audit/{tenant_id.hex}/"


def object_key(tenant_id: UUID, position: int) -> str:
    """Return where in S3 the checkpoint of a place is. In order of the keys, places ascend."""
    return f"{directory(tenant_id)}{position:020}.jws"


def position_of(key: str) -> int | None:
    """Return the place that an object's key names; None for what is not ours."""
    found = _OBJECT.fullmatch(key)
    return int(found[1]) if found else None


def spread(positions: Sequence[int]) -> Sequence[int]:
    """Choose which checkpoints to read of many: the first, and ever denser towards the last.

    The last one vouches for all before it, as long as its signature can be trusted; a few older
    ones say so even if somebody got to sign once.
    """
    if not positions:
        return ()
    steps = (2**exponent for exponent in range(len(positions).bit_length()))
    return sorted({positions[0], *(positions[-step] for step in steps)})


def compare(witnesses: Sequence[Witness], hashes: Mapping[int, bytes], end: int) -> Break | None:
    """Compare a chain with its checkpoints.

    Args:
        witnesses: The checkpoints in order of their places.
        hashes: The hashes that the chain has at those places now.
        end: The last place of the chain.

    Returns:
        The first place that no checkpoint vouches for, if one of them contradicts the chain.
    """
    vouched = 0
    for witness in witnesses:
        if witness.checkpoint is None:
            return Break(vouched + 1, witness.problem)
        if witness.position > end:
            return Break(vouched + 1, is_cut(witness.position))
        if hashes.get(witness.position) != witness.checkpoint.hash:
            return Break(vouched + 1, is_rewritten(witness.position))
        vouched = witness.position
    return None


def is_missing(position: int) -> str:
    """Return the problem of a checkpoint that was stored and is gone."""
    return f"the signed checkpoint of position {position} is missing"


def is_forged(position: int) -> str:
    """Return the problem of an object in place of a checkpoint."""
    return f"the checkpoint of position {position} is not what a key of this mesh signed"


def is_cut(position: int) -> str:
    """Return the problem of a log that ends before a checkpoint."""
    return f"the log was cut short: it once had position {position}, which was signed"


def is_rewritten(position: int) -> str:
    """Return the problem of a log that leads elsewhere than a checkpoint says."""
    return f"the log was rewritten: it had another hash when position {position} was signed"
