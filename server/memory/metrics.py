"""What the memory slice measures."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from server import ids
from server.cache import Redis, out_of_reach
from server.database import SystemDatabase
from server.embedding_requests import KIND
from server.memory.shards import SHARD_JOB
from server.metrics import SECONDS, set_all

_MOST_COUNTED: Final = 100_000
_TIERS: Final = ("long_term", "permanent")
_SHARES: Final = (80, 100)

ITEMS: Final = Gauge(
    "memory_items", "Memories that are kept; short-term ones are not counted.", ["tier", "state"]
)
BYTES: Final = Gauge("memory_bytes", "What they hold, as quotas count it.", ["tier"])
USERS_NEAR_QUOTA: Final = Gauge(
    "memory_quota_usage_users", "Users at that percentage of a quota.", ["tier", "threshold"]
)
QUOTA_REFUSALS: Final = Counter(
    "memory_quota_refusals", "Memories refused for want of room.", ["tier"]
)
MEDITATION_RUNS: Final = Counter("memory_meditation_runs", "Meditations that ended.", ["outcome"])
MEDITATION_ITEMS: Final = Counter(
    "memory_meditation_items", "What meditations did to memories, dry runs apart.", ["action"]
)
LAST_SUCCESS: Final = Gauge(
    "memory_meditation_last_success_timestamp_seconds",
    "When the last meditation of all users ended; 0: there was none yet.",
)
LAST_DURATION: Final = Gauge(
    "memory_meditation_last_duration_seconds", "How long the last meditation of all users took."
)
MEDITATIONS_INTERRUPTED: Final = Gauge(
    "memory_meditation_interrupted",
    "Meditations under way that no job goes on with: theirs failed, or was cancelled.",
    ["outcome"],
)
MEDITATIONS_RUNNING: Final = Gauge("memory_meditation_running", "Meditations under way.")
LATENCY: Final = Histogram(
    "retrieval_latency_seconds", "Time that queries took, and their legs.", ["leg"], buckets=SECONDS
)
LATE: Final = Counter("retrieval_late", "Legs given up because they took too long.", ["leg"])
CACHE: Final = Counter("retrieval_cache", "Looks for an answer that is kept.", ["outcome"])
EMBEDDING_ITEMS: Final = Counter("embedding_items", "Vectors stored and dropped.", ["change"])
EMBEDDING_WAITING: Final = Gauge(
    "embedding_waiting", "Users some of whose texts have no vector yet, at most 100000."
)
SEARCH_SECONDS: Final = Histogram(
    "vector_index_search_seconds", "Time that comparing vectors took.", ["method"], buckets=SECONDS
)
INDEX_BYTES: Final = Gauge("vector_index_bytes", "Size of the graphs of all dimensions.")
INDEX_VECTORS: Final = Gauge("vector_index_vectors", "Vectors, as the planner estimates them.")


class MemoryReadings:
    """Reads gauges out of Postgres; each statement reads a row a user at most."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def usage(self) -> None:
        """Count what is kept, and who has little room left."""
        (row,) = await self._database.fetch_alone(
            """
            SELECT coalesce(sum(long_term_count), 0) AS long_term_count,
                   coalesce(sum(permanent_count), 0) AS permanent_count,
                   coalesce(sum(archived_count), 0) AS archived_count,
                   coalesce(sum(used.long_term_bytes), 0) AS long_term_bytes,
                   coalesce(sum(used.permanent_bytes), 0) AS permanent_bytes,
                   coalesce(sum(archived_bytes), 0) AS archived_bytes,
                   count(*) FILTER (WHERE used.long_term_bytes * 100 >= quota.long_term * 80
                                      AND used.long_term_bytes > 0) AS long_term_80,
                   count(*) FILTER (WHERE used.long_term_bytes >= quota.long_term
                                      AND used.long_term_bytes > 0) AS long_term_100,
                   count(*) FILTER (WHERE used.permanent_bytes * 100 >= quota.permanent * 80
                                      AND used.permanent_bytes > 0) AS permanent_80,
                   count(*) FILTER (WHERE used.permanent_bytes >= quota.permanent
                                      AND used.permanent_bytes > 0) AS permanent_100
              FROM memory_usage AS used
              LEFT JOIN subscriptions AS chosen USING (tenant_id, user_id)
              LEFT JOIN settings AS lowered USING (tenant_id, user_id)
              JOIN plans AS plan ON plan.name = coalesce(chosen.plan, 'free')
             CROSS JOIN LATERAL (
                   SELECT least(plan.long_term_bytes, lowered.long_term_bytes) AS long_term,
                          least(plan.permanent_bytes, lowered.permanent_bytes) AS permanent
                   ) AS quota
            """
        )
        set_all(
            ITEMS,
            {
                **{(tier, "active"): row[f"{tier}_count"] for tier in _TIERS},
                ("archived", "archived"): row["archived_count"],
            },
        )
        set_all(BYTES, {(tier,): row[f"{tier}_bytes"] for tier in (*_TIERS, "archived")})
        set_all(
            USERS_NEAR_QUOTA,
            {(tier, str(share)): row[f"{tier}_{share}"] for tier in _TIERS for share in _SHARES},
        )

    async def meditations(self) -> None:
        """Tell of the last meditation of all users, and how many run."""
        (row,) = await self._database.fetch_alone(
            """
            SELECT coalesce(extract(epoch FROM last.finished_at), 0)::float8 AS finished,
                   coalesce(extract(epoch FROM last.duration), 0)::float8 AS duration,
                   (SELECT count(*) FROM meditations WHERE state = 'running') AS running
              FROM (VALUES (true)) AS always
              LEFT JOIN LATERAL (
                   SELECT finished_at, finished_at - created_at AS duration
                     FROM meditations
                    WHERE user_id IS NULL AND state = 'succeeded'
                    ORDER BY id DESC
                    LIMIT 1
                   ) AS last ON true
            """
        )
        LAST_SUCCESS.set(row["finished"])
        LAST_DURATION.set(row["duration"])
        MEDITATIONS_RUNNING.set(row["running"])

    async def interrupted(self) -> None:
        """Count the meditations that wait to be taken up again, by what became of their jobs."""
        rows = await self._database.fetch_alone(
            """
            SELECT coalesce(bool_or(dead.id IS NOT NULL), false) AS failed
              FROM meditations AS run
              JOIN meditation_shards AS part ON part.meditation_id = run.id AND NOT part.done
             CROSS JOIN LATERAL (
                   SELECT format('%s/%s_%s/%s', $1::text, $2::text, replace(run.id::text, '-', ''),
                                 part.shard) AS unique_key
                   ) AS job
              LEFT JOIN jobs AS live
                ON live.unique_key = job.unique_key AND live.state IN ('waiting', 'running')
              LEFT JOIN LATERAL (
                   SELECT id FROM jobs
                    WHERE kind = $1 AND state = 'dead' AND unique_key = job.unique_key
                    LIMIT 1
                   ) AS dead ON true
             WHERE run.state = 'running'
             GROUP BY run.id
            HAVING bool_and(live.id IS NULL)
            """,
            SHARD_JOB,
            ids.MEDITATION,
        )
        failed = sum(row["failed"] for row in rows)
        set_all(
            MEDITATIONS_INTERRUPTED,
            {("failed",): failed, ("cancelled",): len(rows) - failed},
        )

    async def vectors(self) -> None:
        """Tell how many vectors there are, how much room graphs take, and who waits for some."""
        (row,) = await self._database.fetch_alone(
            """
            SELECT (SELECT coalesce(sum(pg_relation_size(graph.indexrelid)), 0)::float8
                      FROM pg_index AS graph
                      JOIN pg_class AS relation ON relation.oid = graph.indexrelid
                      JOIN pg_am AS method ON method.oid = relation.relam
                     WHERE indrelid = 'embeddings'::regclass AND amname = 'hnsw') AS bytes,
                   (SELECT greatest(reltuples, 0)::float8
                      FROM pg_class
                     WHERE oid = 'embeddings'::regclass) AS vectors,
                   (SELECT count(*)
                      FROM (SELECT FROM jobs WHERE state = 'waiting' AND due AND kind = $1
                             LIMIT $2) AS waiting)
                   + (SELECT count(*) FROM jobs
                       WHERE state = 'running' AND kind = $1) AS waiting
            """,
            KIND,
            _MOST_COUNTED,
        )
        INDEX_BYTES.set(row["bytes"])
        INDEX_VECTORS.set(row["vectors"])
        EMBEDDING_WAITING.set(row["waiting"])


class ShortTermReading:
    """Reads off Valkey what it holds: the short-term tier, and little beside it."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def held(self) -> None:
        """Tell how much of its memory is allocated. Full, it refuses writes."""
        with out_of_reach():
            stats = await self._redis.memory_stats()
        BYTES.labels("short_term").set(stats["total.allocated"])
