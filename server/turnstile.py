"""How fast callers without a token may call, by where they call from.

Users have buckets of their own. Before anybody knows who is calling there is only a place: what
costs a hash or a mail, or tries a password, is counted apart from what is cheap. Where Valkey does
not answer nobody is refused: guesses at one account are held up by Postgres all the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from server.buckets import Buckets, Rate, Want
from server.cache import KEY_PREFIX, Redis
from server.errors import RateLimited, StoreUnavailable
from server.metrics import RATE_LIMITED


@dataclass(frozen=True, slots=True)
class Limit:
    """How fast a place may call some methods, all of them together."""

    name: str
    rate: Rate


DEAR: Final = Limit("dear", Rate(calls_per_second=1, burst=100))
"""An office that comes to work passes; who tries passwords does not get far."""
CHEAP: Final = Limit("cheap", Rate(calls_per_second=20, burst=500))

_AUTH: Final = "/kimberly.auth.v1.AuthService/"
LIMITS: Final[Mapping[str, Limit]] = {
    f"{_AUTH}{method}": DEAR
    for method in ("SignUp", "LogIn", "RequestPasswordReset", "ResetPassword")
}
"""What is dear. Every other method that asks for no token is cheap."""


class Turnstile:
    """Admits calls that carry no token."""

    def __init__(self, redis: Redis, *, scale: float = 1.0) -> None:
        """Admit as many calls as limits say, times `scale`."""
        self._buckets = Buckets(redis)
        self._scale = scale

    async def admit(self, place: str, method: str) -> None:
        """Let a call from a place pass.

        Raises:
            RateLimited: There were too many; says when the next may come.
        """
        limit = LIMITS.get(method, CHEAP)
        key = f"{KEY_PREFIX}places:{limit.name}:{place}"
        try:
            taken = await self._buckets.take(Want(key, limit.rate.times(self._scale)))
        except StoreUnavailable:
            return
        if taken.empty is not None:
            RATE_LIMITED.labels("ip").inc()
            raise RateLimited("calls from this address", taken.wait)
