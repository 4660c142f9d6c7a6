"""Between the contract's messages and attachments and transcripts."""

from datetime import datetime
from typing import Final

from kimberly.memory.v1 import memory_pb2 as pb

from server import ids
from server.errors import InvalidArgument
from server.memory import drafts
from server.memory.attachment_store import Announcement, Attachment, AttachmentState
from server.memory.attachments import LARGEST_BYTES, Uploads
from server.memory.messages import sha256_from, timestamp
from server.memory.transcripts import Transcript

_STATES_TO_PROTO = {
    AttachmentState.PENDING: pb.ATTACHMENT_STATE_PENDING,
    AttachmentState.COMPLETE: pb.ATTACHMENT_STATE_COMPLETE,
}
_LONGEST_FILE_NAME: Final = 255


def announcement_from(request: pb.CreateAttachmentRequest) -> Announcement:
    """Read what a caller wants to upload.

    Raises:
        InvalidArgument: A field is empty, too long or no SHA-256.
    """
    for field in ("file_name", "content_type"):
        text = getattr(request, field)
        if not 1 <= len(text) <= _LONGEST_FILE_NAME or not text.isprintable():
            raise InvalidArgument(
                field, f"must have 1 to {_LONGEST_FILE_NAME} printable characters"
            )
    if not 1 <= request.size_bytes <= LARGEST_BYTES:
        raise InvalidArgument("size_bytes", f"must be 1 to {LARGEST_BYTES}")
    return Announcement(
        memory_id=ids.parse(ids.MEMORY, request.memory_id, "memory_id"),
        file_name=request.file_name,
        content_type=request.content_type,
        size_bytes=request.size_bytes,
        sha256=sha256_from(request.sha256, "sha256"),
    )


def session_from(session_id: str) -> str:
    """Read which conversation is asked for.

    Raises:
        InvalidArgument: It cannot be one.
    """
    if not session_id:
        raise InvalidArgument("session_id", "must name a conversation")
    return drafts.check_name(session_id, "session_id")


def attachment_to(attachment: Attachment) -> pb.Attachment:
    """Return an attachment as the contract shows it."""
    return pb.Attachment(
        id=ids.show(ids.ATTACHMENT, attachment.id),
        memory_id=ids.show(ids.MEMORY, attachment.memory_id),
        file_name=attachment.file_name,
        content_type=attachment.content_type,
        size_bytes=attachment.size_bytes,
        sha256=attachment.sha256.hex(),
        state=_STATES_TO_PROTO[attachment.state],
        create_time=timestamp(attachment.created_at),
    )


def announced_to(
    attachment: Attachment, uploads: Uploads, expire_at: datetime
) -> pb.CreateAttachmentResponse:
    """Return where to put a file as the contract shows it."""
    return pb.CreateAttachmentResponse(
        attachment=attachment_to(attachment),
        upload_url=uploads.url,
        upload_expire_time=timestamp(expire_at) if uploads.url or uploads.parts else None,
        parts=[
            pb.UploadPart(number=part.number, size_bytes=part.size_bytes, upload_url=part.url)
            for part in uploads.parts
        ],
    )


def transcript_to(transcript: Transcript) -> pb.Transcript:
    """Return a transcript as the contract shows it."""
    return pb.Transcript(
        session_id=transcript.session_id,
        size_bytes=transcript.size_bytes,
        sha256=transcript.sha256.hex(),
        turns=transcript.turns,
        create_time=timestamp(transcript.created_at),
    )
