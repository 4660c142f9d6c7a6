"""What the backup slice measures. Its own processes come and go: the jobs service tells of it."""

from collections.abc import Mapping
from typing import Final

from prometheus_client import Gauge

from server.backup.run_store import GAUGES, RunStore

_GAUGES: Final[Mapping[str, Gauge]] = {
    name: Gauge(name, meaning) for name, meaning in GAUGES.items()
}
_UNKNOWN: Final = {"backup_verify_ok": float("nan")}
"""What never was is 0: no backup yet. But no verification yet is none that failed."""

for _name, _value in _UNKNOWN.items():
    _GAUGES[_name].set(_value)


class BackupReadings:
    """Reads gauges out of Postgres."""

    def __init__(self, runs: RunStore) -> None:
        self._runs = runs

    async def newest(self) -> None:
        """Tell of the newest backup and of the newest verification."""
        found = await self._runs.gauges()
        for name, gauge in _GAUGES.items():
            gauge.set(found.get(name, _UNKNOWN.get(name, 0.0)))
