"""`python -m tests.faults.unfenced_service PROCESS`: a service that takes outcomes of any lease."""

import asyncpg

from server import database
from server.__main__ import app
from tests.faults.test_guards import TOKEN, WORKER

_fetch_alone = database.SystemDatabase.fetch_alone


async def _unfenced(
    self: database.SystemDatabase, statement: str, *arguments: object
) -> list[asyncpg.Record]:
    """Run a statement of the queue without the comparison that fences outcomes."""
    for guard, instead in (TOKEN, WORKER):
        statement = statement.replace(guard, instead)
    return await _fetch_alone(self, statement, *arguments)


def unfence() -> None:
    """Have the queue take outcomes of any lease from now on."""
    database.SystemDatabase.fetch_alone = _unfenced  # type: ignore[method-assign]


if __name__ == "__main__":
    unfence()
    app()
