"""Vectors of questions that bring none, made by models on this machine."""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from server.embedding_models import Embedder
from server.memory.embeddings import Embedding

MOST_REMEMBERED: Final = 1_000
"""How many vectors are remembered: of the longest ones, 16 MB."""


class QuestionVectors:
    """Makes vectors, and remembers the last ones; of a question it remembers a digest alone.

    A model is one that workers have too: what it makes of a question is compared with what theirs
    made of the memories.
    """

    def __init__(self, embedders: Mapping[str, Embedder] | None = None) -> None:
        """Prepare to embed by the models at hand, by name; None: there are none."""
        self._embedders = embedders or {}
        self._known: OrderedDict[tuple[str, bytes], Embedding | None] = OrderedDict()

    def has(self, model: str) -> bool:
        """Tell whether a model is at hand."""
        return model in self._embedders

    async def of(self, model: str, text: str) -> Embedding | None:
        """Return what a model at hand makes of a question; None: it knows nothing of that."""
        key = model, hashlib.sha256(text.encode()).digest()
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        # In a thread: a long question takes a while, and others are waiting for the loop.
        (vector,) = await asyncio.to_thread(self._embedders[model].embed, [text])
        embedding = Embedding(model, vector) if vector.any() else None
        self._known[key] = embedding
        if len(self._known) > MOST_REMEMBERED:
            self._known.popitem(last=False)
        return embedding
