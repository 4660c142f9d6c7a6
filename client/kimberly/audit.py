"""Verifies an audit log without taking the server's word for it.

The chain is computed here from the events as the server sends them, by the formula of `AuditLink`
in the contract and by other code than the server's. Then it is held against the signed
checkpoints, and against what was seen of the log the last time.

What this cannot tell: whether events of other users of the tenant, which are withheld, are what
they were; and whether a server that also holds the signing keys rewrote what was never seen
before. From the first look on, nothing that was seen can change unnoticed.
"""

import hashlib
import json
import struct
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from google.protobuf.timestamp_pb2 import Timestamp
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from kimberly.users.v1 import users_pb2 as pb
from kimberly.users.v1 import users_pb2_grpc

Users: TypeAlias = "users_pb2_grpc.UserServiceAsyncStub"

_SEED: Final = b"kimberly audit chain 1\0"
_ALGORITHM: Final = "ES256"
_TYP: Final = "kimberly-audit-checkpoint"
_PAGE: Final = 1000
_NOT_SIGNED: Final = "the checkpoint of this place is not signed by a key that counts"


class LogBroken(Exception):
    """An audit log is not what it was."""

    def __init__(self, position: int, problem: str) -> None:
        super().__init__(f"position {position}: {problem}")
        self.position = position
        """The first place that nothing vouches for."""
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Signed:
    """What a checkpoint says, once its signature was verified."""

    position: int
    hash: str
    time: str
    """When it was signed (RFC 3339)."""
    key_id: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was seen of a log, to be held against it later."""

    tenant_id: str
    position: int
    hash: str
    key_ids: tuple[str, ...]
    """The keys that signed its checkpoints."""


@dataclass(frozen=True, slots=True)
class Report:
    """What there is to say of a log."""

    receipt: Receipt
    """The log as it was seen now, up to where it holds."""
    withheld: int
    """How many events are other users' and were taken as given."""
    is_comparable: bool
    """False: there may be checkpoints, and the server could not read them."""
    checkpoint: Signed | None
    """The newest checkpoint that the log agrees with."""
    new_key_ids: tuple[str, ...]
    """Keys that had signed nothing the last time."""
    broken: LogBroken | None
    """The first broken place; None if everything that could be verified holds."""


@dataclass(frozen=True, slots=True)
class _Mark:
    """Somebody says that the chain has this hash at this place."""

    position: int
    hash: str
    source: str


class Chain:
    """A tenant's chain, computed link by link."""

    def __init__(self, tenant_id: str) -> None:
        self.tenant_id = tenant_id
        self._tenant = _bytes_of(tenant_id)
        self.position = 0
        """Place of the last link."""
        self.hash = hashlib.sha256(_SEED + self._tenant).hexdigest()
        self.withheld = 0
        """How many links could not be computed, because their events are withheld."""

    def add(self, link: pb.AuditLink) -> None:
        """Go on by one link.

        Raises:
            LogBroken: It does not follow from the link before and its event.
        """
        place = self.position + 1
        if link.position != place:
            raise LogBroken(place, "the link of this place is missing")
        if link.withheld:
            self.withheld += 1
        elif not link.HasField("event"):
            raise LogBroken(place, "the event of this place was deleted")
        elif self._next_hash(link) != link.hash:
            raise LogBroken(place, "the event of this place, or its link, was changed")
        self.position, self.hash = place, link.hash

    def _next_hash(self, link: pb.AuditLink) -> str:
        event = link.event
        try:
            ids = _bytes_of(event.id) + self._tenant + _bytes_of(link.user_id)
            numbers = struct.pack(">qQ", _microseconds(event.event_time), link.transaction)
        except (ValueError, struct.error):
            return ""
        texts = [text.encode() for text in (event.actor, event.action, event.resource)]
        counted = b"".join(struct.pack(">I", len(text)) + text for text in texts)
        return hashlib.sha256(bytes.fromhex(self.hash) + ids + numbers + counted).hexdigest()


async def verify(
    users: Users, *, last: Receipt | None = None, trusted: Collection[str] = ()
) -> Report:
    """Verify the audit log of the tenant that the caller belongs to.

    Args:
        users: A stub that calls as the user.
        last: What was seen of this log before.
        trusted: Ids of keys; a checkpoint that another key signed counts as forged. Empty: the
            keys that the server names are taken for its own.
    """
    tenant_id = (await users.GetUser(pb.GetUserRequest())).user.tenant_id
    answer = await users.VerifyAuditLog(pb.VerifyAuditLogRequest())
    chain = Chain(tenant_id)
    signed: Sequence[Signed] = ()
    broken = _claim(answer)
    try:
        _expect_checkpoints(answer, last)
        signed = [
            read_checkpoint(checkpoint, answer.keys, tenant_id, trusted)
            for checkpoint in answer.checkpoints
        ]
        await _walk(chain, _links(users), _marks(answer, signed, last))
    except LogBroken as found:
        broken = min(broken or found, found, key=lambda each: each.position)
    holding = [each for each in signed if not broken or each.position < broken.position]
    signers = tuple(sorted({each.key_id for each in signed}))
    return Report(
        receipt=Receipt(tenant_id, chain.position, chain.hash, signers),
        withheld=chain.withheld,
        is_comparable=answer.checkpoint_comparison != pb.CHECKPOINT_COMPARISON_UNREACHABLE,
        checkpoint=holding[-1] if holding else None,
        new_key_ids=tuple(key for key in signers if last and key not in last.key_ids),
        broken=broken,
    )


def read_checkpoint(
    checkpoint: pb.AuditCheckpoint,
    keys: Sequence[pb.AuditKey],
    tenant_id: str,
    trusted: Collection[str] = (),
) -> Signed:
    """Verify a checkpoint's signature and return what was signed.

    Raises:
        LogBroken: None of the keys signed it, none that is trusted, or it is another tenant's.
    """
    try:
        header = jws.extract_compact(checkpoint.signed.encode()).headers()
        key = _public_keys(keys)[header["kid"]]
        claims = json.loads(
            jws.deserialize_compact(checkpoint.signed, key, algorithms=[_ALGORITHM]).payload
        )
        signed = Signed(claims["position"], claims["hash"], claims["time"], key.thumbprint())
        is_ours = (header["typ"], claims["tenant"]) == (_TYP, tenant_id)
    except (JoseError, LookupError, TypeError, ValueError) as error:
        raise LogBroken(checkpoint.position, _NOT_SIGNED) from error
    if not is_ours or (trusted and signed.key_id not in trusted):
        raise LogBroken(checkpoint.position, _NOT_SIGNED)
    return signed


def _expect_checkpoints(answer: pb.VerifyAuditLogResponse, last: Receipt | None) -> None:
    is_without = answer.checkpoint_comparison == pb.CHECKPOINT_COMPARISON_NONE
    if is_without and last and last.key_ids:
        raise LogBroken(1, "there were signed checkpoints the last time, and now there are none")


async def _walk(
    chain: Chain, links: AsyncIterator[pb.AuditLink], marks: Mapping[int, Sequence[_Mark]]
) -> None:
    """Compute the chain to its end, and hold it against all marks on the way."""
    vouched = 0
    async for link in links:
        chain.add(link)
        for mark in marks.get(link.position, ()):
            _hold_against(mark, chain.hash, vouched)
            vouched = mark.position
    _reach(marks, chain.position)


async def _links(users: Users) -> AsyncIterator[pb.AuditLink]:
    request = pb.ListAuditLinksRequest(page_size=_PAGE)
    while True:
        page = await users.ListAuditLinks(request)
        for link in page.links:
            yield link
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token


def _claim(answer: pb.VerifyAuditLogResponse) -> LogBroken | None:
    """Return what the server itself found."""
    if answer.intact:
        return None
    return LogBroken(answer.first_broken_position, answer.problem)


def _marks(
    answer: pb.VerifyAuditLogResponse, signed: Sequence[Signed], last: Receipt | None
) -> Mapping[int, Sequence[_Mark]]:
    """Return what the chain must lead through, by place."""
    marks = [_Mark(each.position, each.hash, "a signed checkpoint") for each in signed]
    if last and last.position:
        marks.append(_Mark(last.position, last.hash, "what was seen the last time"))
    if answer.intact and answer.verified_events:
        marks.append(_Mark(answer.verified_events, answer.head_hash, "the server's own answer"))
    by_place: dict[int, list[_Mark]] = {}
    for mark in marks:
        by_place.setdefault(mark.position, []).append(mark)
    return by_place


def _hold_against(mark: _Mark, found: str, vouched: int) -> None:
    if mark.hash != found:
        raise LogBroken(
            vouched + 1,
            f"the log was rewritten: at position {mark.position} it contradicts {mark.source}",
        )


def _reach(marks: Mapping[int, Sequence[_Mark]], end: int) -> None:
    beyond = [position for position in marks if position > end]
    if beyond:
        mark = marks[min(beyond)][0]
        raise LogBroken(
            max((position for position in marks if position <= end), default=0) + 1,
            f"the log was cut short: {mark.source} is of position {mark.position}",
        )


def _public_keys(keys: Sequence[pb.AuditKey]) -> Mapping[str, ECKey]:
    """Return the keys by their thumbprints, whatever the server calls them."""
    read = [ECKey.import_key(json.loads(key.public_jwk)) for key in keys]
    return {key.thumbprint(): key for key in read}


def _bytes_of(resource_id: str) -> bytes:
    return bytes.fromhex(resource_id.partition("_")[2])


def _microseconds(instant: Timestamp) -> int:
    return instant.seconds * 1_000_000 + instant.nanos // 1000
