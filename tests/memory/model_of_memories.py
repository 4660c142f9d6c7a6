"""What users keep, in a few dictionaries: what the memory service must not differ from.

A person answers the requests of the contract one by one, as the service does, and can be asked
whether some order of calls that were made at once explains what was answered.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from google.protobuf import text_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller

NAMES: dict[int, str] = {pb.TIER_LONG_TERM: "long_term", pb.TIER_PERMANENT: "permanent"}
FREE: dict[int, int] = {
    pb.TIER_SHORT_TERM: 2**19,
    pb.TIER_LONG_TERM: 2**21,
    pb.TIER_PERMANENT: 10 * 2**20,
}
"""What the free plan has room for, in bytes."""

Answer: TypeAlias = Message | str
"""What a call comes back with: a response, or the reason that it was refused for."""
Told: TypeAlias = tuple[Message, Answer]
"""A request and what came back."""


@dataclass(frozen=True)
class Seen:
    """What can be seen of a person's memories after a call."""

    events: Counter[tuple[str, str, str]]
    """How often the audit log has each actor, action and resource."""
    usage: Answer
    memories: dict[str, Answer]
    """What GetMemory answers for some ids."""


class Refused(Exception):
    """A call is refused; the text is the reason, as kimberly.errors.v1 has it."""


def method_of(request: Message) -> str:
    """Return the method that takes a request."""
    return type(request).__name__.removesuffix("Request")


@dataclass
class Person:
    """All that the mesh knows about a user."""

    caller: Caller
    consent_version: int = 1
    is_consenting: bool = True
    limits: dict[int, int] = field(default_factory=lambda: dict(FREE))
    unseen_days: int | None = None
    """Unseen for so long, long-term memories are archived."""
    grace_days: int = 30
    memories: dict[str, pb.Memory] = field(default_factory=dict)
    past: dict[str, list[pb.Memory]] = field(default_factory=dict)
    """What they were before, newest first."""
    ever: list[str] = field(default_factory=list)
    """Ids of all memories that there ever were."""
    restored: set[str] = field(default_factory=set)
    """What the machine does not archive any more."""
    helped: Counter[str] = field(default_factory=Counter)
    requests: dict[tuple[str, str], tuple[list[pb.Memory], list[str]]] = field(default_factory=dict)
    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    """How often the audit log has each actor, action and resource."""
    _now: datetime = datetime(1970, 1, 1, tzinfo=UTC)
    _new_ids: Iterator[str] = field(default_factory=lambda: iter(()))

    def after(self, told: Told, now: datetime) -> tuple[Person, Answer]:
        """Return what the person has after a call, and what should come back.

        What really came back tells the ids of what is new, and nothing else.
        """
        request, answer = told
        then = copy.deepcopy(self)
        then._now, then._new_ids = now, iter(_ids_of_created(answer))
        try:
            response = copy.deepcopy(getattr(then, method_of(request))(request))
            for tier in NAMES:
                then._check_room(tier, grown_by=then.used(tier)[0] - self.used(tier)[0])
        except Refused as refusal:
            return self, str(refusal)
        return then, response

    def pass_time(self, now: datetime) -> None:
        """Do what the mesh does of its own accord when time has passed."""
        self._now = now
        if self.unseen_days is not None:
            unseen_since = now - timedelta(days=self.unseen_days)
            for memory in self.active(pb.TIER_LONG_TERM):
                is_held = memory.protected or memory.id in self.restored
                if not is_held and instant(memory.last_seen_time) < unseen_since:
                    self._archive(memory.id, timedelta(days=self.grace_days))
                    self._note("memory.archive", memory.id, "system")
        for memory in self.archived():
            if instant(memory.delete_time) <= now:
                self._forget(memory.id)
                self._note("memory.delete", memory.id, "system")

    # --- what there is

    def active(self, *tiers: int) -> list[pb.Memory]:
        """Return memories in use, newest first."""
        return self._in_state(pb.MEMORY_STATE_ACTIVE, tiers or tuple(NAMES))

    def archived(self) -> list[pb.Memory]:
        """Return memories that were put away, newest first."""
        return self._in_state(pb.MEMORY_STATE_ARCHIVED, tuple(NAMES))

    def shown(self) -> list[pb.Memory]:
        """Return memories as others of the tenant see them, newest first."""
        mine = [m for m in self.active() if m.scope != pb.SCOPE_PRIVATE and self.is_consenting]
        return [self._as_shown(memory) for memory in mine]

    def looks(self, memory_ids: Iterable[str]) -> Seen:
        """Return what should be seen, of memories only some."""
        memories = {memory_id: self.read(memory_id) for memory_id in memory_ids}
        return Seen(self.events, self.usage(), memories)

    def read(self, memory_id: str) -> Answer:
        """Return what GetMemory should answer to the person."""
        if memory_id not in self.memories:
            return "RESOURCE_NOT_FOUND"
        return pb.GetMemoryResponse(memory=self.memories[memory_id])

    def history(self, memory_id: str) -> list[pb.Memory]:
        """Return a memory as it is and as it was, newest first."""
        return [self.memories[memory_id], *(self._as_told(was) for was in self.past[memory_id])]

    def used(self, tier: int) -> tuple[int, int]:
        """Return how many bytes a tier holds, and how many memories."""
        return _size(self.active(tier))

    def usage(self) -> pb.GetUsageResponse:
        """Return what GetUsage should say."""
        archived_bytes, archived_count = _size(self.archived())
        return pb.GetUsageResponse(
            plan="free",
            tiers=[
                pb.TierUsage(
                    tier=pb.Tier.ValueType(tier),
                    used_bytes=self.used(tier)[0],
                    limit_bytes=limit,
                    count=self.used(tier)[1],
                )
                for tier, limit in self.limits.items()
            ],
            archived_bytes=archived_bytes,
            archived_count=archived_count,
        )

    # --- the methods of the service

    def CreateMemory(self, request: pb.CreateMemoryRequest) -> pb.CreateMemoryResponse:
        return self._create("CreateMemory", [request.memory], request.request_id)[0]

    def BatchCreateMemories(
        self, request: pb.BatchCreateMemoriesRequest
    ) -> pb.BatchCreateMemoriesResponse:
        results = self._create("BatchCreateMemories", request.memories, request.request_id)
        return pb.BatchCreateMemoriesResponse(results=results)

    def UpdateMemory(self, request: pb.UpdateMemoryRequest) -> pb.UpdateMemoryResponse:
        self._needs_consent()
        memory = self._find(request.memory.id, request.memory.etag)
        if memory.state == pb.MEMORY_STATE_ARCHIVED:
            raise Refused("STATE_CONFLICT")
        self._begin_version(memory)
        request.update_mask.MergeMessage(
            request.memory, memory, replace_message_field=True, replace_repeated_field=True
        )
        memory.CopyFrom(_draft(memory))
        memory.consent_version = self.consent_version
        self._is_the_only_one(memory)
        self._note("memory.update", memory.id)
        return pb.UpdateMemoryResponse(memory=memory)

    def ArchiveMemory(self, request: pb.ArchiveMemoryRequest) -> pb.ArchiveMemoryResponse:
        memory = self._find(request.id, request.etag)
        if memory.state == pb.MEMORY_STATE_ACTIVE:
            self._archive(request.id, timedelta(days=self.grace_days))
            self._note("memory.archive", request.id)
        return pb.ArchiveMemoryResponse(memory=memory)

    def DeleteMemory(self, request: pb.DeleteMemoryRequest) -> pb.DeleteMemoryResponse:
        memory = self._find(request.id)
        if request.HasField("grace"):
            self._archive(request.id, request.grace.ToTimedelta())
            self._note("memory.delete_later", request.id)
            return pb.DeleteMemoryResponse(memory=memory)
        self._forget(request.id)
        self._note("memory.delete", request.id)
        return pb.DeleteMemoryResponse()

    def RestoreMemory(self, request: pb.RestoreMemoryRequest) -> pb.RestoreMemoryResponse:
        self._needs_consent()
        memory = self._find(request.id, request.etag)
        if memory.state == pb.MEMORY_STATE_ARCHIVED:
            self._begin_version(memory)
            memory.state = pb.MEMORY_STATE_ACTIVE
            memory.ClearField("archive_time")
            memory.ClearField("delete_time")
            self._is_the_only_one(memory)
            self.restored.add(memory.id)
            self._note("memory.restore", memory.id)
        return pb.RestoreMemoryResponse(memory=memory)

    def ProtectMemory(self, request: pb.ProtectMemoryRequest) -> pb.ProtectMemoryResponse:
        self._needs_consent()
        memory = self._find(request.id, request.etag)
        if memory.protected != request.protected:
            self._begin_version(memory)
            memory.protected = request.protected
            self._note("memory.protect" if request.protected else "memory.unprotect", memory.id)
        return pb.ProtectMemoryResponse(memory=memory)

    def GiveFeedback(self, request: pb.GiveFeedbackRequest) -> pb.GiveFeedbackResponse:
        self._needs_consent()
        memory = self._find(request.id)
        said = request.WhichOneof("opinion")
        if said:
            worth = {"thumbs_up": 0.8, "thumbs_down": 0.2, "rating": request.rating / 5}
            memory.feedback = worth[said]
        if request.useful:
            self.helped[memory.id] += 1
        memory.last_seen_time.CopyFrom(_timestamp(self._now))
        self._note("memory.feedback", memory.id)
        return pb.GiveFeedbackResponse(memory=memory)

    # --- what they are made of

    def _create(
        self, method: str, memories: Sequence[pb.Memory], request_id: str
    ) -> list[pb.CreateMemoryResponse]:
        self._needs_consent()
        drafts = [_draft(memory) for memory in memories]
        said, kept = self.requests.get((method, request_id), (drafts, []))
        if said != drafts:
            raise Refused("REQUEST_ID_REUSED")
        new = [] if kept else [self._keep(draft) for draft in drafts]
        if request_id and new:
            self.requests[method, request_id] = drafts, [memory_id for memory_id, _ in new]
        return [
            pb.CreateMemoryResponse(memory=self._find(memory_id), created=is_new)
            for memory_id, is_new in new or [(memory_id, False) for memory_id in kept]
        ]

    def _keep(self, draft: pb.Memory) -> tuple[str, bool]:
        for twin in self.active():
            if _identity(twin) == _identity(draft):
                twin.use_count += 1
                twin.last_seen_time.CopyFrom(_timestamp(self._now))
                self._note("memory.see", twin.id)
                return twin.id, False
        memory = copy.deepcopy(draft)
        memory.id = next(self._new_ids, f"new {len(self.ever)}")
        memory.state, memory.author = pb.MEMORY_STATE_ACTIVE, pb.AUTHOR_USER
        memory.version, memory.etag = 1, "v1"
        memory.consent_version = self.consent_version
        for name in ("create_time", "update_time", "last_seen_time"):
            getattr(memory, name).CopyFrom(_timestamp(self._now))
        if not memory.HasField("occur_time"):
            memory.occur_time.CopyFrom(memory.create_time)
        self.memories[memory.id], self.past[memory.id] = memory, []
        self.ever.append(memory.id)
        self._note("memory.create", memory.id)
        return memory.id, True

    def _find(self, memory_id: str, etag: str = "") -> pb.Memory:
        if memory_id not in self.memories:
            raise Refused("RESOURCE_NOT_FOUND")
        memory = self.memories[memory_id]
        if etag not in ("", memory.etag):
            raise Refused("ETAG_MISMATCH")
        return memory

    def _archive(self, memory_id: str, grace: timedelta) -> None:
        memory = self.memories[memory_id]
        self._begin_version(memory)
        if memory.state == pb.MEMORY_STATE_ACTIVE:
            memory.archive_time.CopyFrom(_timestamp(self._now))
        memory.state = pb.MEMORY_STATE_ARCHIVED
        memory.delete_time.CopyFrom(_timestamp(self._now + grace))
        self.restored.discard(memory_id)

    def _forget(self, memory_id: str) -> None:
        del self.memories[memory_id], self.past[memory_id], self.helped[memory_id]

    def _begin_version(self, memory: pb.Memory) -> None:
        self.past[memory.id].insert(0, copy.deepcopy(memory))
        memory.version += 1
        memory.etag = f"v{memory.version}"
        memory.update_time.CopyFrom(_timestamp(self._now))

    def _needs_consent(self) -> None:
        if not self.is_consenting:
            raise Refused("CONSENT_MISSING")

    def _is_the_only_one(self, memory: pb.Memory) -> None:
        others = (other for other in self.active() if other.id != memory.id)
        if any(_identity(other) == _identity(memory) for other in others):
            raise Refused("RESOURCE_EXISTS")

    def _check_room(self, tier: int, grown_by: int) -> None:
        used, limit = self.used(tier)[0], self.limits[tier]
        if grown_by <= 0:
            return
        if used > (limit * 12 // 10 if tier == pb.TIER_LONG_TERM else limit):
            raise Refused("QUOTA_EXCEEDED")
        for share in (80, 100):
            if used * 100 >= limit * share > (used - grown_by) * 100:
                self._note("quota.threshold", f"usage/{NAMES[tier]}/{share}", "system")

    def _note(self, action: str, resource: str, actor: str = "") -> None:
        self.events[actor or ids.show(ids.USER, self.caller.user_id), action, resource] += 1

    def _in_state(self, state: int, tiers: tuple[int, ...]) -> list[pb.Memory]:
        found = (self.memories[memory_id] for memory_id in sorted(self.memories, reverse=True))
        return [memory for memory in found if memory.state == state and memory.tier in tiers]

    def _as_shown(self, memory: pb.Memory) -> pb.Memory:
        shown = copy.deepcopy(memory)
        shown.user_id = ids.show(ids.USER, self.caller.user_id)
        shown.last_seen_time.CopyFrom(memory.update_time)
        shown.ClearField("use_count")
        shown.ClearField("feedback")
        return shown

    def _as_told(self, was: pb.Memory) -> pb.Memory:
        """Return an earlier version: how the memory is used is told as it is now."""
        told, now = copy.deepcopy(was), self.memories[was.id]
        told.ClearField("delete_time")
        told.use_count, told.consent_version = now.use_count, now.consent_version
        told.last_seen_time.CopyFrom(now.last_seen_time)
        if now.HasField("feedback"):
            told.feedback = now.feedback
        return told


def explain(person: Person, told: Sequence[Told], now: datetime, seen: Seen) -> Person | None:
    """Return what a person has after calls that were made at once; None: nothing explains them.

    An order of the calls explains them if all answers, and what is seen afterwards, are what they
    would be had the calls been made in this order.
    """
    if not told:
        return person if person.looks(seen.memories) == seen else None
    for place, (request, answer) in enumerate(told):
        then, expected = person.after((request, answer), now)
        if expected == answer:
            found = explain(then, [*told[:place], *told[place + 1 :]], now, seen)
            if found:
                return found
    return None


def unexplained(person: Person, told: Sequence[Told], now: datetime, seen: Seen) -> str:
    """Say what came back and is seen, and what should have been if it was one call."""
    lines = ["no order of these calls explains what came back and what is seen then:"]
    for request, answer in told:
        expected = person.after((request, answer), now)[1]
        lines += [f"{method_of(request)}: {_line(request)}", f"    answered: {_line(answer)}"]
        lines += [f"    as first: {_line(expected)}"]
    if len(told) > 1:
        lines += [f"    {_line(answer)}" for answer in (seen.usage, *seen.memories.values())]
        return "\n".join(lines)
    then, expected = person.after(told[0], now)
    looks = then.looks(seen.memories)
    pairs = [(expected, told[0][1]), (looks.usage, seen.usage)]
    pairs += [(looks.memories[each], seen.memories[each]) for each in seen.memories]
    lines += [
        f"not: {_line(real)}\nbut: {_line(should)}" for should, real in pairs if should != real
    ]
    lines += [f"missing in the audit log: {event}" for event in looks.events - seen.events]
    lines += [f"too often in the audit log: {event}" for event in seen.events - looks.events]
    return "\n".join(lines)


def _line(answer: Answer) -> str:
    if isinstance(answer, str):
        return answer
    return text_format.MessageToString(answer, as_one_line=True, as_utf8=True)


def instant(timestamp: Timestamp) -> datetime:
    return timestamp.ToDatetime(UTC)


def _timestamp(moment: datetime) -> Timestamp:
    told = Timestamp()
    told.FromDatetime(moment)
    return told


def _draft(memory: pb.Memory) -> pb.Memory:
    """Return a memory with all that follows from what was asked for."""
    draft = copy.deepcopy(memory)
    draft.tier = draft.tier or pb.TIER_LONG_TERM
    draft.scope = draft.scope or pb.SCOPE_PRIVATE
    draft.source = draft.source or pb.SOURCE_CHAT
    draft.tags[:] = sorted(set(memory.tags))
    draft.channels[:] = sorted(set(memory.channels))
    draft.size_bytes = sum(len(text.encode()) for text in (draft.content, *draft.tags))
    draft.content_hash = hashlib.sha256(draft.content.encode()).hexdigest()
    return draft


def _identity(memory: pb.Memory) -> tuple[object, ...]:
    """Return what no two active memories of a user have in common."""
    position = memory.session_position if memory.HasField("session_position") else None
    return memory.tier, memory.content, memory.session_id, position


def _size(memories: Sequence[pb.Memory]) -> tuple[int, int]:
    return sum(memory.size_bytes for memory in memories), len(memories)


def ids_in(request: Any, answer: Any) -> set[str]:
    """Return the ids of the memories that a call was about."""
    target = request.memory if isinstance(request, pb.UpdateMemoryRequest) else request
    results = getattr(answer, "results", [answer])
    told = {each.memory.id for each in results if hasattr(each, "memory")}
    return {*told, getattr(target, "id", "")} - {""}


def _ids_of_created(answer: Answer) -> list[str]:
    match answer:
        case pb.CreateMemoryResponse():
            results = [answer]
        case pb.BatchCreateMemoriesResponse():
            results = list(answer.results)
        case _:
            results = []
    return [result.memory.id for result in results if result.created]
