"""Static embedding models from folders: what they make of texts, and folders that are none."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from server.embedding_models import (
    TENSORS,
    TOKENIZER,
    Embedder,
    ModelUnusable,
    StaticEmbedder,
    load_embedders,
)
from tests.shipped_models import NARROW, WIDE

SENTENCES = (
    "The cat sleeps on the sofa.",
    "A kitten is napping on the couch.",
    "The central bank raised its interest rates.",
    "Mortgages became more expensive this year.",
)
MATRIX = np.array([[9, 9], [3, 0], [0, 4], [1, 1]], np.float32)
"""The rows of "[UNK]", "east", "north" and "both"."""


@pytest.fixture(scope="module")
def embedders(shipped_models: Path) -> Mapping[str, Embedder]:
    return load_embedders(shipped_models)


@pytest.fixture
def shipped(embedders: Mapping[str, Embedder]) -> Embedder:
    return embedders[WIDE]


def make(folder: Path, tensors: Mapping[str, Any], *, unknown: str | None = "[UNK]") -> Path:
    """Make a model of four words."""
    folder.mkdir(exist_ok=True)
    words = {"[UNK]": 0, "east": 1, "north": 2, "both": 3}
    tokenizer = Tokenizer(WordLevel(words, unk_token=unknown))
    tokenizer.pre_tokenizer = Whitespace()
    # As models for other uses have it: neither must change a vector.
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(folder / TOKENIZER))
    save_file(dict(tensors), folder / TENSORS)
    return folder


# --- the shipped model


@pytest.mark.parametrize("name", [WIDE, NARROW])
def test_what_means_the_same_is_nearer_than_what_does_not(
    embedders: Mapping[str, Embedder], name: str
) -> None:
    vectors = embedders[name].embed(SENTENCES)
    near = vectors @ vectors.T
    same = min(near[0, 1], near[2, 3])
    assert same > 2 * near[:2, 2:].max()
    assert same > 0.25


def test_vectors_have_the_length_one_and_the_model_s_dimension(shipped: Embedder) -> None:
    vectors = shipped.embed(SENTENCES)
    assert vectors.shape == (4, shipped.dimension)
    assert vectors.dtype == np.float32
    assert shipped.dimension == 256
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_a_text_has_the_same_vector_alone_and_among_others(shipped: Embedder) -> None:
    texts = [*SENTENCES, "x", "word " * 10_000, "Straße 漢字 \U0001f600", "\n\t a  b \0"]
    together = shipped.embed(texts)
    for text, vector in zip(texts, together, strict=True):
        assert (shipped.embed([text])[0] == vector).all()
    assert (shipped.embed(texts[::-1]) == together[::-1]).all()


def test_the_end_of_a_long_text_counts(shipped: Embedder) -> None:
    long = "word " * 10_000
    assert (shipped.embed([long]) != shipped.embed([long + SENTENCES[0]])).any()


def test_no_texts_have_no_vectors_and_an_empty_one_has_zeros(shipped: Embedder) -> None:
    assert shipped.embed([]).shape == (0, 256)
    assert not shipped.embed([""]).any()


# --- exactly


def test_the_vector_of_a_text_is_the_mean_of_its_tokens(tmp_path: Path) -> None:
    embedder = StaticEmbedder.load(make(tmp_path, {"embeddings": MATRIX}))
    vectors = embedder.embed(["east", "east north", "both east east north", ""])
    expected = [(1, 0), (3 / 5, 4 / 5), (7 / math.hypot(7, 5), 5 / math.hypot(7, 5)), (0, 0)]
    assert np.allclose(vectors, expected, atol=1e-6)


def test_unknown_words_have_no_say_unless_the_model_has_a_row_for_them(tmp_path: Path) -> None:
    embedder = StaticEmbedder.load(make(tmp_path, {"embeddings": MATRIX}))
    assert np.allclose(embedder.embed(["east xyz", "xyz"]), [(1, 0), (0, 0)])


def test_weights_and_shared_rows_of_small_models_count(tmp_path: Path) -> None:
    # As model2vec writes models whose vocabulary was quantised, in one byte a number.
    tensors = {
        "embeddings": np.array([[1, 0], [0, 1]], np.int8),
        "mapping": np.array([0, 0, 1, 1], np.int64),
        "weights": np.array([1, 3, 4, 0], np.float32),
    }
    embedder = StaticEmbedder.load(make(tmp_path, tensors))
    assert np.allclose(embedder.embed(["east north both"]), [(3 / 5, 4 / 5)])


def test_half_precision_is_enough(tmp_path: Path) -> None:
    embedder = StaticEmbedder.load(make(tmp_path, {"embedding.weight": MATRIX.astype(np.float16)}))
    assert np.allclose(embedder.embed(["east north"]), [(3 / 5, 4 / 5)])


# --- folders that are none


def test_models_go_by_the_names_of_their_folders(embedders: Mapping[str, Embedder]) -> None:
    assert {name: embedder.dimension for name, embedder in embedders.items()} == {
        WIDE: 256,
        NARROW: 64,
    }


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="gone is no directory: name one that"):
        load_embedders(tmp_path / "gone")


def test_a_directory_without_models_says_what_belongs_there(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("no folder")
    with pytest.raises(ModelUnusable, match="holds no model: put the folder of one into it"):
        load_embedders(tmp_path)


def test_a_name_that_no_setting_can_have_is_refused(tmp_path: Path) -> None:
    make(tmp_path / ("m" * 65), {"embeddings": MATRIX})
    with pytest.raises(ModelUnusable, match="name it with at most 64 printable"):
        load_embedders(tmp_path)


@pytest.mark.parametrize("name", [TOKENIZER, TENSORS])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (make(tmp_path / "model", {"embeddings": MATRIX}) / name).unlink()
    with pytest.raises(ModelUnusable, match=f"model has no {name}: put the folder of a static"):
        load_embedders(tmp_path)


def cut(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def scribble(file: Path) -> None:
    file.write_bytes(b"\xff\xfe nothing")


@pytest.mark.parametrize("name", [TOKENIZER, TENSORS])
@pytest.mark.parametrize("damage", [cut, scribble, lambda file: file.write_bytes(b"")])
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    damage(make(tmp_path / "model", {"embeddings": MATRIX}) / name)
    with pytest.raises(ModelUnusable, match=f"{name} cannot be read .*: copy the model's folder"):
        load_embedders(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"weight": MATRIX}, "has no matrix named embeddings or embedding.weight"),
        ({"embeddings": MATRIX[0]}, "no rows and columns"),
        ({"embeddings": MATRIX[:, :1].copy()}, "vectors have 2 to 4000 numbers"),
        ({"embeddings": np.zeros((4, 4001), np.float32)}, "vectors have 2 to 4000 numbers"),
        ({"embeddings": MATRIX * np.float32(np.nan)}, "not finite"),
        ({"embeddings": MATRIX[:3]}, r"tokenizer.json has 4 tokens, it 3"),
        ({"embeddings": MATRIX, "weights": np.ones(3, np.float32)}, "has 4 tokens, it 3"),
        ({"embeddings": MATRIX, "mapping": np.array([0, 1, 2])}, "has 4 tokens, it 3"),
        ({"embeddings": MATRIX, "mapping": np.array([0, 1, 2, 4])}, "rows that are not there"),
        ({"embeddings": MATRIX, "mapping": np.array([0, 1, 2, -1])}, "rows that are not there"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: Mapping[str, Any], problem: str
) -> None:
    with pytest.raises(ModelUnusable, match=problem):
        StaticEmbedder.load(make(tmp_path, tensors))


def test_one_unusable_model_of_several_is_no_secret(shipped_models: Path, tmp_path: Path) -> None:
    shutil.copytree(shipped_models / NARROW, tmp_path / NARROW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnusable, match=r"empty has no tokenizer.json"):
        load_embedders(tmp_path)
