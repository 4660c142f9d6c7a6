"""PostgreSQL: pools, and transactions that see one user's rows."""

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from datetime import timedelta
from weakref import WeakValueDictionary

import asyncpg
import pgvector.asyncpg
import structlog
from asyncpg.pool import PoolConnectionProxy as Connection

from server import tracing
from server.caller import ActingAgent, Caller
from server.errors import (
    AccountErased,
    AgentDisabled,
    ConsentMissing,
    Problem,
    RateLimited,
    StoreUnavailable,
)
from server.metering import ledger

type_codecs = pgvector.asyncpg.register_vector


ACQUIRE_SECONDS = 5.0
_COME_BACK = timedelta(seconds=1)
_OUT_OF_REACH = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.exceptions.OperatorInterventionError,
    asyncpg.TooManyConnectionsError,
    # What asyncpg says of an idle connection whose end it has read but not yet understood.
    asyncpg.InternalClientError,
)
_SHOWN_OF_A_STATEMENT = 200
_REFUSALS: Mapping[str, Callable[[], Problem]] = {
    "KM002": AccountErased,
    "KM003": functools.partial(ConsentMissing, "memory.agent_access"),
    "KM004": AgentDisabled,
}
"""What the functions refuse_erased and act_as raise."""
_SETTINGS = {
    "jit": "off",
    "plan_cache_mode": "force_generic_plan",
    "statement_timeout": "15s",
    "lock_timeout": "5s",
    "idle_in_transaction_session_timeout": "15s",
}

log = structlog.get_logger()

__all__ = ["Connection", "Database", "SystemDatabase", "enter", "open_pool"]


@contextmanager
def _traced(connection: Connection) -> Iterator[None]:
    """Note the statements of a transaction that is part of a trace; others pay nothing for it."""
    if not tracing.is_traced():
        yield
        return
    connection.add_query_logger(_trace)
    try:
        yield
    finally:
        with suppress(asyncpg.InterfaceError):  # the connection was given up
            connection.remove_query_logger(_trace)


def _trace(query: asyncpg.connection.LoggedQuery) -> None:
    """Note a statement in the trace that it is part of: its text, never its parameters."""
    statement = " ".join(query.query.split())
    tracing.has_been(
        f"sql {statement.partition(' ')[0].upper()}",
        query.elapsed,
        {"db.system": "postgresql", "db.statement": statement[:_SHOWN_OF_A_STATEMENT]},
        error=type(query.exception).__name__ if query.exception else "",
    )


async def _keep(_connection: asyncpg.Connection) -> None:
    """Reset nothing: all state that we set is local to a transaction."""


async def open_pool(
    url: str, *, size: int, name: str, settings: Mapping[str, str] | None = None
) -> asyncpg.Pool:
    """Open a pool of at most `size` connections.

    Args:
        url: Whom to connect to, and as whom.
        size: How many connections at most.
        name: Shows in pg_stat_activity.
        settings: Further settings of PostgreSQL that its connections have.
    """
    return await asyncpg.create_pool(
        url,
        min_size=min(2, size),
        max_size=size,
        server_settings={**_SETTINGS, **(settings or {}), "application_name": name},
        init=type_codecs,
        reset=_keep,
        command_timeout=30,
    )


class Database:
    """PostgreSQL as the application role. Row-level security shows one user's rows."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._share = max(1, pool.get_max_size() // 2)
        self._turns: WeakValueDictionary[Caller, asyncio.Semaphore] = WeakValueDictionary()

    def transaction(
        self, caller: Caller, *, in_index_order: bool = False
    ) -> AbstractAsyncContextManager[Connection]:
        """Open a transaction that sees and changes only the rows of one user.

        Of an agent it is only as long as the user lets agents act for them, and begins with that.

        Args:
            caller: The user.
            in_index_order: Whether rows are read in the order of an index rather than sorted. Of
                a page the planner does not see that it is one: it believes that a user has as few
                rows as the average one, and would read and sort all that they have.

        Raises:
            ConsentMissing: An agent acts, and the user does not consent to memory.agent_access.
            AgentDisabled: An agent acts that is disabled or gone.
            RateLimited: Calls of the user wait for each other for too long.
            StoreUnavailable: PostgreSQL does not answer. After a commit was sent the outcome
                is not known.
        """
        # One simple-protocol message: BEGIN and the settings cost a single round trip. The
        # ids are UUID objects, so that nothing but hexadecimal digits can reach the text.
        return _transaction(
            self._lent(caller),
            f"BEGIN; SET LOCAL kimberly.tenant_id = '{caller.tenant_id!s}'; "
            f"SET LOCAL kimberly.user_id = '{caller.user_id!s}'"
            + ("; SET LOCAL enable_sort = off" if in_index_order else "")
            + (f"; {_acting(caller.agent)}" if caller.agent else ""),
        )

    async def fetch(self, caller: Caller, query: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one reading query for a user in a single round trip.

        The query names the user as `caller.tenant_id` and `caller.user_id`; its own parameters
        start at $3. It runs under the same row-level security as in `transaction`: should it
        ever be planned ahead of `enter`, it sees no rows.

        An agent's query takes the trips of a transaction.

        Raises:
            ConsentMissing: As in `transaction`.
            AgentDisabled: As in `transaction`.
            RateLimited: As in `transaction`.
            StoreUnavailable: PostgreSQL does not answer.
        """
        given = (_entered(query), caller.tenant_id, caller.user_id, *arguments)
        rows: list[asyncpg.Record]
        if caller.agent:
            async with self.transaction(caller) as connection:
                rows = await connection.fetch(*given)
            return rows
        with _translated():
            async with self._lent(caller) as connection:
                with _traced(connection):
                    rows = await connection.fetch(*given)
        return rows

    async def fetch_alone(
        self, caller: Caller, statement: str, *arguments: object
    ) -> list[asyncpg.Record]:
        """Run one writing statement that is a transaction of its own: it commits as it ends.

        It names the user itself: all that it reads and writes must follow from enter(tenant,
        user). What runs ahead of that sees no rows, and row-level security lets it write none.

        Raises:
            RateLimited: As in `transaction`.
            StoreUnavailable: PostgreSQL does not answer. Whether it was committed is not known.
        """
        with _translated():
            async with self._lent(caller) as connection:
                with _traced(connection):
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments)
        return rows

    @asynccontextmanager
    async def _lent(self, caller: Caller) -> AsyncIterator[Connection]:
        """Lend a connection. A user has half of them at most: the calls of others find some."""
        turn = self._turns.setdefault(caller, asyncio.Semaphore(self._share))
        try:
            async with asyncio.timeout(ACQUIRE_SECONDS):
                await turn.acquire()
        except TimeoutError:
            raise RateLimited("calls of this user at once", _COME_BACK) from None
        try:
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                yield connection
        finally:
            turn.release()


async def enter(connection: Connection, caller: Caller) -> None:
    """Have a transaction of the system role act as a user, or as an agent of theirs.

    Raises:
        ConsentMissing: As in `Database.transaction`.
        AgentDisabled: As in `Database.transaction`.
    """
    await connection.execute("SELECT enter($1, $2)", caller.tenant_id, caller.user_id)
    if caller.agent:
        await connection.execute(_acting(caller.agent))


def _acting(agent: ActingAgent) -> str:
    # As above: an id is nothing but hexadecimal digits.
    return f"SELECT act_as('{agent.id!s}', {agent.sees_sensitive})"


@functools.cache
def _entered(query: str) -> str:
    # LATERAL makes the query wait for `enter`; OFFSET 0 keeps the planner from merging the two.
    return f"SELECT row.* FROM enter($1, $2) AS caller, LATERAL ({query} OFFSET 0) AS row"  # noqa: S608 - our own queries


class SystemDatabase:
    """PostgreSQL as the system role, for what belongs to no single user."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    @property
    def connections(self) -> int:
        """How many there are at most."""
        size: int = self._pool.get_max_size()
        return size

    def transaction(self) -> AbstractAsyncContextManager[Connection]:
        """Open a transaction that sees all tenants.

        Raises:
            StoreUnavailable: As in `Database.transaction`.
        """
        return _transaction(self._pool.acquire(timeout=ACQUIRE_SECONDS), "BEGIN")

    async def fetch_alone(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement that is a transaction of its own, in a single round trip.

        Raises:
            StoreUnavailable: As in `Database.transaction`.
        """
        with _translated():
            async with self._pool.acquire(timeout=ACQUIRE_SECONDS) as connection:
                with _traced(connection):
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments)
        return rows


@asynccontextmanager
async def _transaction(
    lent: AbstractAsyncContextManager[Connection], opening: str
) -> AsyncIterator[Connection]:
    with _translated():
        async with lent as connection:
            with _traced(connection):
                try:
                    await connection.execute(opening)
                    yield connection
                except BaseException:
                    await _roll_back(connection)
                    raise
                await connection.execute("COMMIT")
                if noted := ledger():
                    noted.settle(connection)


@contextmanager
def _translated() -> Iterator[None]:
    """Say what went wrong with PostgreSQL in our words."""
    try:
        yield
    except asyncpg.QueryCanceledError as error:
        raise TimeoutError from error
    except _OUT_OF_REACH as error:
        if isinstance(error, TimeoutError) and _is_cancelling():
            raise
        log.warning("database out of reach", error=repr(error))
        raise StoreUnavailable("the database") from error
    except asyncpg.PostgresError as error:
        refusal = _REFUSALS.get(error.sqlstate)
        if refusal is None:
            raise
        problem = refusal()
        raise problem from error


def _is_cancelling() -> bool:
    """Tell whether the task is being cancelled by its deadline rather than by a slow store."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _roll_back(connection: Connection) -> None:
    """Undo, or give the connection up: it must never go back to the pool inside a transaction."""
    try:
        await asyncio.shield(connection.execute("ROLLBACK", timeout=2))
    except BaseException as error:
        with suppress(asyncpg.InterfaceError):  # the pool may have taken it back meanwhile
            connection.terminate()
        if not isinstance(error, Exception):
            raise
