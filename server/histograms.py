"""Histograms that are told many values at once."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection

from prometheus_client import Histogram


class BatchHistogram(Histogram):
    """A histogram of what comes in batches, jobs for one.

    Each bucket is told how many values of a batch it has. Told one by one, in each of which two
    locks are taken, they were a tenth of what a small job costs.
    """

    def observe_all(self, values: Collection[float]) -> None:
        """Observe values, as many calls of `observe` would."""
        self._raise_if_not_observable()  # type: ignore[no-untyped-call] # is the library's
        self._sum.inc(sum(values))
        for place, number in Counter(self._places(values)).items():
            self._buckets[place].inc(number)

    def _places(self, values: Collection[float]) -> list[int]:
        """Return the bucket of each value: the first whose upper end is not below it."""
        return [bisect_left(self._upper_bounds, value) for value in values]
