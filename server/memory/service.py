"""Serves kimberly.memory.v1.MemoryService: parse, act, answer."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.memory.v1 import memory_pb2_grpc as rpc

from server import ids, paging
from server.caller import current_caller
from server.clock import Clock
from server.memory import messages
from server.memory.attachments import Attachments
from server.memory.embedding_store import EmbeddingStore
from server.memory.embeddings import check_batch, check_model
from server.memory.importing import Importer
from server.memory.lifecycle_handlers import LifecycleHandlers
from server.memory.lifecycle_store import LifecycleStore
from server.memory.meditation_store import MeditationStore
from server.memory.model import Tier
from server.memory.retrieval import Retrieval
from server.memory.search_store import SearchStore
from server.memory.short_term import ShortTermStore
from server.memory.store import MemoryStore
from server.memory.tiers import wherever_it_is
from server.memory.usage_store import UsageStore
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class MemoryService(LifecycleHandlers, rpc.MemoryServiceServicer):
    """Serves the memories of the signed-in user."""

    def __init__(
        self,
        store: MemoryStore,
        lifecycle: LifecycleStore,
        usage: UsageStore,
        search: SearchStore,
        embeddings: EmbeddingStore,
        short_term: ShortTermStore,
        retrieval: Retrieval,
        attachments: Attachments,
        meditations: MeditationStore,
        clock: Clock,
    ) -> None:
        self._store = store
        self._lifecycle = lifecycle
        self._usage = usage
        self._search = search
        self._embeddings = embeddings
        self._short_term = short_term
        self._retrieval = retrieval
        self._attachments = attachments
        self._meditations = meditations
        self._importer = Importer(store, clock)
        self._clock = clock

    async def CreateMemory(
        self, request: pb.CreateMemoryRequest, context: Context
    ) -> pb.CreateMemoryResponse:
        check_request_id(request.request_id)
        draft = messages.draft_from(request.memory, "memory")
        store = self._short_term if draft.tier is Tier.SHORT_TERM else self._store
        memory, created = await store.create(
            current_caller(), draft, request.request_id, self._clock()
        )
        return pb.CreateMemoryResponse(memory=messages.memory_to(memory), created=created)

    async def GetMemory(
        self, request: pb.GetMemoryRequest, context: Context
    ) -> pb.GetMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.id, "id")
        memory = await wherever_it_is(
            lambda: self._store.get(caller, memory_id),
            lambda: self._short_term.get(caller, memory_id),
        )
        return pb.GetMemoryResponse(memory=messages.memory_to(memory))

    async def ListMemories(
        self, request: pb.ListMemoriesRequest, context: Context
    ) -> pb.ListMemoriesResponse:
        caller = current_caller()
        which = messages.list_filter_from(request)
        size = paging.page_size(request.page_size)
        identity = ("ListMemories", caller, replace(which, tiers=frozenset()), sorted(which.tiers))
        before = paging.decode(request.page_token, *identity)
        durable = await self._search.page(caller, which, before=before, limit=size + 1)
        short = await self._short_term.find(caller, which, before=before)
        page = sorted([*durable, *short], key=lambda memory: memory.id, reverse=True)
        more = len(page) > size
        return pb.ListMemoriesResponse(
            memories=map(messages.memory_to, page[:size]),
            next_page_token=paging.encode(page[size - 1].id, *identity) if more else "",
        )

    async def UpdateMemory(
        self, request: pb.UpdateMemoryRequest, context: Context
    ) -> pb.UpdateMemoryResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.memory.id, "memory.id")
        change = messages.change_from(request.memory, request.update_mask.paths)
        now = self._clock()
        memory = await wherever_it_is(
            lambda: self._store.update(caller, memory_id, change, now),
            lambda: self._short_term.update(caller, memory_id, change, now),
        )
        return pb.UpdateMemoryResponse(memory=messages.memory_to(memory))

    async def QueryMemories(
        self, request: pb.QueryMemoriesRequest, context: Context
    ) -> pb.QueryMemoriesResponse:
        question = messages.question_from(request, self._clock())
        answer = await self._retrieval.query(current_caller(), question, context.time_remaining())
        return messages.answer_to(answer)

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

    async def ImportMemories(
        self, request_iterator: AsyncIterator[pb.ImportMemoriesRequest], context: Context
    ) -> pb.ImportMemoriesResponse:
        caller = current_caller()
        response = await self._importer.run(caller, request_iterator)
        self._retrieval.forget(caller)
        return response

    async def CreateAttachment(
        self, request: pb.CreateAttachmentRequest, context: Context
    ) -> pb.CreateAttachmentResponse:
        now = self._clock()
        attachment, url = await self._attachments.announce(
            current_caller(), messages.announcement_from(request), now
        )
        return pb.CreateAttachmentResponse(
            attachment=messages.attachment_to(attachment),
            upload_url=url,
            upload_expire_time=self._url_expiry(now),
        )

    async def CompleteAttachment(
        self, request: pb.CompleteAttachmentRequest, context: Context
    ) -> pb.CompleteAttachmentResponse:
        attachment = await self._attachments.complete(
            current_caller(), ids.parse(ids.ATTACHMENT, request.id, "id")
        )
        return pb.CompleteAttachmentResponse(attachment=messages.attachment_to(attachment))

    async def GetAttachment(
        self, request: pb.GetAttachmentRequest, context: Context
    ) -> pb.GetAttachmentResponse:
        attachment, url = await self._attachments.get(
            current_caller(), ids.parse(ids.ATTACHMENT, request.id, "id")
        )
        return pb.GetAttachmentResponse(
            attachment=messages.attachment_to(attachment),
            download_url=url,
            download_expire_time=self._url_expiry(self._clock()) if url else None,
        )

    async def Meditate(self, request: pb.MeditateRequest, context: Context) -> pb.MeditateResponse:
        run = await self._meditations.start(current_caller(), request.request_id)
        return pb.MeditateResponse(meditation=messages.meditation_to(run))

    async def GetMeditation(
        self, request: pb.GetMeditationRequest, context: Context
    ) -> pb.GetMeditationResponse:
        run = await self._meditations.get(
            current_caller(), ids.parse(ids.MEDITATION, request.id, "id")
        )
        return pb.GetMeditationResponse(meditation=messages.meditation_to(run))

    def _url_expiry(self, now: datetime) -> Any:
        return messages.timestamp(now + self._attachments.url_lifetime)
