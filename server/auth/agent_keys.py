"""The keys of agents: API keys that AgentService makes, rotates and ends for their users.

Every method is a part of a transaction of the system role, that of the change it belongs to.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from server import ids
from server.auth import api_key_store
from server.auth.api_keys import ApiKey, Secret, check_expiry, check_overlap
from server.caller import ActingAgent, Caller
from server.database import Connection

_EXPIRY: Final = "key_expire_time"


class AgentKeys:
    """Each agent has one key, and is who acts in what is told of it."""

    async def hold_grant(self, connection: Connection, caller: Caller, grant_id: UUID) -> None:
        """Make sure that what a call was made with may make keys until this transaction ends.

        Raises:
            Unauthenticated: It has ended.
        """
        await api_key_store.hold_grant(connection, caller, grant_id)

    async def create(
        self,
        connection: Connection,
        caller: Caller,
        agent: ActingAgent,
        name: str,
        scopes: Sequence[str],
        now: datetime,
        expires_at: datetime | None,
    ) -> str:
        """Make the key of a new agent and return what opens it.

        Raises:
            InvalidArgument: It would have ended already, or live for too long.
        """
        secret = Secret.new()
        key = ApiKey(
            id=ids.new_id(),
            caller=Caller(caller.tenant_id, caller.user_id, agent),
            name=name,
            prefix=secret.prefix,
            scopes=scopes,
            created_at=now,
            expires_at=check_expiry(expires_at, _EXPIRY, now),
        )
        await api_key_store.insert_key(connection, key)
        await api_key_store.insert_secret(connection, key, secret)
        return secret.text

    async def rotate(
        self,
        connection: Connection,
        caller: Caller,
        agent: ActingAgent,
        now: datetime,
        overlap: timedelta,
        expires_at: datetime | None,
    ) -> str:
        """Give an agent's key another secret and another end, and return what opens it.

        Raises:
            InvalidArgument: The old secret would stay for too long, or the new one.
            NotFound: There is no such agent that is not deleted.
        """
        key = await api_key_store.lock_key_of(connection, caller, agent)
        secret = Secret.new()
        until = check_expiry(expires_at, _EXPIRY, now)
        overlap = check_overlap(overlap, "overlap")
        await api_key_store.retire_secrets(connection, key, now, overlap)
        renewed = await api_key_store.renew(connection, key, secret.prefix, until)
        await api_key_store.insert_secret(connection, renewed, secret)
        return secret.text

    async def pause(self, connection: Connection, caller: Caller, agent: ActingAgent) -> None:
        """Have the access tokens of an agent refused; its key waits until it is enabled."""
        key = await api_key_store.lock_key_of(connection, caller, agent)
        await api_key_store.replace_grants(connection, caller, key.id)

    async def revoke(
        self, connection: Connection, caller: Caller, agent: ActingAgent, now: datetime
    ) -> None:
        """End an agent's key and everything that was made with it."""
        key = await api_key_store.lock_key_of(connection, caller, agent)
        await api_key_store.end_key(connection, key, now)
