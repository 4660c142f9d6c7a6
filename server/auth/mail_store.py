"""The outbox of mails, and the tokens in them, in Postgres."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server import audit, ids
from server.auth.mail import Kind
from server.auth.refresh_tokens import hash_of
from server.caller import Caller
from server.database import Connection, SystemDatabase

PAUSE: Final = timedelta(minutes=1)
"""Nobody is sent the same mail more often."""
_LIFETIMES: Final = {
    Kind.PASSWORD_RESET: timedelta(hours=1),
    Kind.EMAIL_VERIFICATION: timedelta(hours=24),
    Kind.INVITATION: timedelta(days=7),
    Kind.SIGN_UP: timedelta(hours=24),
    Kind.SIGN_UP_TAKEN: timedelta(hours=24),
}
_MOST_ATTEMPTS: Final = 12
_RETRY_AFTER: Final = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class Request:
    """A mail that was asked for."""

    email: str
    kind: Kind
    about: str


async def ask_for(
    connection: Connection, email: str, kind: Kind, now: datetime, *, about: str = ""
) -> None:
    """Ask for a mail, whoever the email names. Within `PAUSE` of the last one, nothing happens.

    Args:
        connection: The transaction to ask in.
        email: Who is written to.
        kind: Why.
        now: The instant.
        about: Id of the invitation or sign-up, if it is of one.
    """
    await connection.execute(
        """
        INSERT INTO mails (email, kind, about, requested_at, due_at)
        VALUES ($1, $2, $5, $3, $3)
            ON CONFLICT (email, kind, about) DO UPDATE
           SET requested_at = $3,
               due_at = CASE WHEN mails.sent_at <= $4 THEN $3 ELSE mails.due_at END,
               attempts = CASE WHEN mails.sent_at <= $4 THEN 0 ELSE mails.attempts END,
               sent_at = CASE WHEN mails.sent_at <= $4 THEN NULL ELSE mails.sent_at END
        """,
        email,
        kind.value,
        now,
        now - PAUSE,
        about,
    )


async def use_token(
    connection: Connection, token: str, kind: Kind, now: datetime
) -> tuple[Caller, str] | None:
    """Use a mailed token up.

    Returns:
        The user and the email that the token was sent to, which is still the user's; or None.
    """
    row = await connection.fetchrow(
        """
        DELETE FROM mailed_tokens AS token
         USING users
         WHERE token.hash = $1 AND token.kind = $2 AND token.expires_at > $3
           AND users.id = token.user_id AND users.tenant_id = token.tenant_id
           AND users.email = token.email
        RETURNING token.tenant_id, token.user_id, token.email
        """,
        hash_of(token),
        kind.value,
        now,
    )
    if row is None:
        return None
    await _forget_tokens(connection, row["user_id"], kind)
    return Caller(row["tenant_id"], row["user_id"]), row["email"]


class MailStore:
    """What is to be mailed to whom."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def ask_for(self, email: str, kind: Kind, now: datetime) -> None:
        """Ask for a mail. Does the same whether or not the email names an account."""
        async with self._database.transaction() as connection:
            await ask_for(connection, email, kind, now)

    async def is_living(self, token: str, kind: Kind, now: datetime) -> bool:
        """Tell whether a mailed token could be used."""
        async with self._database.transaction() as connection:
            living: bool = await connection.fetchval(
                """
                SELECT EXISTS (SELECT FROM mailed_tokens
                                WHERE hash = $1 AND kind = $2 AND expires_at > $3)
                """,
                hash_of(token),
                kind.value,
                now,
            )
        return living

    async def take(self, now: datetime) -> Request | None:
        """Return a mail that is due. Should nobody settle it, it is due again a little later."""
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                UPDATE mails
                   SET attempts = attempts + 1,
                       due_at = $1::timestamptz + $2::interval * (1 << attempts)
                 WHERE (email, kind, about) = (
                           SELECT email, kind, about
                             FROM mails
                            WHERE sent_at IS NULL AND due_at <= $1 AND attempts < $3
                            ORDER BY due_at
                            LIMIT 1
                              FOR UPDATE SKIP LOCKED)
                RETURNING email, kind, about
                """,
                now,
                _RETRY_AFTER,
                _MOST_ATTEMPTS,
            )
        return Request(row["email"], Kind(row["kind"]), row["about"]) if row else None

    async def address(self, request: Request, token: str, now: datetime) -> Kind | None:
        """Store the token of a mail, if its email names somebody whom it is for.

        Returns:
            Which mail it is that they get; None: none.
        """
        match request.kind:
            case Kind.INVITATION:
                is_for = await self._address_invitation(request, token, now)
            case Kind.SIGN_UP:
                return await self._address_sign_up(request, token, now)
            case _:
                is_for = await self._address_user(request, token, now)
        return request.kind if is_for else None

    async def _address_user(self, request: Request, token: str, now: datetime) -> bool:
        async with self._database.transaction() as connection:
            row = await connection.fetchrow(
                """
                INSERT INTO mailed_tokens (tenant_id, user_id, hash, kind, email, expires_at)
                SELECT tenant_id, id, $2, $3, email, $4
                  FROM users
                 WHERE email = $1 AND NOT ($3 = 'email_verification'
                                           AND email_verified_at IS NOT NULL)
                RETURNING tenant_id, user_id
                """,
                request.email,
                hash_of(token),
                request.kind.value,
                now + _LIFETIMES[request.kind],
            )
            if row is None:
                return False
            caller = Caller(row["tenant_id"], row["user_id"])
            action = f"{request.kind.value}.mail"
            await audit.record(connection, caller, action, ids.show(ids.USER, caller.user_id))
        return True

    async def _address_invitation(self, request: Request, token: str, now: datetime) -> bool:
        async with self._database.transaction() as connection:
            addressed = await connection.fetchval(
                """
                UPDATE invitations
                   SET token_hash = $2
                 WHERE id = $1 AND email = $3 AND expires_at > $4
                   AND accepted_at IS NULL AND revoked_at IS NULL
                RETURNING id
                """,
                UUID(request.about),
                hash_of(token),
                request.email,
                now,
            )
        return addressed is not None

    async def _address_sign_up(self, request: Request, token: str, now: datetime) -> Kind | None:
        """Store the token of a sign-up, unless its email has come to name an account."""
        async with self._database.transaction() as connection:
            addressed = await connection.fetchrow(
                """
                UPDATE sign_ups
                   SET token_hash = CASE WHEN users.id IS NULL THEN $2::bytea END
                  FROM sign_ups AS asked
                  LEFT JOIN users ON users.email = asked.email
                 WHERE sign_ups.id = $1 AND asked.id = $1 AND sign_ups.expires_at > $3
                RETURNING users.tenant_id, users.id AS user_id
                """,
                UUID(request.about),
                hash_of(token),
                now,
            )
            if addressed is None:
                return None
            if addressed["user_id"] is None:
                return Kind.SIGN_UP
            caller = Caller(addressed["tenant_id"], addressed["user_id"])
            kind = Kind.SIGN_UP_TAKEN
            await audit.record(
                connection, caller, f"{kind.value}.mail", ids.show(ids.USER, caller.user_id)
            )
        return kind

    async def settle(self, request: Request, now: datetime) -> None:
        """Note that a mail was sent."""
        async with self._database.transaction() as connection:
            await connection.execute(
                "UPDATE mails SET sent_at = $4 WHERE email = $1 AND kind = $2 AND about = $3",
                request.email,
                request.kind.value,
                request.about,
                now,
            )

    async def forget(self, now: datetime) -> None:
        """Delete mails that were sent or given up, and tokens that have expired."""
        async with self._database.transaction() as connection:
            await connection.execute(
                """
                DELETE FROM mails
                 WHERE sent_at <= $1 OR (attempts >= $2 AND due_at <= $3)
                """,
                now - PAUSE,
                _MOST_ATTEMPTS,
                now,
            )
            await connection.execute("DELETE FROM mailed_tokens WHERE expires_at <= $1", now)


def lifetime_of(kind: Kind) -> timedelta:
    """Return how long a mailed token may be used."""
    return _LIFETIMES[kind]


async def _forget_tokens(connection: Connection, user_id: UUID, kind: Kind) -> None:
    await connection.execute(
        "DELETE FROM mailed_tokens WHERE user_id = $1 AND kind = $2", user_id, kind.value
    )
