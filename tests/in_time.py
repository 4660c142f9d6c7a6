"""Answers within a deadline, on machines that may stand still for a moment."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import grpc

T = TypeVar("T")

TRIES: Final = 5
"""What keeps to no deadline is late every time; a machine is seldom so slow that often."""


async def first_in_time(seconds: float, ask: Callable[[], Awaitable[T]]) -> T:
    """Ask a few times, and return the first answer that comes within its deadline."""
    for _ in range(TRIES):
        started = time.monotonic()
        try:
            answer = await ask()
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise
        else:
            if time.monotonic() - started < seconds:
                return answer
    raise AssertionError(f"none of {TRIES} answers came within {seconds} s")
