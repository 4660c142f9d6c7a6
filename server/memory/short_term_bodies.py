"""Short-term memories as Redis holds them."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from server.memory.model import (
    Author,
    Change,
    Memory,
    Scope,
    Source,
    Tier,
    hash_of,
    size_of,
)


@dataclass(frozen=True, slots=True)
class Kept:
    """A short-term memory with what only its promotion asks for."""

    memory: Memory
    useful_count: int
    """How often retrieving it helped."""
    retrieved_count: int = 0
    """How often queries returned it."""


def body_of(memory: Memory) -> str:
    """Return what never changes by itself, as JSON that starts with the place."""
    position = json.dumps(memory.session_position)
    return f'{{"session_position": {position}, {open_body_of(memory)}'


def open_body_of(memory: Memory) -> str:
    """Return the same without its start: the place is still to be found."""
    body = {
        "content": memory.content,
        "tags": memory.tags,
        "channels": memory.channels,
        "source": memory.source,
        "session_id": memory.session_id,
        "speaker": memory.speaker,
        "occurred_at": memory.occurred_at.isoformat(),
        "scope": memory.scope,
        "protected": memory.is_protected,
        "created_by": memory.created_by,
        "consent_version": memory.consent_version,
        "created_at": memory.created_at.isoformat(),
        "updated_at": memory.updated_at.isoformat(),
    }
    return json.dumps(body)[1:]


def past_of(memory: Memory) -> str:
    """Return what a memory was, after its size: the script needs no more of it."""
    return f'{memory.size_bytes}:{{"version": {memory.version}, {body_of(memory)[1:]}'


def place_of(memory: Memory) -> str:
    """Return what identical content at one place has in common."""
    position = "" if memory.session_position is None else memory.session_position
    return f"{memory.content_hash.hex()}|{position}|{session_key(memory.session_id)}"


def request_key(request_id: str, contents: bytes) -> str:
    """Return a request as a part of a key; empty for one that cannot be told from others."""
    if not request_id:
        return ""
    return hashlib.sha256(request_id.encode() + b"\0" + contents).hexdigest()


def session_key(session_id: str) -> str:
    """Return a conversation as a part of a key; empty for none."""
    return hashlib.sha256(session_id.encode()).hexdigest() if session_id else ""


def kept_from(entry: Sequence[Any]) -> Kept:
    """Read what the scripts return of a memory."""
    memory_id, body, version, used, seen, feedback, useful, retrieved, expiry = entry
    memory = _memory(UUID(memory_id.decode()), json.loads(body), int(version))
    memory = replace(
        memory,
        use_count=int(used),
        last_seen_at=_instant(int(seen)),
        feedback=None if feedback is None else float(feedback),
        expires_at=_instant(int(expiry)),
    )
    return Kept(memory, int(useful or 0), int(retrieved or 0))


def past_from(memory: Memory, past: bytes) -> Memory:
    """Read what a memory was."""
    body = json.loads(past.partition(b":")[2])
    was = _memory(memory.id, body, body["version"])
    return replace(
        was,
        use_count=memory.use_count,
        last_seen_at=memory.last_seen_at,
        feedback=memory.feedback,
        expires_at=memory.expires_at,
    )


def changed(memory: Memory, change: Change, now: datetime) -> Memory:
    """Return the next version of a memory."""
    content = memory.content if change.content is None else change.content
    tags = memory.tags if change.tags is None else change.tags
    return replace(
        memory,
        content=content,
        tags=tags,
        channels=memory.channels if change.channels is None else change.channels,
        speaker=memory.speaker if change.speaker is None else change.speaker,
        occurred_at=change.occurred_at or memory.occurred_at,
        scope=change.scope or memory.scope,
        tier=change.tier or memory.tier,
        size_bytes=size_of(content, tags),
        content_hash=hash_of(content),
        version=memory.version + 1,
        updated_at=now,
    )


def milliseconds(instant: datetime) -> int:
    """Return an instant as Redis counts it."""
    return int(instant.timestamp() * 1000)


def _memory(memory_id: UUID, body: dict[str, Any], version: int) -> Memory:
    tags = tuple(body["tags"])
    created_at = datetime.fromisoformat(body["created_at"])
    return Memory(
        id=memory_id,
        tier=Tier.SHORT_TERM,
        content=body["content"],
        tags=tags,
        # What was written before there were channels has none, and so on.
        channels=tuple(body.get("channels", ())),
        source=Source(body["source"]),
        session_id=body["session_id"],
        session_position=body["session_position"],
        speaker=body["speaker"],
        occurred_at=datetime.fromisoformat(body["occurred_at"]),
        size_bytes=size_of(body["content"], tags),
        content_hash=hash_of(body["content"]),
        version=version,
        created_at=created_at,
        updated_at=datetime.fromisoformat(body["updated_at"]),
        last_seen_at=created_at,
        use_count=0,
        scope=Scope(body.get("scope", Scope.PRIVATE)),
        is_protected=body.get("protected", False),
        created_by=Author(body.get("created_by", Author.USER)),
        consent_version=body.get("consent_version"),
    )


def _instant(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
