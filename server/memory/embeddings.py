"""Vectors that stand for the meaning of a text: every rule on what may be compared and kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import numpy as np
import numpy.typing as npt

from server.errors import InvalidArgument

FEWEST_DIMENSIONS: Final = 2
MOST_DIMENSIONS: Final = 4_000
"""The longest halfvec that pgvector indexes."""
MODEL_CHARACTERS: Final = 64
BATCH: Final = 1_000

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """What a model makes of a text."""

    model: str
    values: Floats
    """Of length 1."""

    @property
    def dimension(self) -> int:
        """How many numbers the vector has."""
        return len(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Upload:
    """A vector that a caller asks to keep for a memory."""

    memory_id: UUID
    embedding: Embedding
    content_hash: bytes | None
    """SHA-256 of the text that it stands for; None: of the present text."""


def read_embedding(model: str, values: Sequence[float], path: str) -> Embedding:
    """Return an embedding, normalised.

    Args:
        model: Name of the model.
        values: The vector, of any length.
        path: Where both stand in the request, such as "embeddings[3]".

    Raises:
        InvalidArgument: The name is empty, too long or not printable; the vector has too few or
            too many numbers, holds NaN or an infinity, or is zero.
    """
    check_model(model, f"{path}.model")
    return Embedding(model, _normalised(values, f"{path}.values"))


def check_model(model: str, field: str) -> None:
    """Refuse what is no name of a model.

    Raises:
        InvalidArgument: The name is empty, too long or not printable.
    """
    if not 1 <= len(model) <= MODEL_CHARACTERS or not model.isprintable():
        raise InvalidArgument(field, f"must have 1 to {MODEL_CHARACTERS} printable characters")


def check_batch(uploads: Sequence[Upload]) -> None:
    """Refuse vectors that contradict each other.

    Raises:
        InvalidArgument: Two are of the same memory and model, or of one model and not equally long.
    """
    seen: set[tuple[UUID, str]] = set()
    dimensions: dict[str, int] = {}
    for place, upload in enumerate(uploads):
        embedding = upload.embedding
        key = (upload.memory_id, embedding.model)
        if key in seen:
            raise InvalidArgument(
                f"embeddings[{place}].memory_id", "has another vector of this model before"
            )
        seen.add(key)
        check_dimension(
            embedding,
            dimensions.setdefault(embedding.model, embedding.dimension),
            f"embeddings[{place}].values",
        )


def check_dimension(embedding: Embedding, dimension: int, field: str) -> None:
    """Refuse a vector that cannot be compared with the others of its model.

    Raises:
        InvalidArgument: It has more or fewer numbers.
    """
    if embedding.dimension != dimension:
        raise InvalidArgument(
            field, f"has {embedding.dimension} numbers; vectors of this model have {dimension}"
        )


def _normalised(values: Sequence[float], field: str) -> Floats:
    if not FEWEST_DIMENSIONS <= len(values) <= MOST_DIMENSIONS:
        raise InvalidArgument(
            field, f"must have {FEWEST_DIMENSIONS} to {MOST_DIMENSIONS} numbers, has {len(values)}"
        )
    vector = np.fromiter(values, np.float64, len(values))
    if not np.isfinite(vector).all():
        raise InvalidArgument(field, "must hold finite numbers only")
    length = np.linalg.norm(vector)
    if length == 0:
        raise InvalidArgument(field, "must not be all zero")
    return (vector / length).astype(np.float32)
