"""Checkpoints of the audit log, signed when a test says so."""

from server.users.checkpointer import Checkpointer

_PAGE = 8
"""Small, so that tests cross many."""


async def sign_all(checkpointer: Checkpointer) -> int:
    """Sign every head that moved, as the job does, and return how many were signed."""
    page = await checkpointer.sign(None, _PAGE)
    signed = page.signed
    while page.last:
        page = await checkpointer.sign(page.last, _PAGE)
        signed += page.signed
    return signed
