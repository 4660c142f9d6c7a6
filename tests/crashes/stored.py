"""What the stores hold of a user at the end, as facts that are the same in every run."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server import ids
from server.blobs import Blobs
from server.caller import Caller
from server.clock import utc_now
from server.database import SystemDatabase
from server.memory.objects import Kind, ObjectName
from server.memory.sweeping import Sweep, Swept
from tests.conftest import bearer
from tests.crashes.story import Story
from tests.crashes.victim import Victim

_PAGE = 1000
_ANY_NUMBER = {"memory.feedback"}
"""Actions that carry neither request id nor etag: to say them twice is to say them twice."""
_MAY_BE_MISSING = Counter({"audit: memory.update felt": 1})
"""Redis changes a short-term memory before the event of it is committed. A client that was cut off
in between, and finds the change made, asks no more."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What is there."""

    facts: Counter[str]
    broken: list[str] = field(default_factory=list)
    """What must never be, whatever was asked for."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How what is there differs from what was acknowledged, which is everything."""

    lost: list[str]
    invented: list[str]
    """Or there twice."""
    broken: list[str]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.invented or self.broken)


def judge(stored: Stored, undisturbed: Stored) -> Verdict:
    """Compare what is there after a fault with what is there after the same story without one."""
    return Verdict(
        sorted((undisturbed.facts - stored.facts - _MAY_BE_MISSING).elements()),
        sorted((stored.facts - undisturbed.facts).elements()),
        stored.broken,
    )


class Reader:
    """Reads what is stored: memories as their user does, the rest behind the server's back."""

    def __init__(self, owner: asyncpg.Connection, system: SystemDatabase, blobs: Blobs) -> None:
        self._owner = owner
        self._system = system
        self._blobs = blobs

    async def read(self, victim: Victim, story: Story, caller: Caller) -> Stored:
        """Return what is stored of a user, after the sweeps that run by themselves."""
        stored = Stored(Counter())
        stub: Any = rpc.MemoryServiceStub(victim.channel)
        memories = [memory async for memory in _memories(stub, caller)]
        names = _names(story, memories)
        stored.facts.update(_told(memories, names))
        async for version in _versions(stub, caller, memories):
            stored.facts[f"{names[version.id]} was {version.content} at {version.version}"] += 1
        stored.facts.update(await _used(stub, caller))
        stored.facts.update(await self._events(caller, names))
        stored.facts.update(await self._requests(caller, names))
        await self._objects(caller, names, stored)
        stored.broken.extend(await self._miscounted(caller, memories))
        return stored

    async def _events(self, caller: Caller, names: Mapping[str, str]) -> Counter[str]:
        rows = await self._owner.fetch(
            "SELECT action, resource FROM audit_events WHERE user_id = $1", caller.user_id
        )
        events = Counter(f"audit: {row['action']} {_named(row['resource'], names)}" for row in rows)
        return Counter(
            {
                event: 1 if event.split()[1] in _ANY_NUMBER else count
                for event, count in events.items()
            }
        )

    async def _requests(self, caller: Caller, names: Mapping[str, str]) -> list[str]:
        made = await self._owner.fetch(
            "SELECT method, request_id, resource_id FROM requests WHERE user_id = $1",
            caller.user_id,
        )
        by_hex = {shown.partition("_")[2]: name for shown, name in names.items()}
        imports = await self._owner.fetch(
            "SELECT request_id, next_index, created FROM imports WHERE user_id = $1",
            caller.user_id,
        )
        sessions = await self._owner.fetch(
            "SELECT session_id, promoted, dropped FROM ended_sessions WHERE user_id = $1",
            caller.user_id,
        )
        return [
            *(
                f"request {row['method']}/{row['request_id']} made "
                f"{by_hex.get(row['resource_id'].hex, 'something unknown')}"
                for row in made
            ),
            *(f"import {' '.join(map(str, row))}" for row in imports),
            *(f"session ended {' '.join(map(str, row))}" for row in sessions),
        ]

    async def _objects(self, caller: Caller, names: Mapping[str, str], stored: Stored) -> None:
        """Sweep as the schedule would, and look at what is left in the bucket."""
        await _swept(self._sweep(timedelta()).doomed)
        rows = {
            row["id"]
            for row in await self._owner.fetch(
                "SELECT id FROM attachments WHERE user_id = $1 UNION ALL "
                "SELECT id FROM transcripts WHERE user_id = $1",
                caller.user_id,
            )
        }
        # What is deleted goes at once. What no row named yet goes once it is old.
        async for kind, name in self._left(caller):
            if name.id not in rows and shown(name) in names:
                stored.broken.append(f"{kind} of {names[shown(name)]} is left")
        sweep = self._sweep(timedelta(hours=2))
        await _swept(sweep.orphans)
        await sweep.uploads()
        async for kind, name in self._left(caller):
            stored.facts[f"{kind} of {_named(shown(name), names)}"] += 1
            if name.id not in rows:
                stored.broken.append(f"{kind} {name.key} has no row")
        doomed = await self._owner.fetch(
            "SELECT object_key FROM doomed_objects WHERE user_id = $1", caller.user_id
        )
        stored.broken.extend(f"{row['object_key']} is still doomed" for row in doomed)

    def _sweep(self, after: timedelta) -> Sweep:
        def clock() -> datetime:
            return utc_now() + after

        hour = timedelta(hours=1)
        return Sweep(self._system, self._blobs, clock, url_lifetime=24 * hour, margin=hour)

    async def _left(self, caller: Caller) -> AsyncIterator[tuple[str, ObjectName]]:
        """Yield versions of objects, marks of deletion and unfinished uploads of a user."""
        token, more = "", True
        keys: list[tuple[str, str]] = []
        while more:
            page = await self._blobs.versions(token=token, limit=_PAGE)
            keys += [("a version", version.key) for version in page.versions]
            token, more = page.next_token, bool(page.next_token)
        keys += [("an upload", each.key) for each in await self._blobs.unfinished()]
        for kind, key in keys:
            name = ObjectName.parse(key)
            if name is not None and name.owner == caller:
                yield kind, name

    async def _miscounted(self, caller: Caller, memories: list[pb.Memory]) -> list[str]:
        row = await self._owner.fetchrow(
            """
            SELECT usage.long_term_bytes, usage.permanent_bytes, usage.archived_bytes,
                   usage.long_term_count, usage.permanent_count, usage.archived_count
              FROM memory_usage AS usage
             WHERE user_id = $1
            """,
            caller.user_id,
        )
        wrong = []
        for place, what in (
            ("long_term", _active(memories, pb.TIER_LONG_TERM)),
            ("permanent", _active(memories, pb.TIER_PERMANENT)),
            ("archived", [m for m in memories if m.state == pb.MEMORY_STATE_ARCHIVED]),
        ):
            counted = row[f"{place}_bytes"], row[f"{place}_count"]
            there = sum(memory.size_bytes for memory in what), len(what)
            if counted != there:
                wrong.append(f"{place}: {counted} counted, {there} there")
        shown = [memory.id for memory in memories]
        wrong += [f"{each} is in two tiers" for each in set(shown) if shown.count(each) > 1]
        return wrong


def shown(name: ObjectName) -> str:
    """Return the id of what an object belongs to, as the audit log shows it."""
    prefix = {Kind.ATTACHMENT: ids.ATTACHMENT, Kind.TRANSCRIPT: "trs"}[name.kind]
    return ids.show(prefix, name.id)


def _active(memories: Iterable[pb.Memory], tier: pb.Tier.ValueType) -> list[pb.Memory]:
    return [m for m in memories if m.tier == tier and m.state == pb.MEMORY_STATE_ACTIVE]


async def _swept(stage: Any) -> None:
    swept: Swept = await stage("", _PAGE)
    while swept.next_token:
        swept = await stage(swept.next_token, _PAGE)


async def _memories(stub: Any, caller: Caller) -> AsyncIterator[pb.Memory]:
    for state in (pb.MEMORY_STATE_ACTIVE, pb.MEMORY_STATE_ARCHIVED):
        request = pb.ListMemoriesRequest(state=state, page_size=100)
        page = await stub.ListMemories(request, metadata=bearer(caller))
        assert not page.next_page_token
        for memory in page.memories:
            yield memory


async def _versions(
    stub: Any, caller: Caller, memories: Iterable[pb.Memory]
) -> AsyncIterator[pb.Memory]:
    for memory in memories:
        if memory.tier != pb.TIER_SHORT_TERM:
            request = pb.ListMemoryVersionsRequest(id=memory.id)
            for version in (
                await stub.ListMemoryVersions(request, metadata=bearer(caller))
            ).versions:
                yield version


async def _used(stub: Any, caller: Caller) -> list[str]:
    usage = await stub.GetUsage(pb.GetUsageRequest(), metadata=bearer(caller))
    return [
        f"usage: {pb.Tier.Name(tier.tier)} {tier.used_bytes} bytes, {tier.count} memories"
        for tier in usage.tiers
    ]


def _names(story: Story, memories: Iterable[pb.Memory]) -> dict[str, str]:
    """Return how to call things: as the story does, or by their text."""
    return {memory.id: memory.content for memory in memories} | story.names


def _named(resource: str, names: Mapping[str, str]) -> str:
    kind, _, _ = resource.partition("_")
    return names.get(resource, resource if "/" in resource else f"unknown {kind}")


def _told(memories: Iterable[pb.Memory], names: Mapping[str, str]) -> list[str]:
    return [
        f"{names[memory.id]}: {pb.Tier.Name(memory.tier)} {memory.content!r} {list(memory.tags)} "
        f"at {memory.session_id}/{memory.session_position} version {memory.version} "
        f"{pb.MemoryState.Name(memory.state)} protected={memory.protected} "
        f"sensitive={memory.sensitive} "
        f"used={memory.use_count} feedback={memory.feedback:.2f}"
        for memory in memories
    ]
