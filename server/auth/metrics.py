"""What the auth slice measures."""

from typing import Final

from prometheus_client import Counter, Gauge

from server.database import SystemDatabase

_MOST_COUNTED: Final = 100_000

LOG_INS: Final = Counter("auth_logins", "Log-ins by password.", ["outcome"])
TOKENS: Final = Counter("auth_tokens_issued", "Access tokens that were made.", ["grant"])
MAILS_WAITING: Final = Gauge("auth_mails_waiting", "Mails that are not sent yet, at most 100000.")


class AuthReadings:
    """Reads gauges out of Postgres."""

    def __init__(self, database: SystemDatabase) -> None:
        self._database = database

    async def mails(self) -> None:
        """Count the mails that wait."""
        (row,) = await self._database.fetch_alone(
            "SELECT count(*) FROM (SELECT FROM mails WHERE sent_at IS NULL LIMIT $1) AS waiting",
            _MOST_COUNTED,
        )
        MAILS_WAITING.set(row["count"])
