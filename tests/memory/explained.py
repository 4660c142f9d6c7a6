"""How PostgreSQL runs a statement of ours, as it is really sent."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

LARGE = {"memories", "memory_scores", "embeddings"}


@dataclass(frozen=True, slots=True)
class Node:
    """A step of a plan, and what it looks at if it is a scan."""

    kind: str
    table: str = ""
    index: str = ""
    rows: int = 0
    """How many it looked at, those included that it left out; 0: it was not run."""

    def __str__(self) -> str:
        """Return what tells a good plan from a bad one."""
        place = self.index or self.table
        return f"{self.kind} {place}" if place else self.kind


@dataclass(frozen=True, slots=True)
class Plan:
    """How a statement was run, and how it is run once its plan fits all parameters."""

    ran: tuple[Node, ...]
    """With the parameters that it had."""
    lasting: tuple[Node, ...]
    """With any: what connections of our pools settle on, as they are told to."""
    buffers: int
    """Pages of 8 KiB that were looked at."""

    @property
    def indexes(self) -> set[str]:
        """The indexes of large tables that are used; none of these is read as a whole."""
        scans = [node for node in (*self.ran, *self.lasting) if node.table or node.index]
        assert not [scan for scan in scans if scan.kind == "Seq Scan" and scan.table in LARGE]
        return {scan.index for scan in scans if scan.table in LARGE | {""} and scan.index}

    @property
    def scans(self) -> set[str]:
        """How the plan that lasts reaches large tables."""
        return {str(node) for node in self.lasting if node.table in LARGE and "Scan" in node.kind}

    @property
    def joins(self) -> set[str]:
        """How the plan that lasts puts rows together."""
        return {node.kind for node in self.lasting if node.kind in _JOINS}


_JOINS = {"Nested Loop", "Hash Join", "Merge Join"}


async def explained(pool: asyncpg.Pool, part: str, call: Awaitable[object]) -> Plan:
    """Return the plan of the last statement of a call that has this part in its text.

    Args:
        pool: A pool of one connection, which the call uses.
        part: What only that statement has.
        call: What sends the statement.
    """
    noted: list[Any] = []
    async with pool.acquire() as connection:
        only = connection._con
    with only.query_logger(noted.append):
        await call
    place = max(place for place, one in enumerate(noted) if part in one.query)
    statement = noted[place]
    async with pool.acquire() as connection:
        for setting in _settings(noted[:place]):
            await connection.execute(setting)
        try:
            run = await connection.fetchval(
                f"EXPLAIN (ANALYZE, FORMAT json) {statement.query}", *statement.args
            )
            await connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            await connection.execute(f"PREPARE hot AS {statement.query}")
            nulls = ", ".join(["NULL"] * len(statement.args))
            any_time = await connection.fetchval(f"EXPLAIN (FORMAT json) EXECUTE hot ({nulls})")
            await connection.execute("DEALLOCATE hot")
        finally:
            await connection.execute("ROLLBACK")
    ran = json.loads(run)[0]["Plan"]
    return Plan(
        tuple(_nodes(ran)),
        tuple(_nodes(json.loads(any_time)[0]["Plan"])),
        ran["Shared Hit Blocks"] + ran["Shared Read Blocks"],
    )


def _settings(before: Sequence[Any]) -> list[str]:
    """Return how the transaction began that a statement is in, and what was set in it."""
    texts = [one.query for one in before]
    begun = [place for place, text in enumerate(texts) if text.startswith("BEGIN")]
    if not begun or "COMMIT" in texts[begun[-1] :]:
        return ["BEGIN"]
    return [texts[begun[-1]], *(text for text in texts[begun[-1] :] if "SET LOCAL" in text)]


def _nodes(plan: dict[str, Any]) -> Iterator[Node]:
    read = plan.get("Actual Rows", 0) + plan.get("Rows Removed by Filter", 0)
    yield Node(
        plan["Node Type"],
        plan.get("Relation Name", ""),
        plan.get("Index Name", ""),
        round(read * plan.get("Actual Loops", 0)),
    )
    for child in plan.get("Plans", ()):
        yield from _nodes(child)
