"""What users may ask the jobs process for: each slice says how its own jobs come about."""

from typing import Final
from uuid import UUID

from server.caller import Caller
from server.database import Connection
from server.embedding_requests import FORMER_KIND as FORMER_EMBED
from server.embedding_requests import KIND as EMBED
from server.embedding_requests import ask_for_embedding
from server.jobs.asking import Kind, Kinds, Payload
from server.memory.meditation_store import ask_for_meditation
from server.privacy.export_store import EXPORT, ask_for_export

MEDITATE: Final = "meditation.run"


async def _embed(connection: Connection, caller: Caller, _payload: Payload) -> UUID | None:
    return await ask_for_embedding(connection, caller)


async def _export(connection: Connection, caller: Caller, _payload: Payload) -> UUID:
    return await ask_for_export(connection, caller)


async def _meditate(connection: Connection, caller: Caller, payload: Payload) -> UUID | None:
    return await ask_for_meditation(connection, caller, **payload)


KINDS: Final = Kinds(
    {
        EMBED: Kind(_embed),
        FORMER_EMBED: Kind(_embed),
        EXPORT: Kind(_export),
        MEDITATE: Kind(_meditate, {"full_run": bool, "dry_run": bool}),
    }
)
"""Kinds of CreateJob and of schedules."""
