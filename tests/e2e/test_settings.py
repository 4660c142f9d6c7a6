"""Settings through the edge, over gRPC and over REST."""

from __future__ import annotations

import grpc
import httpx
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from kimberly.memory.v1 import memory_pb2 as memory
from kimberly.users.v1 import users_pb2 as pb

from tests.mesh import User, eventually
from tests.refusals import Refusal
from tests.transports import Refused, Transport

OWN = pb.ScoringWeights(emotional_weight=0.25, recency_frequency=0.75)


async def refusal_of(call: Transport, request: Message) -> Refusal:
    with pytest.raises(Refused) as caught:
        await call(request)
    return caught.value.refusal


def change(settings: pb.Settings, *paths: str) -> pb.UpdateSettingsRequest:
    return pb.UpdateSettingsRequest(settings=settings, update_mask=FieldMask(paths=paths))


async def test_settings_are_changed_by_mask_and_etag(call: Transport) -> None:
    usual = (await call(pb.GetSettingsRequest())).settings
    assert (usual.language, usual.scoring_preset, usual.etag) == (
        pb.LANGUAGE_ENGLISH,
        pb.SCORING_PRESET_BALANCED,
        "v0",
    )
    wanted = pb.Settings(
        language=pb.LANGUAGE_FRENCH,
        scoring_weights=OWN,
        retrieval_weights=pb.RetrievalWeights(memory_score=0, speaker=0.5),
        quotas=pb.Quotas(short_term_bytes=1000, long_term_bytes=2000),
        retention=pb.Retention(short_term_hours=48),
        etag=usual.etag,
    )
    paths = (
        "scoring_weights",
        "retrieval_weights.memory_score",
        "quotas.long_term_bytes",
        "retention",
    )
    changed = (await call(change(wanted, *paths))).settings
    assert changed == pb.Settings(
        language=pb.LANGUAGE_ENGLISH,
        scoring_preset=pb.SCORING_PRESET_CUSTOM,
        scoring_weights=OWN,
        retrieval_weights=pb.RetrievalWeights(memory_score=0),
        quotas=pb.Quotas(long_term_bytes=2000),
        retention=pb.Retention(short_term_hours=48),
        etag="v1",
    )
    assert (await call(pb.GetSettingsRequest())).settings == changed
    refused = await refusal_of(call, change(wanted, "language"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    events = (await call(pb.ListAuditEventsRequest())).events
    assert [event.action for event in events].count("settings.update") == 1


async def test_bad_settings_are_refused_with_the_field_at_fault(call: Transport) -> None:
    for field, settings in {
        "settings.scoring_weights": pb.Settings(scoring_weights=pb.ScoringWeights()),
        "settings.scoring_weights.emotional_weight": pb.Settings(
            scoring_weights=pb.ScoringWeights(emotional_weight=2)
        ),
        "settings.retrieval_weights.freshness": pb.Settings(
            retrieval_weights=pb.RetrievalWeights(freshness=-1)
        ),
        "settings.language": pb.Settings(language=99),  # type: ignore[arg-type]
        "settings.quotas.permanent_bytes": pb.Settings(
            quotas=pb.Quotas(permanent_bytes=10 * 1024 * 1024 + 1)
        ),
        "settings.retention.short_term_hours": pb.Settings(
            retention=pb.Retention(short_term_hours=169)
        ),
    }.items():
        path = field.split(".")[1]
        refused = await refusal_of(call, change(settings, path))
        assert (refused.code, refused.fields) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))
    refused = await refusal_of(call, change(pb.Settings(), "etag"))
    assert refused.fields == ("update_mask",)


async def test_settings_in_json(user: User) -> None:
    body = {
        "scoringPreset": "SCORING_PRESET_RECENT",
        "language": "LANGUAGE_GERMAN",
        "quotas": {"shortTermBytes": 1000},
        "retention": {"archiveGraceDays": 7},
    }
    mask = "scoringPreset,language,quotas.shortTermBytes,retention"
    answer = await user.rest.raw("PATCH", "/v1/user/settings", body, {"updateMask": mask})
    assert answer.status_code == httpx.codes.OK, answer.text
    expected = {
        "language": "LANGUAGE_GERMAN",
        "scoringPreset": "SCORING_PRESET_RECENT",
        "scoringWeights": {
            "relevanceToGoals": 0.25,
            "emotionalWeight": 0.15,
            "predictiveValue": 0.2,
            "recencyFrequency": 0.4,
        },
        "retrievalWeights": {},
        "embeddingModel": "",
        "indexSensitive": False,
        "quotas": {"shortTermBytes": "1000"},
        "retention": {"archiveGraceDays": 7},
        "etag": "v1",
    }
    assert answer.json() == {"settings": expected}
    shown = await user.rest.raw("GET", "/v1/user/settings")
    assert shown.json() == {"settings": expected}


async def test_a_meditation_scores_by_the_user_s_own_weights(call: Transport) -> None:
    await call(change(pb.Settings(scoring_weights=OWN), "scoring_weights"))
    created = await call(
        memory.CreateMemoryRequest(memory=memory.Memory(content="I love this boat"))
    )
    run = (await call(memory.MeditateRequest(request_id="tonight"))).meditation

    async def look() -> memory.Meditation:
        seen: memory.Meditation = (await call(memory.GetMeditationRequest(id=run.id))).meditation
        return seen

    await eventually(look, lambda seen: seen.state == memory.MEDITATION_STATE_SUCCEEDED)
    score = (await call(memory.GetMemoryRequest(id=created.memory.id))).memory.score
    expected = 0.25 * score.emotional_weight + 0.75 * score.recency_frequency
    assert score.value == pytest.approx(expected, abs=1e-6)
    assert score.value != pytest.approx(0.5, abs=1e-3)
