"""Sensitive memories: sealed as they are written, opened as their user reads them.

A row holds the text sealed, a keyed hash of it, and its size; what else there is of the memory
stays readable. Its words are in no index unless its user chose that. Then it is found by its own
words: the turns around it neither lend it theirs nor hold any of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from uuid import UUID

from pgvector import SparseVector

from server import consent, ids
from server.access import Scope
from server.caller import Caller
from server.data_keys import DataKeys
from server.database import Connection
from server.errors import ContentUnreadable, ScopeMissing
from server.memory.conversation import NO_TERMS, Surroundings
from server.memory.model import Draft, Memory
from server.memory.sealing import binding, keyed_hash, seal, unseal
from server.preferences import Language


@dataclass(frozen=True, slots=True)
class Sealing:
    """How one transaction keeps the sensitive content of its user."""

    caller: Caller
    language: Language
    is_indexed: bool
    """Whether the user wants sensitive memories to be found by their words."""
    key: bytes = field(repr=False)

    def recognised(self, draft: Draft) -> Draft:
        """Return a draft with the hash that it is recognised by if it is sensitive."""
        if not draft.is_sensitive:
            return draft
        return replace(draft, keyed_hash=self.hash_of(draft.content))

    def hash_of(self, text: str) -> bytes:
        """Return the hash that a text is recognised by."""
        return keyed_hash(self.key, text)

    def seal(self, memory_id: UUID, content: str) -> bytes:
        """Return the content of a memory as it is kept."""
        return seal(self.key, content, binding(self.caller, memory_id))

    def open(self, memory_id: UUID, sealed: bytes) -> str:
        """Return the content of a memory.

        Raises:
            ContentUnreadable: It does not open; tells which memory it is of.
        """
        return _open(self.key, self.caller, memory_id, sealed)

    def terms_of(self, content: str) -> SparseVector:
        """Return the terms that the content is found by."""
        if not self.is_indexed:
            return NO_TERMS
        return Surroundings((), self.language).terms(content, None)


async def begin_sealing(
    connection: Connection,
    caller: Caller,
    keys: DataKeys,
    language: Language,
    *,
    needs_consent: bool = True,
) -> Sealing:
    """Return how this transaction keeps sensitive content.

    To be called before the transaction locks rows, after `begin_writing`, which holds the choice
    of what is indexed until the commit; and after `keys.prepare`, before the transaction.

    Raises:
        ConsentMissing: The user has not consented to memory.sensitive.
        ScopeMissing: It is the transaction of an agent without the scope memory.sensitive.
        ContentUnreadable: The user's key cannot be unwrapped.
        StoreUnavailable: The key manager does not answer.
    """
    if caller.agent and not caller.agent.sees_sensitive:
        raise ScopeMissing(Scope.MEMORY_SENSITIVE)
    if needs_consent:
        await consent.require(connection, consent.MEMORY_SENSITIVE)
    is_indexed = await connection.fetchval(
        "SELECT index_sensitive FROM settings WHERE tenant_id = $1 AND user_id = $2",
        caller.tenant_id,
        caller.user_id,
    )
    key = await keys.key_of(connection, caller)
    return Sealing(caller, language, bool(is_indexed), key)


class Opener:
    """Opens what is sealed, for whoever shows it to its user."""

    def __init__(self, keys: DataKeys) -> None:
        self._keys = keys

    async def opened(self, caller: Caller, memories: Iterable[Memory]) -> list[Memory]:
        """Return memories in their order, all of them open.

        The caller's key is looked up once, and only if one of them is sealed.

        Raises:
            ContentUnreadable: One does not open; tells which one.
            StoreUnavailable: A store or the key manager does not answer.
        """
        found = list(memories)
        first = next((memory for memory in found if memory.sealed is not None), None)
        if first is None:
            return found
        try:
            key = await self._keys.existing_key_of(caller)
        except ContentUnreadable as error:
            raise _unreadable(first.id) from error
        return [_opened(key, caller, memory) for memory in found]

    async def opened_one(self, caller: Caller, memory: Memory) -> Memory:
        """Return a memory, open; see `opened`."""
        (opened,) = await self.opened(caller, [memory])
        return opened


def _opened(key: bytes, caller: Caller, memory: Memory) -> Memory:
    if memory.sealed is None:
        return memory
    content = _open(key, caller, memory.id, memory.sealed)
    return replace(memory, content=content, sealed=None)


def _open(key: bytes, caller: Caller, memory_id: UUID, sealed: bytes) -> str:
    try:
        return unseal(key, sealed, binding(caller, memory_id))
    except ContentUnreadable as error:
        raise _unreadable(memory_id) from error


def _unreadable(memory_id: UUID) -> ContentUnreadable:
    """Return the refusal that names the memory: deleting it needs no key."""
    return ContentUnreadable(f"the content of {ids.show(ids.MEMORY, memory_id)}")
