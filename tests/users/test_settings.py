"""Settings: defaults, changes by mask, what is refused, and who sees them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from kimberly.users.v1 import users_pb2 as pb

from server import ids
from server.caller import Caller
from server.database import Database, SystemDatabase
from server.preferences import (
    PRESETS,
    Language,
    Preferences,
    Quotas,
    Retention,
    RetrievalWeights,
    ScoringPreset,
    ScoringWeights,
    preferences,
    weights_of_users,
)
from tests.conftest import bearer, new_caller
from tests.refusals import Refusal, refusal_of
from tests.users.conftest import Users

OWN = pb.ScoringWeights(
    relevance_to_goals=0.1, emotional_weight=0.2, predictive_value=0.3, recency_frequency=0.4
)
NAN = float("nan")


def change(*paths: str, **fields: Any) -> pb.UpdateSettingsRequest:
    return pb.UpdateSettingsRequest(
        settings=pb.Settings(**fields), update_mask=FieldMask(paths=paths)
    )


def weighing(*numbers: float) -> pb.ScoringWeights:
    return pb.ScoringWeights(**dict(zip(ScoringWeights._fields, numbers, strict=True)))


async def get(users: Users, caller: Caller) -> pb.Settings:
    return (await users.GetSettings(pb.GetSettingsRequest(), metadata=bearer(caller))).settings


async def update(users: Users, caller: Caller, *paths: str, **fields: Any) -> pb.Settings:
    answer = await users.UpdateSettings(change(*paths, **fields), metadata=bearer(caller))
    return answer.settings


async def refusal(users: Users, caller: Caller, *paths: str, **fields: Any) -> Refusal:
    request = change(*paths, **fields)
    return await refusal_of(users.UpdateSettings(request, metadata=bearer(caller)))


# --- defaults


async def test_a_user_who_never_chose_has_the_defaults_and_reading_writes_nothing(
    users: Users, database: Database, owner: asyncpg.Connection
) -> None:
    stranger = await new_caller(database, consenting=False)
    assert await get(users, stranger) == pb.Settings(
        language=pb.LANGUAGE_ENGLISH,
        scoring_preset=pb.SCORING_PRESET_BALANCED,
        scoring_weights=weighing(0.40, 0.30, 0.20, 0.10),
        retrieval_weights=pb.RetrievalWeights(),
        quotas=pb.Quotas(),
        retention=pb.Retention(),
        etag="v0",
    )
    assert await owner.fetchval("SELECT count(*) FROM settings") == 0
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 0


def test_the_weights_of_every_preset_add_up_to_one() -> None:
    assert set(PRESETS) == set(ScoringPreset) - {ScoringPreset.CUSTOM}
    for preset, weights in PRESETS.items():
        assert sum(weights) == pytest.approx(1, abs=1e-12), preset


# --- changes


async def test_a_change_stays_and_touches_only_what_the_mask_names(
    users: Users, caller: Caller
) -> None:
    first = await update(
        users,
        caller,
        "language",
        language=pb.LANGUAGE_GERMAN,
        scoring_preset=pb.SCORING_PRESET_RECENT,
    )
    assert (first.language, first.scoring_preset) == (
        pb.LANGUAGE_GERMAN,
        pb.SCORING_PRESET_BALANCED,
    )
    assert await get(users, caller) == first
    second = await update(
        users, caller, "retrieval_weights", retrieval_weights=pb.RetrievalWeights(semantic=0)
    )
    assert second.language == pb.LANGUAGE_GERMAN
    assert second.retrieval_weights == pb.RetrievalWeights(semantic=0)
    assert len({first.etag, second.etag}) == 2


@pytest.mark.parametrize("language", [name for name in pb.Language.values() if name])
async def test_every_language_can_be_chosen(users: Users, caller: Caller, language: int) -> None:
    assert (await update(users, caller, "language", language=language)).language == language
    assert (await get(users, caller)).language == language


@pytest.mark.parametrize(
    ("preset", "weights"),
    [
        (pb.SCORING_PRESET_BALANCED, weighing(0.40, 0.30, 0.20, 0.10)),
        (pb.SCORING_PRESET_FACTUAL, weighing(0.50, 0.10, 0.30, 0.10)),
        (pb.SCORING_PRESET_EMOTIONAL, weighing(0.25, 0.50, 0.15, 0.10)),
        (pb.SCORING_PRESET_RECENT, weighing(0.25, 0.15, 0.20, 0.40)),
    ],
)
async def test_a_preset_sets_the_weights(
    users: Users, caller: Caller, preset: pb.ScoringPreset.ValueType, weights: pb.ScoringWeights
) -> None:
    await update(users, caller, "scoring_weights", scoring_weights=OWN)
    changed = await update(users, caller, "scoring_preset", scoring_preset=preset)
    assert (changed.scoring_preset, changed.scoring_weights) == (preset, weights)
    both = ("scoring_preset", "scoring_weights")
    assert (
        await update(users, caller, *both, scoring_preset=preset, scoring_weights=weights)
    ).scoring_weights == weights


@pytest.mark.parametrize("paths", [("scoring_weights",), ("scoring_weights", "scoring_preset")])
async def test_explicit_weights_are_custom(
    users: Users, caller: Caller, paths: tuple[str, ...]
) -> None:
    changed = await update(
        users, caller, *paths, scoring_weights=OWN, scoring_preset=pb.SCORING_PRESET_CUSTOM
    )
    assert (changed.scoring_preset, changed.scoring_weights) == (pb.SCORING_PRESET_CUSTOM, OWN)
    assert await get(users, caller) == changed


@pytest.mark.parametrize(
    "numbers",
    [
        (1.0, 0.0, 0.0, 0.0),
        (0.25, 0.25, 0.25, 0.25),
        (0.4, 0.3, 0.2, 0.101),
        (0.4, 0.3, 0.2, 0.099),
        (0.333, 0.333, 0.333, 0.0),
    ],
)
async def test_weights_may_miss_one_by_a_thousandth(
    users: Users, caller: Caller, numbers: tuple[float, ...]
) -> None:
    weights = weighing(*numbers)
    changed = await update(users, caller, "scoring_weights", scoring_weights=weights)
    assert changed.scoring_weights == weights


async def test_one_retrieval_weight_changes_alone_and_goes_back_to_the_default(
    users: Users, caller: Caller
) -> None:
    chosen = pb.RetrievalWeights(
        semantic=0.5, speaker=0.25, memory_score=1, freshness=0, session=0.2
    )
    await update(users, caller, "retrieval_weights", retrieval_weights=chosen)
    changed = await update(
        users,
        caller,
        "retrieval_weights.speaker",
        "retrieval_weights.freshness",
        retrieval_weights=pb.RetrievalWeights(speaker=0.75, semantic=0.125),
    )
    expected = pb.RetrievalWeights(semantic=0.5, speaker=0.75, memory_score=1, session=0.2)
    assert changed.retrieval_weights == expected
    assert (await get(users, caller)).retrieval_weights == expected


@pytest.mark.parametrize("model", ["m", "wordllama-256", "名前 1", "m" * 64])
async def test_a_local_model_is_chosen_by_name(users: Users, caller: Caller, model: str) -> None:
    assert (await update(users, caller, "embedding_model", embedding_model=model)) == await get(
        users, caller
    )
    other = await update(users, caller, "language", language=pb.LANGUAGE_GERMAN)
    assert other.embedding_model == model


async def test_what_is_named_and_not_given_goes_back_to_its_default(
    users: Users, caller: Caller
) -> None:
    fields: dict[str, Any] = {
        "language": pb.LANGUAGE_FRENCH,
        "scoring_weights": OWN,
        "retrieval_weights": pb.RetrievalWeights(semantic=0.5),
        "embedding_model": "local",
    }
    await update(users, caller, *fields, **fields)
    changed = await update(users, caller, *fields)
    defaults = await get(users, Caller(caller.tenant_id, ids.new_id()))
    changed.etag = defaults.etag
    assert changed == defaults
    await update(users, caller, "scoring_weights", scoring_weights=OWN)
    changed = await update(users, caller, "scoring_preset")
    assert changed.scoring_preset == pb.SCORING_PRESET_BALANCED


# --- quotas and retention


async def test_one_quota_and_one_time_change_alone(users: Users, caller: Caller) -> None:
    quotas = pb.Quotas(short_term_bytes=1000, long_term_bytes=0, permanent_bytes=10 * 1024 * 1024)
    times = pb.Retention(short_term_hours=168, long_term_days=36_500, archive_grace_days=365)
    changed = await update(users, caller, "quotas", "retention", quotas=quotas, retention=times)
    assert (changed.quotas, changed.retention) == (quotas, times)
    assert await get(users, caller) == changed
    changed = await update(
        users,
        caller,
        "quotas.long_term_bytes",
        "quotas.permanent_bytes",
        "retention.short_term_hours",
        quotas=pb.Quotas(short_term_bytes=1, long_term_bytes=5),
        retention=pb.Retention(short_term_hours=2, long_term_days=9),
    )
    assert changed.quotas == pb.Quotas(short_term_bytes=1000, long_term_bytes=5)
    assert changed.retention == pb.Retention(
        short_term_hours=2, long_term_days=36_500, archive_grace_days=365
    )
    assert await get(users, caller) == changed


async def test_quotas_act_in_the_database(users: Users, caller: Caller, database: Database) -> None:
    await update(users, caller, "quotas", quotas=pb.Quotas(short_term_bytes=7))
    async with database.transaction(caller) as connection:
        quotas = await connection.fetchrow(
            "SELECT * FROM quotas_of($1, $2)", caller.tenant_id, caller.user_id
        )
    assert (quotas["short_term_bytes"], quotas["long_term_bytes"]) == (7, 2 * 1024 * 1024)


@pytest.mark.parametrize(
    ("plan", "limits"),
    [
        ("free", (512 * 1024, 2 * 1024**2, 10 * 1024**2)),
        ("premium", (4 * 1024**2, 64 * 1024**2, 256 * 1024**2)),
    ],
)
async def test_a_quota_above_the_plan_s_is_refused_with_the_plan_s(
    users: Users,
    caller: Caller,
    owner: asyncpg.Connection,
    plan: str,
    limits: tuple[int, int, int],
) -> None:
    await owner.execute(
        "INSERT INTO subscriptions VALUES ($1, $2, $3)", caller.tenant_id, caller.user_id, plan
    )
    for name, limit in zip(Quotas.__slots__, limits, strict=True):
        path = f"quotas.{name}"
        refused = await refusal(users, caller, path, quotas=pb.Quotas(**{name: limit + 1}))
        assert refused.fields == (f"settings.{path}",)
        assert f"must be 0 to {limit}" in refused.message
        changed = await update(users, caller, path, quotas=pb.Quotas(**{name: limit}))
        assert getattr(changed.quotas, name) == limit


async def test_a_smaller_plan_leaves_what_was_chosen_and_only_that_can_be_lowered(
    users: Users, caller: Caller, owner: asyncpg.Connection
) -> None:
    await owner.execute(
        "INSERT INTO subscriptions VALUES ($1, $2, 'premium')", caller.tenant_id, caller.user_id
    )
    chosen = pb.Quotas(short_term_bytes=1024**2)
    await update(users, caller, "quotas", quotas=chosen)
    await owner.execute("UPDATE subscriptions SET plan = 'free'")
    assert (await get(users, caller)).quotas == chosen
    # What is not named is not compared with the plan.
    changed = await update(users, caller, "language", language=pb.LANGUAGE_GERMAN)
    assert changed.quotas == chosen


# --- lost updates, audit, other users


async def test_a_stale_etag_is_refused_and_changes_nothing(users: Users, caller: Caller) -> None:
    read = await get(users, caller)
    german = await update(users, caller, "language", language=pb.LANGUAGE_GERMAN, etag=read.etag)
    for stale in (read.etag, "v7", "v", "1", "v-1", "v٣", "v" + "9" * 30):
        refused = await refusal(users, caller, "language", language=pb.LANGUAGE_ITALIAN, etag=stale)
        assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert await get(users, caller) == german
    await update(users, caller, "language", language=pb.LANGUAGE_ITALIAN, etag=german.etag)


@pytest.mark.parametrize("is_first", [True, False])
async def test_of_changes_at_once_under_one_etag_one_is_made(
    users: Users, caller: Caller, owner: asyncpg.Connection, *, is_first: bool
) -> None:
    if not is_first:
        await update(users, caller, "language", language=pb.LANGUAGE_FRENCH)
    etag = (await get(users, caller)).etag
    answers = await asyncio.gather(
        *(
            update(users, caller, "language", language=pb.LANGUAGE_GERMAN, etag=etag)
            for _ in range(8)
        ),
        return_exceptions=True,
    )
    assert sum(isinstance(answer, pb.Settings) for answer in answers) == 1
    assert await owner.fetchval("SELECT count(*) FROM audit_events") == 2 - is_first


async def test_changes_at_once_of_different_fields_are_all_kept(
    users: Users, caller: Caller
) -> None:
    names = RetrievalWeights.__slots__
    await asyncio.gather(
        *(
            update(
                users,
                caller,
                f"retrieval_weights.{name}",
                retrieval_weights=pb.RetrievalWeights(**{name: 0.5}),
            )
            for name in names
        )
    )
    kept = await get(users, caller)
    assert kept.retrieval_weights == pb.RetrievalWeights(**dict.fromkeys(names, 0.5))
    assert kept.etag == f"v{len(names)}"


async def test_a_change_is_audited_and_a_refused_one_is_not(users: Users, caller: Caller) -> None:
    await update(users, caller, "language", language=pb.LANGUAGE_SPANISH)
    await refusal(users, caller, "language", language=pb.LANGUAGE_GERMAN, etag="v0")
    events = (
        await users.ListAuditEvents(pb.ListAuditEventsRequest(), metadata=bearer(caller))
    ).events
    me = ids.show(ids.USER, caller.user_id)
    assert [(event.action, event.resource, event.actor) for event in events] == [
        ("settings.update", me, me)
    ]


async def test_settings_are_everyone_s_own(users: Users, database: Database) -> None:
    ada, bob = [await new_caller(database) for _ in range(2)]
    await update(users, ada, "language", language=pb.LANGUAGE_GERMAN)
    assert (await get(users, bob)).language == pb.LANGUAGE_ENGLISH
    async with database.transaction(bob) as connection:
        assert await connection.fetchval("SELECT count(*) FROM settings") == 0
        assert await connection.execute("UPDATE settings SET language = 'simple'") == "UPDATE 0"
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with database.transaction(bob) as connection:
            await connection.execute(
                """
                INSERT INTO settings
                SELECT $1, $2, 'simple', 'custom', 1, 0, 0, 0, NULL, NULL, NULL, NULL, 1
                """,
                ada.tenant_id,
                ids.new_id(),
            )


async def test_nobody_s_settings_are_shown_without_a_token(users: Users) -> None:
    for call in (users.GetSettings(pb.GetSettingsRequest()), users.UpdateSettings(change())):
        assert (await refusal_of(call)).code is grpc.StatusCode.UNAUTHENTICATED


# --- what is refused


@pytest.mark.parametrize(
    "paths",
    [(), ("etag",), ("*",), ("language", "quota"), ("scoring_weights.emotional_weight",)],
)
async def test_a_mask_that_names_no_settings_is_refused(
    users: Users, caller: Caller, paths: tuple[str, ...]
) -> None:
    refused = await refusal(users, caller, *paths, language=pb.LANGUAGE_GERMAN)
    assert (refused.code, refused.fields) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ("update_mask",),
    )


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("language", {"language": 99}),
        ("scoring_preset", {"scoring_preset": 99}),
        ("scoring_weights", {"scoring_preset": pb.SCORING_PRESET_CUSTOM}),
        ("scoring_weights", {"scoring_weights": pb.ScoringWeights()}),
        ("scoring_weights", {"scoring_weights": weighing(0.4, 0.3, 0.2, 0.1012)}),
        ("scoring_weights", {"scoring_weights": weighing(0.4, 0.3, 0.2, 0.0988)}),
        ("scoring_weights", {"scoring_weights": weighing(1, 1, 1, 1)}),
        (
            "scoring_weights",
            {"scoring_weights": OWN, "scoring_preset": pb.SCORING_PRESET_FACTUAL},
        ),
        (
            "scoring_weights.relevance_to_goals",
            {"scoring_weights": weighing(-0.1, 0.5, 0.5, 0.1)},
        ),
        ("scoring_weights.emotional_weight", {"scoring_weights": weighing(0, 1.0001, 0, 0)}),
        ("scoring_weights.predictive_value", {"scoring_weights": weighing(0.5, 0.5, NAN, 0)}),
        (
            "scoring_weights.recency_frequency",
            {"scoring_weights": weighing(1, 0, 0, float("inf"))},
        ),
        *(
            (f"quotas.{name}", {"quotas": pb.Quotas(**{name: number})})
            for name in Quotas.__slots__
            for number in (-1, 2**62)
        ),
        *(
            (f"retention.{name}", {"retention": pb.Retention(**{name: number})})
            for name, most in (
                ("short_term_hours", 168),
                ("long_term_days", 36_500),
                ("archive_grace_days", 365),
            )
            for number in (-1, 0, most + 1)
        ),
        ("embedding_model", {"embedding_model": "m" * 65}),
        ("embedding_model", {"embedding_model": "a\nb"}),
        *(
            (
                f"retrieval_weights.{name}",
                {"retrieval_weights": pb.RetrievalWeights(**{name: number})},
            )
            for name in RetrievalWeights.__slots__
            for number in (-0.001, 1.001, NAN)
        ),
    ],
)
async def test_a_value_that_no_setting_can_have_is_refused_by_field(
    users: Users, caller: Caller, field: str, fields: dict[str, Any]
) -> None:
    refused = await refusal(users, caller, *fields, **fields)
    assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_INVALID")
    assert refused.fields == (f"settings.{field}",)
    assert (await get(users, caller)).etag == "v0"


@pytest.mark.parametrize(
    "assignment",
    [
        "language = 'klingon'",
        "scoring_preset = 'loud'",
        "emotional_weight = 1.5",
        "emotional_weight = 'NaN'",
        "emotional_weight = emotional_weight + 0.002",
        "speaker = -0.1",
        "embedding_model = repeat('m', 65)",
        "version = 0",
    ],
)
async def test_the_database_keeps_settings_sound_too(
    users: Users, caller: Caller, owner: asyncpg.Connection, assignment: str
) -> None:
    await update(users, caller, "scoring_weights", scoring_weights=OWN)
    with pytest.raises(asyncpg.CheckViolationError):
        await owner.execute(f"UPDATE settings SET {assignment}")


# --- how other slices read them


async def test_preferences_are_what_the_settings_say(
    users: Users, database: Database, caller: Caller
) -> None:
    async with database.transaction(caller) as connection:
        assert await preferences(connection, caller) == Preferences()
    fields: dict[str, Any] = {
        "language": pb.LANGUAGE_PORTUGUESE,
        "scoring_weights": OWN,
        "retrieval_weights": pb.RetrievalWeights(freshness=0.5),
        "embedding_model": "local",
        "quotas": pb.Quotas(long_term_bytes=5),
        "retention": pb.Retention(archive_grace_days=6),
    }
    await update(users, caller, *fields, **fields)
    chosen = Preferences(
        Language.PORTUGUESE,
        ScoringPreset.CUSTOM,
        ScoringWeights(0.1, 0.2, 0.3, 0.4),
        RetrievalWeights(freshness=0.5),
        embedding_model="local",
        version=1,
        quotas=Quotas(long_term_bytes=5),
        retention=Retention(archive_grace_days=6),
    )
    async with database.transaction(caller) as connection:
        assert await preferences(connection, caller) == chosen
        elsewhere = replace(caller, tenant_id=ids.new_id())
        assert await preferences(connection, elsewhere) == Preferences()


async def test_the_system_role_reads_the_weights_of_many_and_changes_none(
    users: Users, database: Database, system_database: SystemDatabase
) -> None:
    ada, bob, cyd, dan = [await new_caller(database) for _ in range(4)]
    for caller in (ada, cyd):
        await update(users, caller, "scoring_weights", scoring_weights=OWN)
    await update(users, bob, "language", language=pb.LANGUAGE_GERMAN)
    async with system_database.transaction() as connection:
        asked = [(caller.tenant_id, caller.user_id) for caller in (ada, bob, dan)]
        weights = await weights_of_users(connection, [*asked, (dan.tenant_id, cyd.user_id)])
    assert weights == {ada.user_id: (0.1, 0.2, 0.3, 0.4)}
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with system_database.transaction() as connection:
            await connection.execute("UPDATE settings SET version = version + 1")
