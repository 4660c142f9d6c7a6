"""What the crash tests look at the stores with."""

from __future__ import annotations

import asyncpg
import pytest_asyncio

from server.blobs import Blobs
from server.database import SystemDatabase
from tests.crashes.stored import Reader


@pytest_asyncio.fixture
async def reader(
    owner: asyncpg.Connection, system_database: SystemDatabase, blobs: Blobs
) -> Reader:
    """Reads what the stores hold in the end."""
    await blobs.keep_versions()
    return Reader(owner, system_database, blobs)
