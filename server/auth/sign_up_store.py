"""Sign-ups in Postgres that wait for their email to be confirmed."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server.auth import mail_store
from server.auth.mail import Kind
from server.database import SystemDatabase

MOST_WITHIN: Final = 10
"""Sign-ups of one email within `_WITHIN`: more of them are not kept, and nobody is written to."""

_WITHIN: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class SignUp:
    """Who wants an account."""

    id: UUID
    email: str
    display_name: str
    password_hash: str


class SignUpStore:
    """Keeps sign-ups. Each has a mail of its own: nobody takes another's place."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def ask(self, sign_up: SignUp, now: datetime) -> None:
        """Keep a sign-up and ask for its mail. Does the same whether or not there is an account."""
        async with self._database.transaction() as connection:
            kept = await connection.fetchval(
                """
                INSERT INTO sign_ups
                       (id, email, display_name, password_hash, requested_at, expires_at)
                SELECT $1, $2, $3, $4, $5, $6
                 WHERE (SELECT count(*)
                          FROM sign_ups
                         WHERE email = $2 AND requested_at > $7) < $8
                RETURNING id
                """,
                sign_up.id,
                sign_up.email,
                sign_up.display_name,
                sign_up.password_hash,
                now,
                now + mail_store.lifetime_of(Kind.SIGN_UP),
                now - _WITHIN,
                MOST_WITHIN,
            )
            if kept is not None:
                await mail_store.ask_for(
                    connection, sign_up.email, Kind.SIGN_UP, now, about=str(sign_up.id)
                )

    async def forget(self, now: datetime) -> None:
        """Delete sign-ups that nobody confirmed in time."""
        async with self._database.transaction() as connection:
            await connection.execute("DELETE FROM sign_ups WHERE expires_at <= $1", now)
