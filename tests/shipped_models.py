"""Small real models for tests: the one that the package wordllama ships, and its first numbers."""

from __future__ import annotations

import shutil
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

WIDE, NARROW = "wordllama-256", "wordllama-64"
"""The model as shipped; and cut to 64 dimensions, which its training allows (Matryoshka)."""

_WEIGHTS = "wordllama/weights/l2_supercat_256.safetensors"
_TOKENIZER = "wordllama/tokenizers/l2_supercat_tokenizer_config.json"


def put(directory: Path) -> Path:
    """Put both models into a directory, a folder each, and return it."""
    # The package is looked into and never imported: it would set up logging.
    shipped = distribution("wordllama")
    for name in (WIDE, NARROW):
        (directory / name).mkdir(parents=True)
        shutil.copy(str(shipped.locate_file(_TOKENIZER)), directory / name / "tokenizer.json")
    wide = directory / WIDE / "model.safetensors"
    shutil.copy(str(shipped.locate_file(_WEIGHTS)), wide)
    matrix = np.ascontiguousarray(load_file(wide)["embedding.weight"][:, :64])
    save_file({"embedding.weight": matrix}, directory / NARROW / "model.safetensors")
    return directory
