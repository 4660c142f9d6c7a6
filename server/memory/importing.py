"""Importing many memories over one stream, a transaction a chunk."""

from collections.abc import AsyncIterator

from kimberly.memory.v1 import memory_pb2 as pb

from server.caller import Caller
from server.clock import Clock
from server.errors import InvalidArgument
from server.memory.messages import draft_from
from server.memory.model import Draft, Tier
from server.memory.store import MemoryStore

CHUNK = 1_000
_REFUSALS_SHOWN = 1_000


class Importer:
    """Stores chunks as they come. A chunk that was stored stays stored if the stream breaks."""

    def __init__(self, store: MemoryStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def run(
        self, caller: Caller, chunks: AsyncIterator[pb.ImportMemoriesRequest]
    ) -> pb.ImportMemoriesResponse:
        """Store every memory that can be kept and count the rest.

        Raises:
            InvalidArgument: A chunk holds more than 1000 memories.
            ConsentMissing: The user has not consented, or withdrew while importing.
        """
        outcome = pb.ImportMemoriesResponse()
        async for chunk in chunks:
            if len(chunk.memories) > CHUNK:
                raise InvalidArgument("memories", f"a chunk has at most {CHUNK} memories")
            drafts = self._readable(chunk, outcome)
            created = await self._store.create_all(caller, drafts, self._clock())
            outcome.created += created
            outcome.existing += len(drafts) - created
        return outcome

    def _readable(
        self, chunk: pb.ImportMemoriesRequest, outcome: pb.ImportMemoriesResponse
    ) -> list[Draft]:
        """Return the drafts that can be kept; tell the outcome of the others."""
        drafts = []
        for place, message in enumerate(chunk.memories):
            try:
                drafts.append(_importable(message, f"memories[{place}]"))
            except InvalidArgument as error:
                outcome.refused += 1
                if len(outcome.refusals) < _REFUSALS_SHOWN:
                    (violation,) = error.violations
                    outcome.refusals.add(
                        index=chunk.first_index + place,
                        field=violation.field,
                        message=violation.description,
                    )
        return drafts


def _importable(message: pb.Memory, path: str) -> Draft:
    if message.source == pb.SOURCE_UNSPECIFIED:
        message.source = pb.SOURCE_IMPORT
    draft = draft_from(message, path)
    if draft.tier is Tier.SHORT_TERM:
        raise InvalidArgument(f"{path}.tier", "short-term memories cannot be imported")
    return draft
