"""The user service and both key managers, beside the memory service; and who agreed to secrets."""

from __future__ import annotations

import pytest
import pytest_asyncio

from server.caller import Caller
from server.database import Database
from tests.conftest import new_caller
from tests.deciding import write_decision
from tests.kms import conftest as of_kms
from tests.users import conftest as of_users

# The user service and both key managers, and what they are made of.
users = of_users.users
audit_log = of_users.audit_log
consents = of_users.consents
withdrawals = of_users.withdrawals
archive_of_checkpoints = of_users.archive
audit_keys = of_users.audit_keys
checkpoint_store = of_users.checkpoint_store
master = of_kms.master
vault = of_kms.vault
vault_server = of_kms.vault_server
token_file = of_kms.token_file


@pytest.fixture(name="archive")
def _archive(archive_of_checkpoints: object) -> object:
    return archive_of_checkpoints


@pytest_asyncio.fixture
async def caller(database: Database) -> Caller:
    """A user who consented to memory.store and memory.sensitive."""
    caller = await new_caller(database)
    await write_decision(database, caller, "memory.sensitive", granted=True)
    return caller
