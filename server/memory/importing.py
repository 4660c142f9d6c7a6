"""Importing many memories over one stream, a transaction a chunk."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Final

from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.caller import Caller
from server.clock import Clock
from server.errors import InvalidArgument, Problem
from server.memory.import_store import Chunk, ImportStore, Outcome, Stored, make_terms
from server.memory.messages import draft_from, timestamp
from server.memory.model import Draft, Tier
from server.preferences import Language
from server.requests import check_request_id

CHUNK: Final = 1_000
REFUSALS_SHOWN: Final = 1_000
RESULTS_SHOWN: Final = 1_000_000
IDS_SHOWN: Final = 100_000

_RESULTS: Final = {
    Outcome.CREATED: pb.IMPORT_RESULT_CREATED,
    Outcome.EXISTING: pb.IMPORT_RESULT_EXISTING,
    Outcome.REFUSED: pb.IMPORT_RESULT_REFUSED,
    Outcome.SKIPPED: pb.IMPORT_RESULT_SKIPPED,
}


class Importer:
    """Stores chunks as they come. A chunk that was stored stays stored if the stream breaks."""

    def __init__(self, store: ImportStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def run(
        self, caller: Caller, requests: AsyncIterator[pb.ImportMemoriesRequest]
    ) -> pb.ImportMemoriesResponse:
        """Store every memory that can be kept and say what became of each.

        Raises:
            InvalidArgument: A chunk holds more than 1000 memories, or does not stand where it
                belongs.
            ConsentMissing: The user has not consented, or withdrew while importing.
        """
        report = _Report()
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._pass_through(caller, requests, report, tasks)
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return report.response

    async def progress(self, caller: Caller, request_id: str) -> pb.ImportProgress:
        """Return how far an import came.

        Raises:
            InvalidArgument: The id can be none.
            NotFound: Nothing was ever imported under this id.
        """
        if not request_id:
            raise InvalidArgument("request_id", "must name an import")
        check_request_id(request_id)
        progress = await self._store.progress(caller, request_id)
        return pb.ImportProgress(
            request_id=progress.request_id,
            next_index=progress.next_index,
            created=progress.created,
            existing=progress.existing,
            refused=progress.refused,
            update_time=timestamp(progress.updated_at),
        )

    async def _pass_through(
        self,
        caller: Caller,
        requests: AsyncIterator[pb.ImportMemoriesRequest],
        report: "_Report",
        tasks: asyncio.TaskGroup,
    ) -> None:
        """Read one chunk while the one before it is being stored."""
        first: pb.ImportMemoriesRequest | None = None
        storing: asyncio.Task[None] | None = None
        async for request in requests:
            first = first or request
            try:
                part = await _read(request, first, report.language)
            finally:
                # One that is refused takes nothing back of those before it.
                if storing:
                    await storing
            storing = tasks.create_task(self._deal_with(caller, part, report))

    async def _deal_with(self, caller: Caller, part: "_Part", report: "_Report") -> None:
        stored = await self._store.store(
            caller, part.chunk, self._clock(), find_existing=part.return_ids
        )
        report.add(part, stored)


@dataclass(frozen=True, slots=True)
class _Part:
    """A message, read."""

    chunk: Chunk
    refusals: Mapping[int, Problem]
    """Why drafts cannot be kept, by their places in the chunk."""
    return_ids: bool


class _Report:
    """Collects what becomes of an import."""

    def __init__(self) -> None:
        self.response = pb.ImportMemoriesResponse()
        self.language: Language | None = None
        """What texts were read in at last; None as long as nothing is stored."""

    def add(self, part: _Part, stored: Stored) -> None:
        """Add what became of a part."""
        response, self.language = self.response, stored.language
        response.created += stored.count(Outcome.CREATED)
        response.existing += stored.count(Outcome.EXISTING)
        response.refused += stored.count(Outcome.REFUSED)
        response.skipped += stored.count(Outcome.SKIPPED)
        response.next_index = part.chunk.first_index + len(stored.outcomes)
        room = RESULTS_SHOWN - len(response.results)
        response.results.extend(_RESULTS[outcome] for outcome in stored.outcomes[:room])
        if part.return_ids:
            room = IDS_SHOWN - len(response.memory_ids)
            response.memory_ids.extend(
                ids.show(ids.MEMORY, memory_id) if memory_id else ""
                for memory_id in stored.memory_ids[:room]
            )
        self._explain(part, stored)

    def _explain(self, part: _Part, stored: Stored) -> None:
        problems = {**part.refusals, **stored.without_room}
        for place, problem in sorted(problems.items()):
            is_shown = len(self.response.refusals) < REFUSALS_SHOWN
            if is_shown and stored.outcomes[place] is Outcome.REFUSED:
                self.response.refusals.append(
                    _refusal(part.chunk.first_index + place, place, problem)
                )


def _refusal(index: int, place: int, problem: Problem) -> pb.ImportRefusal:
    field, message = f"memories[{place}]", problem.message
    if isinstance(problem, InvalidArgument):
        (violation,) = problem.violations
        field, message = violation.field, violation.description
    return pb.ImportRefusal(index=index, field=field, message=message, reason=problem.reason)


async def _read(
    request: pb.ImportMemoriesRequest,
    first: pb.ImportMemoriesRequest,
    language: Language | None,
) -> _Part:
    """Read a chunk, and make its terms too if the language is known: they need no transaction."""
    if len(request.memories) > CHUNK:
        raise InvalidArgument("memories", f"a chunk has at most {CHUNK} memories")
    if request.first_index < 0:
        raise InvalidArgument("first_index", "must not be negative")
    if request.request_id not in ("", first.request_id):
        raise InvalidArgument("request_id", "must be that of the first chunk, or empty")
    check_request_id(first.request_id)
    drafts: list[Draft | None] = []
    refusals: dict[int, Problem] = {}
    for place, message in enumerate(request.memories):
        try:
            drafts.append(_importable(message, f"memories[{place}]"))
        except InvalidArgument as problem:
            drafts.append(None)
            refusals[place] = problem
    readable = [draft for draft in drafts if draft]
    made = await make_terms(readable, language) if language else None
    chunk = Chunk(drafts, request.first_index, first.request_id, made)
    return _Part(chunk, refusals, first.return_ids)


def _importable(message: pb.Memory, path: str) -> Draft:
    if message.source == pb.SOURCE_UNSPECIFIED:
        message.source = pb.SOURCE_IMPORT
    draft = draft_from(message, path)
    if draft.tier is Tier.SHORT_TERM:
        raise InvalidArgument(f"{path}.tier", "short-term memories cannot be imported")
    return draft
