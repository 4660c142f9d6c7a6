"""Conversations told to the mesh through its public API, and questions asked through it."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from kimberly.client import Client, connect
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.memory.v1 import memory_pb2_grpc
from kimberly.users.v1 import users_pb2 as users

from bench.conversations import MODEL, Conversation, Question, Turn
from bench.judging import DEPTH, Answer
from bench.progress import step
from local.mesh import Mesh

Stub: TypeAlias = "memory_pb2_grpc.MemoryServiceAsyncStub"
Place = tuple[str, int]
"""Session and position."""

_CHUNK = 200
_PAGE = 1_000
_VECTORS_AT_ONCE = 500
_PURPOSES = (users.CONSENT_PURPOSE_MEMORY_STORE, users.CONSENT_PURPOSE_MEMORY_EMBED)


@dataclass(frozen=True, slots=True, eq=False)
class Teller:
    """A user of the mesh whose memories are the turns of one conversation."""

    conversation: Conversation
    user_id: str
    client: Client
    turn_at: Mapping[Place, str]

    async def ask(
        self, stub: Stub, question: Question, *, by_meaning: bool, top_k: int = DEPTH
    ) -> Answer:
        """Ask one question through a stub and take the time."""
        request = memory.QueryMemoriesRequest(query=question.text, top_k=top_k)
        if by_meaning:
            assert question.vector is not None
            request.embedding.model = MODEL
            request.embedding.values.extend(question.vector.tolist())
        metadata = (("authorization", f"Bearer {self.client.access_token}"),)
        started = time.perf_counter()
        answer = await stub.QueryMemories(request, metadata=metadata)
        seconds = time.perf_counter() - started
        found = [match.memory for match in answer.matches]
        return Answer(
            [self.turn_at[one.session_id, one.session_position] for one in found], seconds
        )


@asynccontextmanager
async def tell(
    mesh: Mesh, conversations: Sequence[Conversation], step_name: str
) -> AsyncIterator[list[Teller]]:
    """Sign up a user a conversation and import its turns, and their vectors if there are any."""
    async with AsyncExitStack() as stack:
        tellers = []
        turns = sum(len(conversation.turns) for conversation in conversations)
        with step(step_name, turns) as advance:
            for conversation in conversations:
                client = await stack.enter_async_context(connect(address(mesh), mesh.ca))
                tellers.append(await _tell(client, conversation))
                advance(len(conversation.turns))
        yield tellers


@asynccontextmanager
async def bare_stub(mesh: Mesh) -> AsyncIterator[Stub]:
    """Open a connection of its own that does nothing but call."""
    credentials = grpc.ssl_channel_credentials(mesh.ca.read_bytes())
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(address(mesh), credentials, options=options) as channel:
        yield memory_pb2_grpc.MemoryServiceStub(channel)


def address(mesh: Mesh) -> str:
    """Return host and port of the edge."""
    return mesh.edge.removeprefix("https://")


async def _tell(client: Client, conversation: Conversation) -> Teller:
    email = f"{conversation.name}-{secrets.token_hex(6)}@example.com"
    account = await client.sign_up(email, secrets.token_hex(12))
    for purpose in _PURPOSES:
        await client.users.RecordConsent(users.RecordConsentRequest(purpose=purpose, granted=True))
    outcome = await client.memory.ImportMemories(_chunks(conversation.turns))
    assert outcome.created == len(conversation.turns), outcome
    if conversation.turns[0].vector is not None:
        await _upload_vectors(client, conversation)
    turn_at = {(turn.session, turn.position): turn.id for turn in conversation.turns}
    return Teller(conversation, account.user_id, client, turn_at)


async def _chunks(turns: Sequence[Turn]) -> AsyncIterator[memory.ImportMemoriesRequest]:
    for start in range(0, len(turns), _CHUNK):
        memories = [_to_memory(turn) for turn in turns[start : start + _CHUNK]]
        yield memory.ImportMemoriesRequest(first_index=start, memories=memories)


def _to_memory(turn: Turn) -> memory.Memory:
    occurred = Timestamp()
    occurred.FromDatetime(turn.said_at)
    return memory.Memory(
        content=turn.text,
        session_id=turn.session,
        session_position=turn.position,
        speaker=turn.speaker,
        occur_time=occurred,
    )


async def _upload_vectors(client: Client, conversation: Conversation) -> None:
    kept = await _kept(client)
    vectors = []
    for turn in conversation.turns:
        assert turn.vector is not None
        one = kept[turn.session, turn.position]
        vectors.append(
            memory.Embedding(
                memory_id=one.id,
                model=MODEL,
                values=turn.vector.tolist(),
                content_hash=one.content_hash,
            )
        )
    for start in range(0, len(vectors), _VECTORS_AT_ONCE):
        batch = vectors[start : start + _VECTORS_AT_ONCE]
        request = memory.UploadEmbeddingsRequest(embeddings=batch)
        outcome = await client.memory.UploadEmbeddings(request)
        assert outcome.stored == len(batch), outcome


async def _kept(client: Client) -> dict[Place, memory.Memory]:
    """Return everything that the user keeps."""
    kept: dict[Place, memory.Memory] = {}
    token = ""
    while True:
        page = await client.memory.ListMemories(
            memory.ListMemoriesRequest(page_size=_PAGE, page_token=token)
        )
        kept |= {(one.session_id, one.session_position): one for one in page.memories}
        token = page.next_page_token
        if not token:
            return kept
