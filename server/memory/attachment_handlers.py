"""What MemoryService answers about files: attachments of memories, transcripts of conversations."""

from typing import Any, TypeAlias

import grpc
from kimberly.memory.v1 import memory_pb2 as pb

from server import ids, paging
from server.caller import current_caller
from server.clock import Clock
from server.memory import attachment_messages as messages
from server.memory import transcripts
from server.memory.agent_reads import ATTACHMENT, TRANSCRIPT, AgentReads
from server.memory.attachments import Attachments
from server.memory.messages import timestamp
from server.memory.transcripts import Transcripts
from server.requests import check_request_id

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class AttachmentHandlers:
    """A part of MemoryService."""

    _attachments: Attachments
    _transcripts: Transcripts
    _reads: AgentReads
    _clock: Clock

    async def CreateAttachment(
        self, request: pb.CreateAttachmentRequest, context: Context
    ) -> pb.CreateAttachmentResponse:
        check_request_id(request.request_id)
        now = self._clock()
        attachment, uploads = await self._attachments.announce(
            current_caller(), messages.announcement_from(request), request.request_id, now
        )
        expire_at = now + self._attachments.url_lifetime
        return messages.announced_to(attachment, uploads, expire_at)

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
        caller, attachment_id = current_caller(), ids.parse(ids.ATTACHMENT, request.id, "id")
        attachment, url = await self._attachments.get(caller, attachment_id)
        await self._reads.note_names(caller, ATTACHMENT, [request.id])
        expire_at = self._clock() + self._attachments.url_lifetime
        return pb.GetAttachmentResponse(
            attachment=messages.attachment_to(attachment),
            download_url=url,
            download_expire_time=timestamp(expire_at) if url else None,
        )

    async def ListAttachments(
        self, request: pb.ListAttachmentsRequest, context: Context
    ) -> pb.ListAttachmentsResponse:
        caller = current_caller()
        memory_id = ids.parse(ids.MEMORY, request.memory_id, "memory_id")
        size = paging.page_size(request.page_size)
        identity = ("ListAttachments", caller, memory_id)
        before = paging.decode(request.page_token, *identity)
        page = await self._attachments.page(caller, memory_id, before=before, limit=size + 1)
        await self._reads.note(caller, [memory_id])
        more = len(page) > size
        return pb.ListAttachmentsResponse(
            attachments=map(messages.attachment_to, page[:size]),
            next_page_token=paging.encode(page[size - 1].id, *identity) if more else "",
        )

    async def DeleteAttachment(
        self, request: pb.DeleteAttachmentRequest, context: Context
    ) -> pb.DeleteAttachmentResponse:
        await self._attachments.delete(
            current_caller(), ids.parse(ids.ATTACHMENT, request.id, "id")
        )
        return pb.DeleteAttachmentResponse()

    async def GetTranscript(
        self, request: pb.GetTranscriptRequest, context: Context
    ) -> pb.GetTranscriptResponse:
        caller, session_id = current_caller(), messages.session_from(request.session_id)
        transcript, url = await self._transcripts.get(caller, session_id)
        await self._reads.note_names(caller, TRANSCRIPT, [transcripts.shown(transcript)])
        return pb.GetTranscriptResponse(
            transcript=messages.transcript_to(transcript),
            download_url=url,
            download_expire_time=timestamp(self._clock() + self._transcripts.url_lifetime),
        )

    async def DeleteTranscript(
        self, request: pb.DeleteTranscriptRequest, context: Context
    ) -> pb.DeleteTranscriptResponse:
        await self._transcripts.delete(current_caller(), messages.session_from(request.session_id))
        return pb.DeleteTranscriptResponse()
