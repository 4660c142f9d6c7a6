"""What somebody has: one of everything that a request can name, in every state it can be in."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Final

import httpx
from kimberly.agents.v1 import agents_pb2 as agents
from kimberly.auth.v1 import auth_pb2 as auth
from kimberly.jobs.v1 import jobs_pb2 as jobs
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.privacy.v1 import privacy_pb2 as privacy
from kimberly.users.v1 import users_pb2 as users

from tests.abuse.meanings import Means
from tests.mesh import PASSWORD, User, eventually

FILE: Final = b"x"
SHARED: Final = "shared"
MODEL: Final = "words"

Make = Callable[[User], Awaitable[str]]


async def keep(user: User, **fields: object) -> str:
    """Make a memory and return its id."""
    content = f"{fields.pop('content', 'mine')} {secrets.token_hex(4)}"
    memory = pb.Memory(content=content, **fields)  # type: ignore[arg-type]
    kept: str = (await user.grpc(pb.CreateMemoryRequest(memory=memory))).memory.id
    return kept


async def archive(user: User, **fields: object) -> str:
    """Make a memory, put it away, and return its id."""
    kept = await keep(user, **fields)
    await user.grpc(pb.ArchiveMemoryRequest(id=kept))
    return kept


async def delete(user: User) -> str:
    """Make a memory, delete it for good, and return the id that it had."""
    kept = await keep(user)
    await user.grpc(pb.DeleteMemoryRequest(id=kept))
    return kept


async def announce(user: User) -> str:
    """Announce an attachment and return its id."""
    return (await _announced(user)).attachment.id


async def attach(user: User) -> str:
    """Upload an attachment and return its id."""
    announced = await _announced(user)
    async with httpx.AsyncClient(trust_env=False) as s3:
        (await s3.put(announced.upload_url, content=FILE)).raise_for_status()
    await user.grpc(pb.CompleteAttachmentRequest(id=announced.attachment.id))
    return announced.attachment.id


async def meditate(user: User) -> str:
    """Run a meditation to its end and return its id."""
    run: str = (await user.grpc(pb.MeditateRequest())).meditation.id

    async def look() -> pb.MeditationState.ValueType:
        shown = await user.grpc(pb.GetMeditationRequest(id=run))
        state: pb.MeditationState.ValueType = shown.meditation.state
        return state

    await eventually(look, lambda state: state == pb.MEDITATION_STATE_SUCCEEDED)
    return run


async def aim(user: User) -> str:
    """Keep a goal and return its id."""
    goal = pb.Goal(content=f"mine {secrets.token_hex(4)}")
    kept: str = (await user.grpc(pb.CreateGoalRequest(goal=goal))).goal.id
    return kept


async def work(user: User) -> str:
    """Have a job done and return its id."""
    await meditate(user)

    async def look() -> jobs.Job:
        newest: jobs.Job = (await user.grpc(jobs.ListJobsRequest(page_size=1))).jobs[0]
        return newest

    # A meditation is over before its worker has settled the job.
    job = await eventually(look, lambda job: job.state == jobs.JOB_STATE_SUCCEEDED)
    return job.id


async def schedule(user: User) -> str:
    """Make a schedule and return its id."""
    request = jobs.CreateScheduleRequest(kind="embedding.batch", cron="0 0 1 1 *")
    made: str = (await user.grpc(request)).schedule.id
    return made


async def export(user: User) -> str:
    """Ask for an export, or for the one that is under way, and return its id."""
    asked: str = (await user.grpc(privacy.CreateExportRequest())).export.id
    return asked


async def talk(user: User) -> str:
    """Begin a conversation and return what it is called."""
    name = secrets.token_hex(4)
    turns = [pb.SessionTurn(content=f"hello {name}")]
    await user.grpc(pb.AppendToSessionRequest(session_id=name, turns=turns))
    return name


async def write_down(user: User) -> str:
    """End a conversation with a transcript and return what it is called."""
    name = await talk(user)
    await user.grpc(pb.EndSessionRequest(session_id=name, write_transcript=True))
    return name


async def import_(user: User) -> str:
    """Import a memory and return the id of the request."""
    name = secrets.token_hex(4)
    memories = [pb.Memory(content=f"imported {name}")]
    await user.grpc(pb.ImportMemoriesRequest(request_id=name, memories=memories))
    return name


async def log_in(user: User) -> str:
    """Log in once more and return the id of the session."""
    await user.grpc(auth.LogInRequest(email=user.email, password=PASSWORD))
    session: str = (await user.grpc(auth.ListSessionsRequest())).sessions[0].id
    return session


async def make_key(user: User) -> str:
    """Make an API key and return its id."""
    request = auth.CreateApiKeyRequest(name="a script", scopes=["memory.read"])
    key: str = (await user.grpc(request)).api_key.id
    return key


async def employ(user: User) -> str:
    """Register an agent and return its id."""
    request = agents.RegisterAgentRequest(
        name="a helper", kind=agents.AGENT_KIND_EXTERNAL, scopes=["memory.read"]
    )
    agent_id: str = (await user.grpc(request)).agent.id
    return agent_id


async def idle(user: User) -> str:
    """Register an agent and disable it."""
    agent_id = await employ(user)
    await user.grpc(agents.DisableAgentRequest(id=agent_id))
    return agent_id


async def belong(user: User) -> str:
    """Return the tenant that a user is at home in."""
    return user.tenant_id


STATES: Final[Mapping[Means, Mapping[str, Make]]] = {
    Means.MEMORY: {
        "long-term": keep,
        "short-term": lambda user: keep(user, tier=pb.TIER_SHORT_TERM),
        "permanent": lambda user: keep(user, tier=pb.TIER_PERMANENT),
        "sensitive": lambda user: keep(user, sensitive=True),
        SHARED: lambda user: keep(user, scope=pb.SCOPE_SHARED),
        "shared and short-term": lambda user: keep(
            user, scope=pb.SCOPE_PUBLIC, tier=pb.TIER_SHORT_TERM
        ),
        "shared and archived": lambda user: archive(user, scope=pb.SCOPE_SHARED),
        "archived": archive,
        "deleted": delete,
    },
    Means.ATTACHMENT: {"pending": announce, "complete": attach},
    Means.MEDITATION: {"over": meditate},
    Means.GOAL: {"kept": aim},
    Means.JOB: {"done": work},
    Means.SCHEDULE: {"made": schedule},
    Means.API_KEY: {"living": make_key},
    Means.AGENT: {"enabled": employ, "disabled": idle},
    Means.LOG_IN: {"going on": log_in},
    Means.EXPORT: {"asked for": export},
    Means.TENANT: {"belonged to": belong},
    Means.SESSION: {"begun": talk, "ended": write_down},
    Means.TRANSCRIPT: {"written": write_down},
    Means.IMPORT: {"begun": import_},
}
"""How to make what a field can name, by the state in which it is then."""


@dataclass(frozen=True, slots=True)
class Estate:
    """All that somebody has."""

    user: User
    names: Mapping[Means, Mapping[str, str]]
    """What can be named, by its state."""

    def ids(self) -> set[str]:
        """Return the ids of everything."""
        return {name for states in self.names.values() for name in states.values()}


async def settle(user: User) -> Estate:
    """Give somebody one of everything."""
    await agree(user, users.CONSENT_PURPOSE_MEMORY_SENSITIVE)
    await embed(user)
    names = {
        means: {state: await make(user) for state, make in states.items()}
        for means, states in STATES.items()
    }
    return Estate(user, names)


async def agree(user: User, purpose: users.ConsentPurpose.ValueType) -> None:
    """Consent to a purpose."""
    await user.grpc(users.RecordConsentRequest(purpose=purpose, granted=True))


async def embed(user: User) -> None:
    """Give a user a memory with a vector."""
    await agree(user, users.CONSENT_PURPOSE_MEMORY_EMBED)
    vector = pb.Embedding(memory_id=await keep(user), model=MODEL, values=[1, 0])
    await user.grpc(pb.UploadEmbeddingsRequest(embeddings=[vector]))


async def look_at(estate: Estate) -> list[object]:
    """Return what others might have changed."""
    user, seen = estate.user, list[object]()
    for state, name in estate.names[Means.MEMORY].items():
        if state != "deleted":
            memory = (await user.grpc(pb.GetMemoryRequest(id=name))).memory
            versions = (await user.grpc(pb.ListMemoryVersionsRequest(id=name))).versions
            feedback = memory.HasField("feedback")
            seen.append((memory.content, memory.state, memory.protected, feedback, len(versions)))
    for name in estate.names[Means.ATTACHMENT].values():
        seen.append((await user.grpc(pb.GetAttachmentRequest(id=name))).attachment)
    for name in estate.names[Means.GOAL].values():
        seen.append((await user.grpc(pb.GetGoalRequest(id=name))).goal)
    for name in estate.names[Means.TRANSCRIPT].values():
        seen.append((await user.grpc(pb.GetTranscriptRequest(session_id=name))).transcript)
    sessions = (await user.grpc(auth.ListSessionsRequest())).sessions
    seen.append(estate.names[Means.LOG_IN]["going on"] in {each.id for each in sessions})
    keys = (await user.grpc(auth.ListApiKeysRequest())).api_keys
    seen += [each for each in keys if each.id == estate.names[Means.API_KEY]["living"]]
    for name in estate.names[Means.AGENT].values():
        seen.append((await user.grpc(agents.GetAgentRequest(id=name))).agent)
    for name in estate.names[Means.IMPORT].values():
        seen.append((await user.grpc(pb.GetImportRequest(request_id=name))).progress)
    turns = pb.ListMemoriesRequest(session_id=estate.names[Means.SESSION]["begun"])
    seen.append(len((await user.grpc(turns)).memories))
    asked = pb.QueryEmbedding(model=MODEL, values=[1, 0])
    found = await user.grpc(pb.QueryMemoriesRequest(query="mine", embedding=asked))
    seen.append(any(match.semantic for match in found.matches))
    return seen


async def _announced(user: User) -> pb.CreateAttachmentResponse:
    memory_id = await keep(user)
    announced: pb.CreateAttachmentResponse = await user.grpc(
        pb.CreateAttachmentRequest(
            memory_id=memory_id,
            file_name="a",
            content_type="text/plain",
            size_bytes=len(FILE),
            sha256=hashlib.sha256(FILE).hexdigest(),
        )
    )
    return announced
