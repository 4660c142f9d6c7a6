"""Between the contract's Settings and a user's preferences."""

from collections.abc import Iterable, Mapping
from typing import Final

from kimberly.users.v1 import users_pb2 as pb

from server import etags
from server.errors import InvalidArgument
from server.preferences import (
    PRESETS,
    Language,
    Preferences,
    Quotas,
    RetrievalWeights,
    ScoringPreset,
    ScoringWeights,
)
from server.users.store import Scoring, SettingsChange

_LANGUAGES: Final[Mapping[int, Language]] = {
    pb.LANGUAGE_SIMPLE: Language.SIMPLE,
    pb.LANGUAGE_ENGLISH: Language.ENGLISH,
    pb.LANGUAGE_GERMAN: Language.GERMAN,
    pb.LANGUAGE_FRENCH: Language.FRENCH,
    pb.LANGUAGE_SPANISH: Language.SPANISH,
    pb.LANGUAGE_ITALIAN: Language.ITALIAN,
    pb.LANGUAGE_PORTUGUESE: Language.PORTUGUESE,
}
_PRESETS: Final[Mapping[int, ScoringPreset]] = {
    pb.SCORING_PRESET_BALANCED: ScoringPreset.BALANCED,
    pb.SCORING_PRESET_FACTUAL: ScoringPreset.FACTUAL,
    pb.SCORING_PRESET_EMOTIONAL: ScoringPreset.EMOTIONAL,
    pb.SCORING_PRESET_RECENT: ScoringPreset.RECENT,
    pb.SCORING_PRESET_CUSTOM: ScoringPreset.CUSTOM,
}
_LANGUAGES_TO_PROTO = {language: pb.Language.ValueType(n) for n, language in _LANGUAGES.items()}
_PRESETS_TO_PROTO = {preset: pb.ScoringPreset.ValueType(n) for n, preset in _PRESETS.items()}

_RETRIEVAL: Final = tuple(RetrievalWeights.__slots__)
_QUOTAS: Final = tuple(Quotas.__slots__)
_LONGEST: Final[Mapping[str, int]] = {
    "short_term_hours": 168,
    "long_term_days": 36_500,
    "archive_grace_days": 365,
}
"""The most that each time of the retention may be; the least is 1."""
_CHANGEABLE: Final = (
    "language",
    "scoring_preset",
    "scoring_weights",
    "embedding_model",
    "index_sensitive",
    "retrieval_weights",
    *(f"retrieval_weights.{name}" for name in _RETRIEVAL),
    "quotas",
    *(f"quotas.{name}" for name in _QUOTAS),
    "retention",
    *(f"retention.{name}" for name in _LONGEST),
)
_MODEL_CHARACTERS: Final = 64
_TOLERANCE: Final = 0.001 + 1e-9
"""How far from 1 scoring weights may add up to, and a little for the rounding of four numbers."""


def change_from(request: pb.UpdateSettingsRequest) -> SettingsChange:
    """Read the settings that the mask names.

    Raises:
        InvalidArgument: The mask is empty or names what cannot be changed, or a value is none
            that settings can have.
        EtagMismatch: The etag is none.
    """
    settings, paths = request.settings, set(request.update_mask.paths)
    if not paths or paths.difference(_CHANGEABLE):
        raise InvalidArgument("update_mask", f"must name some of {', '.join(_CHANGEABLE)}")
    return SettingsChange(
        language=_language_from(settings.language) if "language" in paths else None,
        scoring=_scoring_from(settings, paths),
        retrieval=_retrieval_from(settings.retrieval_weights, paths),
        embedding_model=_model_from(settings.embedding_model)
        if "embedding_model" in paths
        else None,
        quotas=_quotas_from(settings.quotas, paths),
        retention=_retention_from(settings.retention, paths),
        index_sensitive=settings.index_sensitive if "index_sensitive" in paths else None,
        expected_version=etags.parse(settings.etag),
    )


def settings_to(preferences: Preferences) -> pb.Settings:
    """Return what a user chose as the contract shows it."""
    retrieval = preferences.retrieval_weights
    return pb.Settings(
        language=_LANGUAGES_TO_PROTO[preferences.language],
        scoring_preset=_PRESETS_TO_PROTO[preferences.scoring_preset],
        scoring_weights=pb.ScoringWeights(**preferences.scoring_weights._asdict()),
        retrieval_weights=pb.RetrievalWeights(
            semantic=retrieval.semantic,
            speaker=retrieval.speaker,
            memory_score=retrieval.memory_score,
            freshness=retrieval.freshness,
            session=retrieval.session,
        ),
        embedding_model=preferences.embedding_model,
        quotas=pb.Quotas(
            short_term_bytes=preferences.quotas.short_term_bytes,
            long_term_bytes=preferences.quotas.long_term_bytes,
            permanent_bytes=preferences.quotas.permanent_bytes,
        ),
        retention=pb.Retention(
            short_term_hours=preferences.retention.short_term_hours,
            long_term_days=preferences.retention.long_term_days,
            archive_grace_days=preferences.retention.archive_grace_days,
        ),
        index_sensitive=preferences.index_sensitive,
        etag=etags.show(preferences.version),
    )


def _language_from(number: int) -> Language:
    if number == pb.LANGUAGE_UNSPECIFIED:
        return Language.ENGLISH
    if number not in _LANGUAGES:
        raise InvalidArgument("settings.language", f"there is no language {number}")
    return _LANGUAGES[number]


def _model_from(name: str) -> str:
    if len(name) > _MODEL_CHARACTERS or not name.isprintable():
        raise InvalidArgument(
            "settings.embedding_model",
            f"must have at most {_MODEL_CHARACTERS} printable characters, or none for no model",
        )
    return name


def _scoring_from(settings: pb.Settings, paths: set[str]) -> Scoring | None:
    """Read preset and weights, of which each follows from the other."""
    weights = None
    if "scoring_weights" in paths and settings.HasField("scoring_weights"):
        weights = _scoring_weights_from(settings.scoring_weights)
    if "scoring_preset" in paths:
        return _preset_from(settings.scoring_preset, weights)
    if weights:
        return Scoring(ScoringPreset.CUSTOM, weights)
    return _of_preset(ScoringPreset.BALANCED) if "scoring_weights" in paths else None


def _preset_from(number: int, weights: ScoringWeights | None) -> Scoring:
    if number and number not in _PRESETS:
        raise InvalidArgument("settings.scoring_preset", f"there is no preset {number}")
    preset = _PRESETS.get(number, ScoringPreset.BALANCED)
    if preset is ScoringPreset.CUSTOM:
        if weights is None:
            raise InvalidArgument("settings.scoring_weights", "must be given to be custom")
        return Scoring(preset, weights)
    if weights not in (None, PRESETS[preset]):
        raise InvalidArgument("settings.scoring_weights", "must be those of the preset")
    return _of_preset(preset)


def _of_preset(preset: ScoringPreset) -> Scoring:
    return Scoring(preset, PRESETS[preset])


def _scoring_weights_from(message: pb.ScoringWeights) -> ScoringWeights:
    path = "settings.scoring_weights"
    weights = ScoringWeights(
        *(_share(getattr(message, name), f"{path}.{name}") for name in ScoringWeights._fields)
    )
    if abs(sum(weights) - 1) > _TOLERANCE:
        raise InvalidArgument(path, f"must add up to 1, not {sum(weights):.6g}")
    return weights


def _retrieval_from(message: pb.RetrievalWeights, paths: set[str]) -> dict[str, float | None]:
    named = [
        name for name in _RETRIEVAL if paths & {"retrieval_weights", f"retrieval_weights.{name}"}
    ]
    return {
        name: _share(getattr(message, name), f"settings.retrieval_weights.{name}")
        if message.HasField(name)  # type: ignore[arg-type] # one of its fields
        else None
        for name in named
    }


def _quotas_from(message: pb.Quotas, paths: set[str]) -> dict[str, int | None]:
    chosen = _given(message, "quotas", _QUOTAS, paths)
    for name, quota in chosen.items():
        if quota is not None and quota < 0:
            raise InvalidArgument(f"settings.quotas.{name}", "must not be negative")
    return chosen


def _retention_from(message: pb.Retention, paths: set[str]) -> dict[str, int | None]:
    chosen = _given(message, "retention", _LONGEST, paths)
    for name, time in chosen.items():
        if time is not None and not 1 <= time <= _LONGEST[name]:
            raise InvalidArgument(f"settings.retention.{name}", f"must be 1 to {_LONGEST[name]}")
    return chosen


def _given(
    message: pb.Quotas | pb.Retention, path: str, names: Iterable[str], paths: set[str]
) -> dict[str, int | None]:
    """Return the fields that the mask names; None for one that is not given."""
    return {
        name: getattr(message, name) if message.HasField(name) else None  # type: ignore[arg-type] # one of its fields
        for name in names
        if paths & {path, f"{path}.{name}"}
    }


def _share(value: float, field: str) -> float:
    # Written so that NaN, which is neither, is refused.
    if not 0 <= value <= 1:
        raise InvalidArgument(field, "must be 0 to 1")
    return value
