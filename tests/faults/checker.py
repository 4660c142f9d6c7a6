"""One checker judges all runs: acknowledged ⊆ stored ⊆ attempted, and every effect once."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import asyncpg

from server import ids
from tests.faults.history import History, Op, Outcome

SLACK_SECONDS = 1.0
"""How late a call may be seen to end: our own event loop shares two cores with the mesh."""

Place = tuple[UUID, str]
"""A user and a content."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What Postgres holds of some users, read past row-level security."""

    memories: Sequence[tuple[Place, str, int]]
    """Place, id as the API shows it, and how often it was seen again."""
    requests: dict[tuple[UUID, str], str]
    """The memory that each request id made."""
    events: Counter[tuple[str, str]]
    """How many audit events there are of an action on a memory."""


@dataclass(slots=True)
class Verdict:
    """What is wrong. Each list is empty when nothing is."""

    operations: int = 0
    memories: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    unresolved: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)
    """Stored and never asked for, or audited and not stored."""
    unforeseen: list[str] = field(default_factory=list)

    @property
    def problems(self) -> dict[str, list[str]]:
        """What is wrong, by its name; the first few of each."""
        names = ("lost", "duplicated", "unresolved", "overdue", "invented", "unforeseen")
        return {name: found[:10] for name in names if (found := getattr(self, name))}


async def read_stored(superuser: asyncpg.Connection, users: Iterable[UUID]) -> Stored:
    """Read what is stored of some users."""
    whose = list(users)
    memories = await superuser.fetch(
        """
        SELECT memory.user_id, id, content, use_count
          FROM memories AS memory
          JOIN memory_scores AS scores
            ON scores.user_id = memory.user_id AND scores.memory_id = memory.id
         WHERE memory.user_id = ANY ($1)
        """,
        whose,
    )
    requests = await superuser.fetch(
        "SELECT user_id, request_id, resource_id FROM requests WHERE user_id = ANY ($1)", whose
    )
    events = await superuser.fetch(
        """
        SELECT action, resource, count(*) AS times
          FROM audit_events
         WHERE user_id = ANY ($1) AND action LIKE 'memory.%'
         GROUP BY action, resource
        """,
        whose,
    )
    return Stored(
        [
            ((row["user_id"], row["content"]), ids.show(ids.MEMORY, row["id"]), row["use_count"])
            for row in memories
        ],
        {
            (row["user_id"], row["request_id"]): ids.show(ids.MEMORY, row["resource_id"])
            for row in requests
        },
        Counter({(row["action"], row["resource"]): row["times"] for row in events}),
    )


def judge(history: History, stored: Stored) -> Verdict:
    """Compare what was answered with what is there."""
    verdict = Verdict(operations=len(history.ops), unforeseen=history.unforeseen)
    _judge_memories(history, stored, verdict)
    _judge_requests(history, stored, verdict)
    _judge_audit(stored, verdict)
    verdict.overdue = [
        f"{op.op} took {op.end - op.start:.2f} of {op.deadline_seconds} s: {op.code}"
        for op in history.ops
        if op.end - op.start > op.deadline_seconds + SLACK_SECONDS
    ]
    return verdict


def _judge_memories(history: History, stored: Stored, verdict: Verdict) -> None:
    attempted: set[Place] = set()
    acknowledged: set[Place] = set()
    for op in history.writes():
        places = {(_user(op), value) for value in op.values}
        attempted |= places
        if op.outcome is Outcome.OK:
            acknowledged |= places
    there = Counter(place for place, _, _ in stored.memories)
    verdict.memories = len(acknowledged)
    verdict.lost += [content for _, content in sorted(acknowledged - there.keys())]
    verdict.invented += [content for _, content in sorted(there.keys() - attempted)]
    verdict.duplicated += [content for (_, content), times in there.items() if times > 1]
    # Nothing is ever asked for twice but by a retry: a memory that was seen again counted one.
    verdict.duplicated += [
        f"{memory} was seen again" for _, memory, seen in stored.memories if seen
    ]


def _judge_requests(history: History, stored: Stored, verdict: Verdict) -> None:
    made = {place: memory for place, memory, _ in stored.memories}
    tries: dict[tuple[UUID, str], list[Op]] = defaultdict(list)
    for op in history.writes():
        tries[_user(op), op.key].append(op)
    for (user, key), ops in tries.items():
        if all(op.outcome is not Outcome.OK for op in ops):
            verdict.unresolved.append(f"{ops[0].op} {key} after {len(ops)} tries")
        if ops[0].op != "create":
            continue
        answers = {op.answer for op in ops if op.outcome is Outcome.OK}
        effect = made.get((user, ops[0].values[0]))
        if len(answers) > 1:
            verdict.duplicated.append(f"request {key} answered {sorted(answers)}")
        if answers and answers != {effect}:
            verdict.lost.append(f"request {key} answered {sorted(answers)}, stored is {effect}")
        if stored.requests.get((user, key)) != effect:
            verdict.invented.append(f"request {key} stands for another memory than {effect}")


def _judge_audit(stored: Stored, verdict: Verdict) -> None:
    memories = {memory for _, memory, _ in stored.memories}
    for memory in memories:
        times = stored.events["memory.create", memory]
        if times != 1:
            (verdict.duplicated if times else verdict.lost).append(
                f"{memory} has {times} audit events of its creation"
            )
    for action, resource in stored.events:
        if action != "memory.create" or resource not in memories:
            verdict.invented.append(f"audit event {action} {resource}")


def _user(op: Op) -> UUID:
    return ids.parse(ids.USER, op.user, "user")
