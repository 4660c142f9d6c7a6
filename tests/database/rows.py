"""Rows of three users, two of them of one tenant, in every table that belongs to users."""

from __future__ import annotations

import itertools
import re
import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import asyncpg

from server import ids
from server.caller import Caller
from server.migrate import read_migrations

_CREATED: Final = re.compile(r"^CREATE TABLE (\w+) \((.*?)^\)", re.MULTILINE | re.DOTALL)

ALL_TABLES: Final = {
    name: body for migration in read_migrations() for name, body in _CREATED.findall(migration.sql)
}
"""What the migrations create, by name."""

TENANT_TABLES: Final = sorted(
    name for name, body in ALL_TABLES.items() if re.search(r"^ +tenant_id ", body, re.MULTILINE)
)

FIXED: Final[Mapping[str, Mapping[str, object]]] = {
    "accounts": {"password_hash": "$argon2id$"},
    "agents": {"kind": "external", "scopes": "{memory.read}"},
    "api_keys": {"scopes": "{memory.read}", "expires_at": "infinity"},
    "consents": {"purpose": "memory.store", "granted": True},
    "embedding_models": {"dimension": 2},
    "embeddings": {"dimension": 2, "vector": "[0,1]"},
    "invitations": {"role": "member", "expires_at": "infinity"},
    "jobs": {"max_attempts": 5, "payload": "{}"},
    "meditations": {"shards": 1},
    "memory_versions": {"sensitive": False},
    "memories": {"tier": "long_term", "source": "chat", "size_bytes": 100},
    "settings": {
        "language": "english",
        "scoring_preset": "balanced",
        "relevance_to_goals": 0.4,
        "emotional_weight": 0.3,
        "predictive_value": 0.2,
        "recency_frequency": 0.1,
    },
    "mailed_tokens": {"kind": "password_reset"},
    "sessions": {"expires_at": "infinity"},
    "subscriptions": {"plan": "free"},
    "users": {"email": lambda: f"{secrets.token_hex(16)}@example.com"},
    "user_schedules": {"cron": "0 0 * * *", "time_zone": "UTC", "missed": "run_once"},
    "usage_by_month": {"month": "2026-05-01"},
}
"""What the checks of a table want to see in it; everything else is made up by type. What differs
from row to row is called for each."""

ARCHIVED: Final = {"archived_at": "now", "archived_by": "user", "delete_after": "now"}
VARIANTS: Final[Mapping[str, Sequence[Mapping[str, object]]]] = {
    "consents": [{}, {"purpose": "memory.embed"}],
    "memories": [
        {},
        {"scope": "shared"},
        {"scope": "public"},
        {"scope": "shared", **ARCHIVED},
        {"scope": "public", **ARCHIVED},
    ],
}
"""Several rows of each user, where it matters what is in them."""

_numbers = itertools.count(1)


_MADE_UP: Final[Mapping[str, Callable[[], object]]] = {
    "ARRAY": lambda: "{}",
    "bigint": lambda: next(_numbers),
    "boolean": lambda: True,
    "bytea": lambda: f"\\x{secrets.token_hex(32)}",
    "integer": lambda: next(_numbers),
    "smallint": lambda: next(_numbers),
    "sparsevec": lambda: "{}/1000000000",
    "text": lambda: secrets.token_hex(16),
    "timestamp with time zone": lambda: "now",
    "uuid": lambda: str(uuid.uuid4()),
}
"""Some value of each type. Of one that is missing here, fix a value in FIXED, or add it."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose rows belong to users, or to tenants."""

    name: str
    columns: Mapping[str, str]
    """Types of the columns that must be given, by name."""
    user: str | None
    """The column with the user; None: the rows are the tenant's."""

    @property
    def owners(self) -> str:
        """The columns that say whose a row is."""
        return f"tenant_id, {self.user}" if self.user else "tenant_id"

    def rows(self, caller: Caller) -> Iterator[dict[str, object]]:
        """Yield rows of a user."""
        for variant in VARIANTS.get(self.name, [{}]):
            row = {name: _MADE_UP[kind]() for name, kind in self.columns.items()}
            row |= {**FIXED.get(self.name, {}), **variant}
            row |= {name: value() for name, value in row.items() if callable(value)}
            row |= {"tenant_id": str(caller.tenant_id)}
            if self.user:
                row |= {self.user: str(caller.user_id)}
            yield {name: row[name] for name in row}

    def of(self, caller: Caller) -> tuple[uuid.UUID, ...]:
        """Return how the owners' columns of a user's row read."""
        return (caller.tenant_id, caller.user_id) if self.user else (caller.tenant_id,)


async def table(connection: asyncpg.Connection, name: str) -> Table:
    """Return a table as the database describes it."""
    columns = await connection.fetch(
        """
        SELECT column_name, is_nullable = 'NO' AND column_default IS NULL AS is_needed,
               CASE data_type WHEN 'USER-DEFINED' THEN udt_name ELSE data_type END AS type
          FROM information_schema.columns
         WHERE table_schema = 'public' AND table_name = $1
        """,
        name,
    )
    known = {column["column_name"] for column in columns}
    user = "id" if name == "users" else "user_id" if "user_id" in known else None
    needed = {column["column_name"]: column["type"] for column in columns if column["is_needed"]}
    given = {**FIXED.get(name, {}), "tenant_id": None}
    return Table(name, {k: v for k, v in needed.items() if k not in given}, user)


async def insert(connection: asyncpg.Connection, name: str, row: Mapping[str, object]) -> None:
    """Insert a row whose values are given as text."""
    values = ", ".join(f"{_quoted(value)}" for value in row.values())
    await connection.execute(f"INSERT INTO {name} ({', '.join(row)}) VALUES ({values})")


async def populate(connection: asyncpg.Connection, everybody: Sequence[Caller]) -> None:
    """Put rows of everybody into every table, as a replica: nothing is checked but the rows."""
    await connection.execute("SET session_replication_role = replica")
    for name in TENANT_TABLES:
        described = await table(connection, name)
        owners: dict[Any, Caller] = {described.of(caller): caller for caller in everybody}
        for caller in owners.values():
            for row in described.rows(caller):
                await insert(connection, name, row)
    await connection.execute("SET session_replication_role = origin")


def three() -> tuple[Caller, Caller, Caller]:
    """Return two users of one tenant, and one of another."""
    tenant, other = ids.new_id(), ids.new_id()
    return (
        Caller(tenant, ids.new_id()),
        Caller(tenant, ids.new_id()),
        Caller(other, ids.new_id()),
    )


def _quoted(value: object) -> str:
    return "'" + str(value).replace("'", "''") + "'"
