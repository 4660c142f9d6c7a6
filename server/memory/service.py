"""Serves kimberly.memory.v1.MemoryService: parse, act, answer."""

from dataclasses import replace
from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server import ids, paging
from server.caller import current_caller
from server.clock import Clock
from server.memory import messages
from server.memory.agent_reads import AgentReads
from server.memory.attachment_handlers import AttachmentHandlers
from server.memory.attachments import Attachments
from server.memory.batch_handlers import BatchHandlers
from server.memory.batch_store import BatchStore
from server.memory.embedding_store import EmbeddingStore
from server.memory.embeddings import check_batch, check_model
from server.memory.goal_handlers import GoalHandlers
from server.memory.goal_store import GoalStore
from server.memory.lifecycle_handlers import LifecycleHandlers
from server.memory.lifecycle_store import LifecycleStore
from server.memory.meditation_handlers import MeditationHandlers
from server.memory.meditation_store import MeditationStore
from server.memory.model import Memory, Tier
from server.memory.promotion import Promotion
from server.memory.query_handlers import Queries, QueryHandlers
from server.memory.search_store import SearchStore
from server.memory.sensitive import Opener
from server.memory.session_handlers import SessionHandlers
from server.memory.sessions import Sessions
from server.memory.shared_store import SharedStore
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.stream_handlers import StreamHandlers, Streams
from server.memory.tiers import in_either_store, wherever_it_is
from server.memory.transcripts import Transcripts
from server.memory.undoing import Undoing
from server.memory.usage_store import UsageStore
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MemoryService(
    QueryHandlers,
    LifecycleHandlers,
    SessionHandlers,
    AttachmentHandlers,
    StreamHandlers,
    BatchHandlers,
    GoalHandlers,
    MeditationHandlers,
    rpc.MemoryServiceServicer,
):
    """Serves the memories of the signed-in user."""

    def __init__(
        self,
        store: MemoryStore,
        batches: BatchStore,
        lifecycle: LifecycleStore,
        usage: UsageStore,
        search: SearchStore,
        shared: SharedStore,
        embeddings: EmbeddingStore,
        short_term: ShortTermStore,
        promotion: Promotion,
        sessions: Sessions,
        queries: Queries,
        attachments: Attachments,
        transcripts: Transcripts,
        meditations: MeditationStore,
        undoing: Undoing,
        goals: GoalStore,
        streams: Streams,
        opener: Opener,
        reads: AgentReads,
        clock: Clock,
    ) -> None:
        self._store = store
        self._batches = batches
        self._lifecycle = lifecycle
        self._usage = usage
        self._search = search
        self._shared = shared
        self._embeddings = embeddings
        self._short_term = short_term
        self._promotion = promotion
        self._sessions = sessions
        self._queries = queries
        self._retrieval = queries.retrieval
        self._attachments = attachments
        self._transcripts = transcripts
        self._meditations = meditations
        self._undoing = undoing
        self._goals = goals
        self._streams = streams
        self._opener = opener
        self._reads = reads
        self._clock = clock

    async def CreateMemory(
        self, request: pb.CreateMemoryRequest, context: Context
    ) -> pb.CreateMemoryResponse:
        caller = current_caller()
        check_request_id(request.request_id)
        draft = messages.draft_from(request.memory, "memory")
        store = self._short_term if draft.tier is Tier.SHORT_TERM else self._store
        memory, created = await store.create(caller, draft, request.request_id, self._clock())
        memory = await self._opener.opened_one(caller, memory)
        return pb.CreateMemoryResponse(memory=messages.memory_to(memory), created=created)

    async def GetMemory(
        self, request: pb.GetMemoryRequest, context: Context
    ) -> pb.GetMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        memory = await wherever_it_is(
            lambda: self._store.get(caller, memory_id),
            lambda: self._short_term.get(caller, memory_id),
            lambda: self._shared.get(caller, memory_id),
            # It may have been promoted between the first two looks.
            lambda: self._store.get(caller, memory_id),
        )
        await self._reads.note(caller, [memory.id])
        memory = await self._opener.opened_one(caller, memory)
        return pb.GetMemoryResponse(memory=messages.memory_to(memory))

    async def ListMemories(
        self, request: pb.ListMemoriesRequest, context: Context
    ) -> pb.ListMemoriesResponse:
        caller = current_caller()
        which = messages.list_filter_from(request)
        size = paging.page_size(request.page_size)
        bounds = replace(which, tiers=frozenset())
        identity = ("ListMemories", caller, bounds, sorted(which.tiers), request.shared)
        before = paging.decode(request.page_token, *identity)
        if request.shared:
            page = await self._shared.page(caller, which, before=before, limit=size + 1)
        else:
            # In this order, what is promoted meanwhile is in both, and in neither never.
            short = await self._short_term.find(caller, which, before=before)
            durable = await self._search.page(caller, which, before=before, limit=size + 1)
            found = {memory.id: memory for memory in (*short, *durable)}
            page = [found[memory_id] for memory_id in sorted(found, reverse=True)]
        shown, more = page[:size], len(page) > size
        await self._reads.note(caller, [memory.id for memory in shown])
        return pb.ListMemoriesResponse(
            memories=map(messages.memory_to, await self._opener.opened(caller, shown)),
            next_page_token=paging.encode(shown[-1].id, *identity) if more else "",
        )

    async def UpdateMemory(
        self, request: pb.UpdateMemoryRequest, context: Context
    ) -> pb.UpdateMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.memory.id, "memory.id")
        change = messages.change_from(request.memory, request.update_mask.paths)
        now = self._clock()

        async def durable() -> Memory:
            return await self._store.update(caller, memory_id, change, now)

        async def short_term() -> Memory:
            if change.is_sensitive:
                await self._short_term.refuse(caller, memory_id, "marked as sensitive")
            if change.tier in (None, Tier.SHORT_TERM):
                return await self._short_term.update(caller, memory_id, change, now)
            return await self._promotion.promote(caller, memory_id, change, now)

        if change.tier is Tier.SHORT_TERM:
            memory = await wherever_it_is(short_term, durable)
        else:
            memory = await in_either_store(durable, short_term)
        if change.is_sensitive:  # Redis may hold it yet: in answers, or for want of one itself
            await self._queries.answers.forget(caller)
            await self._short_term.remove(caller, [memory_id])
        memory = await self._opener.opened_one(caller, memory)
        return pb.UpdateMemoryResponse(memory=messages.memory_to(memory))

    async def UploadEmbeddings(
        self, request: pb.UploadEmbeddingsRequest, context: Context
    ) -> pb.UploadEmbeddingsResponse:
        uploads = messages.uploads_from(request)
        check_batch(uploads)
        refused = await self._embeddings.keep(current_caller(), uploads)
        return messages.kept_to(uploads, refused)

    async def DeleteEmbeddings(
        self, request: pb.DeleteEmbeddingsRequest, context: Context
    ) -> pb.DeleteEmbeddingsResponse:
        check_model(request.model, "model")
        deleted = await self._embeddings.delete(current_caller(), request.model)
        return pb.DeleteEmbeddingsResponse(deleted=deleted)
