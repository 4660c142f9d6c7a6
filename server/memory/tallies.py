"""What a dry run would do: counted, and kept nowhere else."""

from dataclasses import dataclass, field

import numpy as np
from asyncpg.pgproto import pgproto

from server.memory.columns import Column, ScoreColumns, uuids
from server.memory.score_batches import Batch


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
    _ids: list[Column] = field(default_factory=list)
    _scores: list[Column] = field(default_factory=list)

    def add(self, batch: Batch, scores: ScoreColumns, *, full_run: bool) -> None:
        """Count a batch, and remember its scores: 20 bytes a memory of the one user of the run."""
        self.processed += len(batch.rows)
        self.scored += len(batch.rows) if full_run else len(batch.moved(scores))
        self.score_sum += scores.sum()
        self.scorer_version = scores.scorer_version
        self._ids.append(batch.rows.table["memory_id"].copy())
        self._scores.append(scores.score.copy())

    def found(self) -> tuple[list[pgproto.UUID], list[float]]:
        """Return every memory and the score that it would have."""
        if not self._ids:
            return [], []
        return (
            uuids(np.concatenate(self._ids)),
            np.concatenate(self._scores).tolist(),
        )
