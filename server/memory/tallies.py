"""What a dry run would do: counted, and kept nowhere else."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from server.memory.columns import Column, ScoreColumns, copied
from server.memory.score_batches import Batch

_FOUND: Final = (("memory_id", "S16"), ("score", ">f4"))
FOUND_COLUMNS: Final = [name for name, _ in _FOUND]
"""What `Tally.found` writes."""


@dataclass(slots=True)
class Tally:
    """The figures of one shard."""

    processed: int = 0
    scored: int = 0
    score_sum: float = 0.0
    scorer_version: int = 0
    archived: int = 0
    promoted: int = 0
    deleted: int = 0
    _found: list[Mapping[str, Column]] = field(default_factory=list)

    def add(self, batch: Batch, scores: ScoreColumns, *, full_run: bool) -> None:
        """Count a batch, and remember its scores: 20 bytes a memory of the one user of the run."""
        self.processed += len(batch.rows)
        self.scored += len(batch.rows) if full_run else len(batch.moved(scores))
        self.score_sum += scores.sum()
        self.scorer_version = scores.scorer_version
        ids, found = batch.rows.table["memory_id"].copy(), scores.score.copy()
        self._found.append({"memory_id": ids, "score": found})

    def found(self) -> AsyncIterator[bytes]:
        """Yield every memory and the score that it would have, as COPY takes them."""
        return copied(_FOUND, self._found)
