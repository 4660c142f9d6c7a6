"""Memories embedded by a worker, questions by a service: both within the mesh."""

from __future__ import annotations

from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.billing.v1 import billing_pb2 as billing
from kimberly.memory.v1 import memory_pb2 as pb
from kimberly.users.v1 import users_pb2 as users

from tests.mesh import User, eventually
from tests.shipped_models import NARROW
from tests.transports import Transport

BREAD = "My grandmother bakes bread on Sundays."
HARBOUR = "The committee postponed its vote about the harbour."
QUESTION = pb.QueryMemoriesRequest(query="who makes loaves and cakes in an oven", top_k=1)


async def test_paraphrase_is_found_once_the_user_chose_a_model(call: Transport, user: User) -> None:
    for text in (BREAD, HARBOUR):
        await call(pb.CreateMemoryRequest(memory=pb.Memory(content=text)))
    by_words = await call(QUESTION)
    assert (by_words.semantic_model, list(by_words.matches)) == ("", [])

    await user.grpc(
        users.RecordConsentRequest(purpose=users.CONSENT_PURPOSE_MEMORY_EMBED, granted=True)
    )
    await call(
        users.UpdateSettingsRequest(
            settings=users.Settings(embedding_model=NARROW),
            update_mask=FieldMask(paths=["embedding_model"]),
        )
    )

    async def look() -> pb.QueryMemoriesResponse:
        answer: pb.QueryMemoriesResponse = await call(QUESTION)
        return answer

    answer = await eventually(look, lambda answer: bool(answer.matches))
    (best,) = answer.matches
    assert (answer.semantic_model, best.memory.content) == (NARROW, BREAD)
    assert (best.lexical, best.reason) == (0, "is close in meaning")
    (month,) = (await call(billing.ListUsageRequest())).months
    assert month.used.embeddings == 2
