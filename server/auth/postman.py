"""Sends the mails that were asked for."""

import asyncio
from typing import Final, NoReturn

import structlog

from server.auth import refresh_tokens
from server.auth.mail import Mailer, write
from server.auth.mail_store import MailStore, Request, lifetime_of
from server.clock import Clock, utc_now
from server.errors import StoreUnavailable

log = structlog.get_logger()

_IDLE_SECONDS: Final = 1.0


class Postman:
    """Takes mails from the outbox, writes them and hands them over; what fails is tried again.

    A crash between handing over and settling sends a mail twice, each with a token that works.
    """

    def __init__(self, store: MailStore, mailer: Mailer, *, clock: Clock = utc_now) -> None:
        self._store = store
        self._mailer = mailer
        self._clock = clock

    async def deliver(self) -> bool:
        """Send one mail, and tell whether there was one."""
        request = await self._store.take(self._clock())
        if request is None:
            return False
        try:
            await self._send(request)
        except OSError as error:
            log.warning("mail not sent", kind=request.kind.value, error=repr(error))
        else:
            await self._store.settle(request, self._clock())
        return True

    async def run(self) -> NoReturn:
        """Keep sending."""
        while True:
            try:
                while await self.deliver():
                    pass
            except (StoreUnavailable, TimeoutError) as error:
                log.warning("outbox not read", error=repr(error))
            await asyncio.sleep(_IDLE_SECONDS)

    async def _send(self, request: Request) -> None:
        token = refresh_tokens.new_token()
        kind = await self._store.address(request, token, self._clock())
        if kind is not None:
            hours = int(lifetime_of(kind).total_seconds() // 3600)
            await self._mailer.send(write(kind, request.email, token, hours))
