"""Histograms that are told many values at once, beside those that are told one by one."""

from __future__ import annotations

import math

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server.histograms import BatchHistogram

BUCKETS = (0.5, 1.0, 4.0)


def shown(registry: CollectorRegistry) -> list[str]:
    """Return what is exported, but for when that began."""
    return [
        line for line in generate_latest(registry).decode().splitlines() if "_created" not in line
    ]


@pytest.mark.parametrize(
    "batches",
    [
        [[]],
        [[0.25]],
        [[0.5, 1.0, 4.0]],
        [[0.0, 0.25, 0.75, 3.0, 8.0, math.inf], [0.5, 64.0]],
        [[1.5] * 1000, [], [-1.0]],
    ],
)
def test_a_batch_is_observed_as_its_values_would_be(batches: list[list[float]]) -> None:
    together, alone = CollectorRegistry(), CollectorRegistry()
    batched = BatchHistogram("taken", "Time.", ["kind"], buckets=BUCKETS, registry=together)
    single = Histogram("taken", "Time.", ["kind"], buckets=BUCKETS, registry=alone)
    for batch in batches:
        batched.labels("one").observe_all(batch)
        single.labels("one")
        for value in batch:
            single.labels("one").observe(value)
    assert shown(together) == shown(alone)


def test_a_batch_of_no_series_is_refused_as_a_value_is() -> None:
    histogram = BatchHistogram("taken", "Time.", ["kind"], registry=CollectorRegistry())
    with pytest.raises(ValueError, match="missing label values"):
        histogram.observe_all([1.0])
