"""Keeping vectors of memories in Postgres."""

from collections import Counter
from collections.abc import Sequence
from typing import Final
from uuid import UUID

from pgvector import HalfVector

from server import audit, consent, ids
from server.caller import Caller
from server.database import Connection, Database
from server.embedding_requests import ask_for_embedding
from server.errors import QuotaExceeded
from server.memory.embedding_jobs import EmbeddingJob, hold, spend
from server.memory.embeddings import Upload, check_dimension
from server.memory.metrics import EMBEDDING_ITEMS
from server.memory.writing import touch

SCANNED: Final = 5_000
"""How many vectors of a user and model are scanned; those above are in a graph."""
GRAPH_DIMENSIONS: Final = frozenset({64, 128, 256, 384, 512, 768, 1024, 1536, 3072})
"""Those that a graph is there for: the ones of migration 0006."""


class EmbeddingStore:
    """Keeps vectors of one user at a time. Every method is one transaction."""

    def __init__(self, database: Database, scanned: int = SCANNED) -> None:
        self._database = database
        self._scanned = scanned

    async def keep(
        self, caller: Caller, uploads: Sequence[Upload], job: EmbeddingJob | None = None
    ) -> dict[int, str]:
        """Keep vectors, each instead of the one of the same memory and model.

        Args:
            caller: Whose memories they belong to.
            uploads: A vector for each memory and model, no two for the same.
            job: The job that made them, all by one model; None: the caller brings them.

        Returns:
            Place of each vector that was not kept → the field at fault: "memory_id" where the
            caller has no such memory or it is sensitive, "content_hash" where its text is another
            one, "model" where the user no longer wants vectors of a job's model.

        Raises:
            ConsentMissing: The user has not consented to memory.store and memory.embed.
            InvalidArgument: A vector has another dimension than those of its model.
            QuotaExceeded: The user would have more vectors than a user may keep.
            LeaseLost: The lease of the job passed to another worker.
        """
        async with self._database.transaction(caller) as connection:
            await consent.require(connection, consent.MEMORY_STORE)
            await consent.require(connection, consent.MEMORY_EMBED)
            await hold_vectors(connection, caller)
            if job and not await hold(connection, job, uploads[0].embedding.model):
                return dict.fromkeys(range(len(uploads)), "model")
            await _check_models(connection, caller, uploads)
            in_graph = await self._places(connection, caller, uploads)
            kept = await _insert(connection, caller, uploads, in_graph)
            await _note_models(connection, caller, uploads, in_graph)
            await _check_number(connection, caller)
            await audit.record_all(
                connection,
                caller,
                "memory.embed",
                [ids.show(ids.MEMORY, memory_id) for memory_id, _ in kept],
            )
            refused = await _explain(connection, caller, uploads, kept)
            if kept:
                await touch(connection, caller)
            if job:
                await spend(connection, caller, len(kept))
        EMBEDDING_ITEMS.labels("stored").inc(len(kept))
        return refused

    async def delete(self, caller: Caller, model: str) -> int:
        """Drop the vectors of a model and return how many there were.

        Those of the user's local model are asked for anew.
        """
        async with self._database.transaction(caller) as connection:
            await hold_vectors(connection, caller)
            dropped: int = await connection.fetchval(
                """
                SELECT count(*)
                  FROM embeddings
                 WHERE tenant_id = $1 AND user_id = $2 AND model = $3
                """,
                caller.tenant_id,
                caller.user_id,
                model,
            )
            if not dropped:
                return 0
            # The vectors go with their model.
            await connection.execute(
                """
                DELETE FROM embedding_models
                 WHERE tenant_id = $1 AND user_id = $2 AND model = $3
                """,
                caller.tenant_id,
                caller.user_id,
                model,
            )
            await audit.record(connection, caller, "embeddings.delete", model)
            await touch(connection, caller)
            await ask_for_embedding(connection, caller)
        EMBEDDING_ITEMS.labels("dropped").inc(dropped)
        return dropped

    async def _places(
        self, connection: Connection, caller: Caller, uploads: Sequence[Upload]
    ) -> list[bool]:
        """Tell which vectors go into a graph: those beyond the ones that are scanned."""
        rows = await connection.fetch(
            """
            SELECT model, count(*) AS vectors
              FROM embeddings
             WHERE tenant_id = $1 AND user_id = $2 AND model = ANY ($3) AND NOT in_graph
             GROUP BY model
            """,
            caller.tenant_id,
            caller.user_id,
            sorted({upload.embedding.model for upload in uploads}),
        )
        scanned = Counter({row["model"]: row["vectors"] for row in rows})
        places = []
        for upload in uploads:
            has_graph = upload.embedding.dimension in GRAPH_DIMENSIONS
            places.append(has_graph and scanned[upload.embedding.model] >= self._scanned)
            scanned[upload.embedding.model] += 1
        return places


async def hold_vectors(connection: Connection, caller: Caller) -> None:
    """Wait until no vectors of the user are being kept, and let none be until the commit.

    Who keeps some counts what is there; who marks a memory as sensitive drops all of its.
    """
    await connection.execute(
        "SELECT pg_advisory_xact_lock(hashtextextended('embeddings ' || $1, 0))",
        str(caller.user_id),
    )


async def _check_models(connection: Connection, caller: Caller, uploads: Sequence[Upload]) -> None:
    """Refuse vectors that their models' vectors cannot be compared with; note new models."""
    dimensions = {upload.embedding.model: upload.embedding.dimension for upload in uploads}
    await connection.execute(
        """
        INSERT INTO embedding_models (tenant_id, user_id, model, dimension)
        SELECT $1, $2, unnest($3::text[]), unnest($4::integer[])
        ON CONFLICT DO NOTHING
        """,
        caller.tenant_id,
        caller.user_id,
        list(dimensions),
        list(dimensions.values()),
    )
    rows = await connection.fetch(
        """
        SELECT model, dimension
          FROM embedding_models
         WHERE tenant_id = $1 AND user_id = $2 AND model = ANY ($3)
        """,
        caller.tenant_id,
        caller.user_id,
        list(dimensions),
    )
    known = {row["model"]: row["dimension"] for row in rows}
    for place, upload in enumerate(uploads):
        embedding = upload.embedding
        check_dimension(embedding, known[embedding.model], f"embeddings[{place}].values")


async def _insert(
    connection: Connection, caller: Caller, uploads: Sequence[Upload], in_graph: Sequence[bool]
) -> set[tuple[UUID, str]]:
    """Store the vectors whose memories are there, and return memory and model of each."""
    rows = await connection.fetch(
        """
        INSERT INTO embeddings (tenant_id, user_id, model, memory_id, dimension, in_graph,
                                content_hash, vector)
        SELECT $1, $2, upload.model, memory.id, vector_dims(upload.vector), upload.in_graph,
               memory.content_hash, upload.vector
          FROM unnest($3::text[], $4::uuid[], $5::boolean[], $6::bytea[], $7::halfvec[])
            AS upload (model, memory_id, in_graph, content_hash, vector)
          JOIN memories AS memory
            ON memory.tenant_id = $1 AND memory.user_id = $2 AND memory.id = upload.memory_id
           AND memory.content_hash = coalesce(upload.content_hash, memory.content_hash)
           AND NOT memory.sensitive
            ON CONFLICT (user_id, model, memory_id) DO UPDATE
           SET content_hash = excluded.content_hash, vector = excluded.vector
        RETURNING memory_id, model
        """,
        caller.tenant_id,
        caller.user_id,
        [upload.embedding.model for upload in uploads],
        [upload.memory_id for upload in uploads],
        in_graph,
        [upload.content_hash for upload in uploads],
        [HalfVector(upload.embedding.values) for upload in uploads],
    )
    return {(row["memory_id"], row["model"]) for row in rows}


async def _note_models(
    connection: Connection,
    caller: Caller,
    uploads: Sequence[Upload],
    in_graph: Sequence[bool],
) -> None:
    """Note which models have vectors in a graph, and forget those that have no vectors at all."""
    pairs = zip(uploads, in_graph, strict=True)
    await connection.execute(
        """
        WITH forgotten AS (
            DELETE FROM embedding_models AS known
             WHERE tenant_id = $1 AND user_id = $2 AND model = ANY ($3)
               AND NOT EXISTS (
                   SELECT FROM embeddings AS embedding
                    WHERE embedding.tenant_id = $1 AND embedding.user_id = $2
                      AND embedding.model = known.model
                   )
        )
        UPDATE embedding_models
           SET in_graph = true
         WHERE tenant_id = $1 AND user_id = $2 AND model = ANY ($4) AND NOT in_graph
        """,
        caller.tenant_id,
        caller.user_id,
        list({upload.embedding.model for upload in uploads}),
        list({upload.embedding.model for upload, is_in_graph in pairs if is_in_graph}),
    )


async def _check_number(connection: Connection, caller: Caller) -> None:
    row = await connection.fetchrow(
        """
        SELECT (SELECT count(*)
                  FROM embeddings
                 WHERE tenant_id = $1 AND user_id = $2) AS number,
               (SELECT vectors FROM quotas_of($1, $2)) AS most
        """,
        caller.tenant_id,
        caller.user_id,
    )
    if row["number"] > row["most"]:
        raise QuotaExceeded(
            "embeddings",
            row["number"],
            row["most"],
            "delete memories or vectors, use one model, or choose a larger plan",
            "vectors",
        )


async def _explain(
    connection: Connection,
    caller: Caller,
    uploads: Sequence[Upload],
    kept: set[tuple[UUID, str]],
) -> dict[int, str]:
    """Say what is wrong with each vector that was not kept."""
    left_out = {
        place: upload.memory_id
        for place, upload in enumerate(uploads)
        if (upload.memory_id, upload.embedding.model) not in kept
    }
    if not left_out:
        return {}
    rows = await connection.fetch(
        """
        SELECT id
          FROM memories
         WHERE tenant_id = $1 AND user_id = $2 AND id = ANY ($3) AND NOT sensitive
        """,
        caller.tenant_id,
        caller.user_id,
        list(left_out.values()),
    )
    there = {row["id"] for row in rows}
    return {
        place: "content_hash" if memory_id in there else "memory_id"
        for place, memory_id in left_out.items()
    }
