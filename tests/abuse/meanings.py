"""What the fields of requests name: the table behind the cases of tests/abuse/test_other_users."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.agents.v1 import agents_pb2 as agents
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from tests.mesh import PASSWORD
from tests.transports import public_methods


class Means(enum.Enum):
    """What a field stands for."""

    MEMORY = "mem"
    ATTACHMENT = "att"
    MEDITATION = "med"
    GOAL = "goa"
    JOB = "job"
    SCHEDULE = "sch"
    LOG_IN = "ses"
    API_KEY = "key"
    AGENT = "agt"
    EXPORT = "exp"
    TENANT = "ten"
    SESSION = "a conversation that was begun"
    TRANSCRIPT = "a conversation that was written down"
    IMPORT = "an import that was begun"

    PLACE = "where one list or stream of one user goes on"
    FILTER = "narrows what is the caller's own"
    FREE = "a name that each user gives away anew"
    NOTHING = "is the server's to say; counts for nothing in a request"
    MEMBER = "somebody of the tenant, or asked to join: tests/auth/test_members"
    TASK = "what an agent is given to do, three at once: tests/agents/test_tasks"
    END = "the end of whoever asks, whom the other tests still need: tests/privacy, tests/auth"
    SECRET = "speaks for whoever shows it: tests/abuse/test_tokens, tests/privacy"


IDS: Final = (
    Means.MEMORY,
    Means.ATTACHMENT,
    Means.MEDITATION,
    Means.JOB,
    Means.SCHEDULE,
    Means.GOAL,
    Means.LOG_IN,
    Means.API_KEY,
    Means.AGENT,
    Means.EXPORT,
    Means.TENANT,
)
"""What the server names, by ids that say the kind."""
NAMED: Final = (Means.SESSION, Means.TRANSCRIPT, Means.IMPORT)
"""What users name, each in a space of their own."""

TEXT: Final = frozenset(
    {
        "channels",
        "content",
        "content_hash",
        "content_type",
        "cron",
        "current_password",
        "display_name",
        "email",
        "embedding_model",
        "etag",
        "file_name",
        "kind",
        "name",
        "payload_json",
        "new_password",
        "password",
        "plan",
        "query",
        "scopes",
        "sha256",
        "speaker",
        "tags",
        "time_zone",
    }
)
"""Fields that name nothing that somebody has."""


def _kept(path: str) -> dict[str, Means]:
    return {
        f"{path}.id": Means.NOTHING,
        f"{path}.user_id": Means.NOTHING,
        f"{path}.session_id": Means.FREE,
    }


FIELDS: Final[Mapping[str, Mapping[str, Means]]] = {
    "RefreshToken": {"refresh_token": Means.SECRET},
    "LogOut": {"refresh_token": Means.SECRET},
    "SignUp": {"invitation": Means.SECRET},
    "ListMembers": {"page_token": Means.MEMBER},
    "AssignRole": {"user_id": Means.MEMBER},
    "DisableMember": {"user_id": Means.MEMBER},
    "EnableMember": {"user_id": Means.MEMBER},
    "RemoveMember": {"user_id": Means.MEMBER},
    "LogOutMember": {"user_id": Means.MEMBER},
    "RevokeInvitation": {"id": Means.MEMBER},
    "RevokeSession": {"id": Means.LOG_IN},
    "AcceptInvitation": {"invitation": Means.SECRET},
    "SwitchTenant": {"tenant_id": Means.TENANT},
    "LeaveTenant": {"tenant_id": Means.TENANT, "request_id": Means.END},
    "CreateApiKey": {"request_id": Means.FREE},
    "RotateApiKey": {"id": Means.API_KEY},
    "RevokeApiKey": {"id": Means.API_KEY},
    "ExchangeToken": {"api_key": Means.SECRET},
    "ResetPassword": {"token": Means.SECRET},
    "VerifyEmail": {"token": Means.SECRET},
    "CreateExport": {"request_id": Means.FREE},
    "CreateJob": {"request_id": Means.FREE},
    "GetExport": {"id": Means.EXPORT},
    "GetErasure": {"id": Means.END},
    "GetErasureReceipt": {"receipt_id": Means.SECRET},
    "ListAuditEvents": {"page_token": Means.PLACE, "user_id": Means.MEMBER},
    "ListAuditLinks": {"page_token": Means.PLACE},
    "UpdateUser": {"user.id": Means.NOTHING, "user.tenant_id": Means.NOTHING},
    "CreateMemory": {**_kept("memory"), "request_id": Means.FREE},
    "GetMemory": {"id": Means.MEMORY},
    "ListMemories": {"page_token": Means.PLACE, "session_id": Means.FILTER},
    "UpdateMemory": {
        "memory.id": Means.MEMORY,
        "memory.user_id": Means.NOTHING,
        "memory.session_id": Means.NOTHING,
    },
    "DeleteMemory": {"id": Means.MEMORY},
    "BatchCreateMemories": {**_kept("memories[]"), "request_id": Means.FREE},
    "ListMemoryVersions": {"id": Means.MEMORY, "page_token": Means.PLACE},
    "ArchiveMemory": {"id": Means.MEMORY},
    "RestoreMemory": {"id": Means.MEMORY},
    "ProtectMemory": {"id": Means.MEMORY},
    "GiveFeedback": {"id": Means.MEMORY},
    "QueryMemories": {"session_id": Means.FILTER, "embedding.model": Means.FILTER},
    "ImportMemories": {**_kept("memories[]"), "request_id": Means.FREE},
    "GetImport": {"request_id": Means.IMPORT},
    "WatchMemories": {"cursor": Means.PLACE},
    "UploadEmbeddings": {
        "embeddings[].memory_id": Means.MEMORY,
        "embeddings[].model": Means.FREE,
    },
    "DeleteEmbeddings": {"model": Means.FILTER},
    "CreateAttachment": {"memory_id": Means.MEMORY, "request_id": Means.FREE},
    "CompleteAttachment": {"id": Means.ATTACHMENT},
    "GetAttachment": {"id": Means.ATTACHMENT},
    "ListAttachments": {"memory_id": Means.MEMORY, "page_token": Means.PLACE},
    "DeleteAttachment": {"id": Means.ATTACHMENT},
    "AppendToSession": {"session_id": Means.FREE, "request_id": Means.FREE},
    "EndSession": {"session_id": Means.SESSION},
    "GetTranscript": {"session_id": Means.TRANSCRIPT},
    "DeleteTranscript": {"session_id": Means.TRANSCRIPT},
    "Meditate": {"request_id": Means.FREE},
    "GetMeditation": {"id": Means.MEDITATION},
    "ListMeditations": {"page_token": Means.PLACE},
    "UndoMeditation": {"id": Means.MEDITATION},
    "CreateGoal": {"goal.id": Means.NOTHING, "request_id": Means.FREE},
    "GetGoal": {"id": Means.GOAL},
    "ListGoals": {"page_token": Means.PLACE},
    "UpdateGoal": {"goal.id": Means.GOAL},
    "DeleteGoal": {"id": Means.GOAL},
    "GetJob": {"id": Means.JOB},
    "ListJobs": {"page_token": Means.PLACE},
    "RetryJob": {"id": Means.JOB},
    "CancelJob": {"id": Means.JOB},
    "WatchJob": {"id": Means.JOB},
    "CreateSchedule": {"request_id": Means.FREE},
    "GetSchedule": {"id": Means.SCHEDULE},
    "ListSchedules": {"page_token": Means.PLACE},
    "PauseSchedule": {"id": Means.SCHEDULE},
    "ResumeSchedule": {"id": Means.SCHEDULE},
    "DeleteSchedule": {"id": Means.SCHEDULE},
    "RegisterAgent": {"request_id": Means.FREE},
    "GetAgent": {"id": Means.AGENT},
    "DisableAgent": {"id": Means.AGENT},
    "EnableAgent": {"id": Means.AGENT},
    "DeleteAgent": {"id": Means.AGENT},
    "RotateAgentKey": {"id": Means.AGENT},
    "RunAgentTask": {
        "agent_id": Means.TASK,
        "summarize_session.session_id": Means.TASK,
        "request_id": Means.TASK,
    },
    "GetAgentTask": {"id": Means.TASK},
    "ListAgentTasks": {"agent_id": Means.AGENT, "page_token": Means.TASK},
    "CancelAgentTask": {"id": Means.TASK},
}
"""By method, and by the path of the field in its request."""

_MEMORY: Final = pb.Memory(content="mine now")
FILLED: Final[Mapping[str, Message]] = {
    "CreateMemory": pb.CreateMemoryRequest(memory=_MEMORY),
    "UpdateMemory": pb.UpdateMemoryRequest(
        memory=pb.Memory(speaker="me"), update_mask=FieldMask(paths=["speaker"])
    ),
    "BatchCreateMemories": pb.BatchCreateMemoriesRequest(memories=[_MEMORY]),
    "GiveFeedback": pb.GiveFeedbackRequest(rating=1),
    "CreateGoal": pb.CreateGoalRequest(goal=pb.Goal(content="mine")),
    "UpdateGoal": pb.UpdateGoalRequest(
        goal=pb.Goal(content="mine"), update_mask=FieldMask(paths=["content"])
    ),
    "QueryMemories": pb.QueryMemoriesRequest(
        query="mine",
        embedding=pb.QueryEmbedding(model="mine", values=[1, 2, 3]),
        # What is fresh changes from call to call; at one instant it does not.
        as_of_time=Timestamp(seconds=4_000_000_000),
    ),
    "ImportMemories": pb.ImportMemoriesRequest(memories=[_MEMORY], return_ids=True),
    "UploadEmbeddings": pb.UploadEmbeddingsRequest(
        embeddings=[pb.Embedding(model="mine", values=[1, 2, 3])]
    ),
    "CreateAttachment": pb.CreateAttachmentRequest(
        file_name="a",
        content_type="text/plain",
        size_bytes=1,
        sha256=hashlib.sha256(b"x").hexdigest(),
    ),
    "LeaveTenant": auth.LeaveTenantRequest(password=PASSWORD),
    "CreateApiKey": auth.CreateApiKeyRequest(name="a script", scopes=["memory.read"]),
    "RegisterAgent": agents.RegisterAgentRequest(
        name="a helper", kind=agents.AGENT_KIND_EXTERNAL, scopes=["memory.read"]
    ),
    "CreateJob": jobs.CreateJobRequest(kind="meditation.run", payload_json='{"dry_run": true}'),
    "CreateSchedule": jobs.CreateScheduleRequest(kind="embedding.batch", cron="0 0 1 1 *"),
    "UpdateUser": users.UpdateUserRequest(
        user=users.User(display_name="me"), update_mask=FieldMask(paths=["display_name"])
    ),
    "AppendToSession": pb.AppendToSessionRequest(
        session_id="ours", turns=[pb.SessionTurn(content="mine")]
    ),
}
"""What a request needs beside the names in it, so that nothing else is wrong with it."""

METHODS: Final = {method.name: method for method in public_methods()}


def fields_of(message: Descriptor, path: str = "") -> Iterator[str]:
    """Yield the paths of the strings of a request that are no mere text."""
    for field in message.fields:
        here = f"{path}{field.name}{'[]' if field.is_repeated else ''}"
        if field.message_type and field.message_type.file.package.startswith("kimberly."):
            yield from fields_of(field.message_type, f"{here}.")
        elif field.type in {field.TYPE_STRING, field.TYPE_BYTES} and field.name not in TEXT:
            yield here


def fields_that_mean(*means: Means) -> list[tuple[str, str]]:
    """Return methods and the paths of their fields."""
    return [
        (method, path)
        for method, fields in FIELDS.items()
        for path, meaning in fields.items()
        if meaning in means
    ]


def request_of(method: MethodDescriptor) -> Message:
    """Return a request that is complete but for the names in it."""
    request = message_factory.GetMessageClass(method.input_type)()
    if method.name in FILLED:
        request.CopyFrom(FILLED[method.name])
    return request


def put(request: Message, path: str, value: str) -> None:
    """Set a field of a request, in the first element of what is repeated."""
    *parents, last = path.split(".")
    holder: Any = request
    for parent in parents:
        holder = getattr(holder, parent.removesuffix("[]"))
        if parent.endswith("[]"):
            holder = holder[0]
    setattr(holder, last, value)


def shown(path: str) -> str:
    """Return how a refusal names a field of the first element."""
    return path.replace("[]", "[0]")
