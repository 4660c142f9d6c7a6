"""What the scoring stream refuses."""

from __future__ import annotations

from typing import Any

import asyncpg
import grpc
import numpy as np
import pytest
from kimberly.scoring.v1 import scoring_pb2 as pb
from kimberly.scoring.v1 import scoring_pb2_grpc as rpc

from server import ids
from server.caller import Caller
from server.database import Database
from server.memory.meditation_store import MeditationStore
from tests.conftest import bearer
from tests.memory.scoring_calls import (
    refusal_of_stream,
    scores,
    scoring_stream,
)
from tests.refusals import refusal_of
from tests.remembering import remember


@pytest.mark.parametrize(
    ("others", "field"),
    [
        ({"sequence": 2}, "scores.sequence"),
        ({"score": b"\0" * 4}, "scores"),
        ({"score": b"\0" * 7}, "scores.score"),
        ({"score": np.array([0.5, 1.5], "<f4").tobytes()}, "scores"),
        ({"score": np.array([0.5, np.nan], "<f4").tobytes()}, "scores"),
        ({"relevance_to_goals": np.array([0.5, -0.5], "<f4").tobytes()}, "scores"),
        ({"sentiment": np.array([0.5, np.inf], "<f4").tobytes()}, "scores"),
    ],
)
async def test_scores_that_make_no_sense_are_refused(
    scoring: rpc.ScoringServiceAsyncStub,
    meditations: MeditationStore,
    database: Database,
    caller: Caller,
    owner: asyncpg.Connection,
    others: dict[str, Any],
    field: str,
) -> None:
    await remember(database, caller, "a", "b")
    run = await meditations.start(caller, "")
    async with scoring_stream(scoring) as stream:
        await stream.open(run.id)
        await stream.answer(await stream.batch(), **others)
        assert await refusal_of_stream(stream) == ("FIELD_INVALID", (field,))
    assert [row[1] for row in await scores(owner, caller)] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"token": 0}, "open.lease_token"),
        ({"window": 0}, "open.window"),
        ({"window": 17}, "open.window"),
        ({"size": 0}, "open.batch_size"),
        ({"size": 65_537}, "open.batch_size"),
    ],
)
async def test_opening_that_makes_no_sense_is_refused(
    scoring: rpc.ScoringServiceAsyncStub, arguments: dict[str, int], field: str
) -> None:
    async with scoring_stream(scoring) as stream:
        await stream.open(ids.new_id(), **arguments)
        assert await refusal_of_stream(stream) == ("FIELD_INVALID", (field,))


async def test_shard_that_is_none_is_not_found(
    scoring: rpc.ScoringServiceAsyncStub, meditations: MeditationStore, caller: Caller
) -> None:
    run = await meditations.start(caller, "")
    for meditation_id, shard in ((run.id, 1), (run.id, -1), (ids.new_id(), 0)):
        async with scoring_stream(scoring) as stream:
            await stream.open(meditation_id, shard=shard)
            assert await refusal_of_stream(stream) == ("RESOURCE_NOT_FOUND", ())


async def test_users_may_not_score(scoring: rpc.ScoringServiceAsyncStub, caller: Caller) -> None:
    refusal = await refusal_of(
        scoring.PlanMeditation(
            pb.PlanMeditationRequest(job_id=ids.show(ids.JOB, ids.new_id())),
            metadata=bearer(caller),
        )
    )
    assert refusal.code == grpc.StatusCode.PERMISSION_DENIED
