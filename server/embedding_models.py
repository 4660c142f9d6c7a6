"""Models that turn texts into vectors, read from folders on this machine.

Nothing is fetched: whoever runs the worker puts the folders there. A folder is what model2vec
and WordLlama publish as a static model: `tokenizer.json`, and a matrix with a row a token in
`model.safetensors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Floats = npt.NDArray[np.float32]
Tensor = npt.NDArray[Any]

TOKENIZER: Final = "tokenizer.json"
TENSORS: Final = "model.safetensors"

_MATRICES: Final = ("embeddings", "embedding.weight")
"""What model2vec and WordLlama call the rows of the tokens."""
_NAME_CHARACTERS: Final = 64
_FEWEST_DIMENSIONS: Final = 2
_MOST_DIMENSIONS: Final = 4_000


class ModelUnusable(Exception):
    """There is no model where one should be. Says what to do about it."""


class Embedder(Protocol):
    """Turns texts into vectors."""

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return float32[len(texts)][dimension], the vector of each text.

        Each has length 1, or is all zero: of that text the model knows nothing. A text has the
        same vector whatever else is asked with it.
        """


class StaticEmbedder:
    """A vector for each token, and of a text their mean (Tulkens & van Dongen, Model2Vec, 2024)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        matrix: Tensor,
        *,
        row_of: Tensor | None = None,
        weights: Tensor | None = None,
        unknown: int | None = None,
    ) -> None:
        """Prepare to embed.

        Args:
            tokenizer: Tells the tokens of a text.
            matrix: One row a token; of any number type, and kept in it.
            row_of: Which row each token has; None: the one of its own number.
            weights: What each token counts in the mean; None: all the same.
            unknown: The token that stands for what the tokenizer does not know; it has no say.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._matrix = matrix
        self._row_of = row_of
        self._weights = weights
        self._unknown = unknown

    @classmethod
    def load(cls, folder: Path) -> "StaticEmbedder":
        """Read a model from its folder.

        Raises:
            ModelUnusable: The folder, or a file of it, is missing, damaged or of another kind.
        """
        for name in (TOKENIZER, TENSORS):
            if not (folder / name).is_file():
                raise ModelUnusable(
                    f"{folder} has no {name}: put the folder of a static embedding model there"
                )
        tokenizer = _tokenizer(folder / TOKENIZER)
        rows = _Rows.of(_tensors(folder / TENSORS), folder / TENSORS)
        rows.check(tokenizer.get_vocab_size(), folder)
        return cls(
            tokenizer,
            rows.matrix,
            row_of=rows.row_of,
            weights=rows.weights,
            unknown=_unknown_token(tokenizer),
        )

    @property
    def dimension(self) -> int:
        """How many numbers a vector has."""
        return int(self._matrix.shape[1])

    def embed(self, texts: Sequence[str]) -> Floats:
        """Return the mean of each text's tokens, of length 1; all zero without known tokens."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        for vector, encoding in zip(vectors, encodings, strict=True):
            tokens = np.asarray([token for token in encoding.ids if token != self._unknown], int)
            if tokens.size:
                vector[:] = self._mean(tokens)
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        np.divide(vectors, lengths, out=vectors, where=lengths > 0)
        return vectors

    def _mean(self, tokens: Tensor) -> Floats:
        rows = tokens if self._row_of is None else self._row_of[tokens]
        found = self._matrix[rows].astype(np.float32)
        if self._weights is not None:
            found *= self._weights[tokens, None]
        mean: Floats = found.mean(axis=0)
        return mean


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The numbers of a model, as its file has them."""

    file: Path
    matrix: Tensor
    row_of: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], file: Path) -> "_Rows":
        for name in _MATRICES:
            if name in tensors:
                return cls(file, tensors[name], tensors.get("mapping"), tensors.get("weights"))
        raise ModelUnusable(
            f"{file} has no matrix named {' or '.join(_MATRICES)}: it is no static model"
        )

    def check(self, vocabulary: int, folder: Path) -> None:
        """Refuse numbers that do not fit each other, or a vocabulary of this size."""
        if self.matrix.ndim != 2:
            raise self._unfit("its matrix has no rows and columns")
        if not _FEWEST_DIMENSIONS <= self.matrix.shape[1] <= _MOST_DIMENSIONS:
            raise self._unfit(f"vectors have {_FEWEST_DIMENSIONS} to {_MOST_DIMENSIONS} numbers")
        if not np.isfinite(self.matrix).all():
            raise self._unfit("it holds numbers that are not finite")
        known = [len(part) for part in (self.row_of, self.weights) if part is not None]
        if self.row_of is None:
            known.append(len(self.matrix))
        elif self.row_of.min(initial=0) < 0 or self.row_of.max(initial=0) >= len(self.matrix):
            raise self._unfit("it names rows that are not there")
        if min(known) < vocabulary:
            raise self._unfit(f"{folder / TOKENIZER} has {vocabulary} tokens, it {min(known)}")

    def _unfit(self, problem: str) -> ModelUnusable:
        return ModelUnusable(f"{self.file}: {problem}; copy the model's folder anew")


def load_embedders(directory: Path) -> dict[str, Embedder]:
    """Read every model of a directory; the name of a folder is the name of its model.

    Raises:
        ModelUnusable: The directory is missing or holds no model, or one of them is unusable.
    """
    if not directory.is_dir():
        raise ModelUnusable(f"{directory} is no directory: name one that has a folder a model")
    folders = sorted(path for path in directory.iterdir() if path.is_dir())
    if not folders:
        raise ModelUnusable(f"{directory} holds no model: put the folder of one into it")
    for folder in folders:
        if len(folder.name) > _NAME_CHARACTERS or not folder.name.isprintable():
            raise ModelUnusable(
                f"{folder}: name it with at most {_NAME_CHARACTERS} printable characters"
            )
    return {folder.name: StaticEmbedder.load(folder) for folder in folders}


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    # KeyError: a number type that NumPy does not have.
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(file, error) from error


def _tokenizer(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:
        # The library raises no narrower class.
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ModelUnusable:
    return ModelUnusable(f"{file} cannot be read ({error}): copy the model's folder anew")


def _unknown_token(tokenizer: Tokenizer) -> int | None:
    """Return the token for what is unknown; a model without a name for it has a row for it."""
    name = getattr(tokenizer.model, "unk_token", None)
    return None if name is None else tokenizer.token_to_id(name)
