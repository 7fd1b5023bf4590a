"""Latencies as counts by logarithmic bucket: any percentile within 1 %, merged by adding, whatever the number.

The idea is HdrHistogram's (http://hdrhistogram.org): a bucket's width is a fixed share of its value.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

GROWTH = 1.01
"""From one bucket's upper bound to the next one's."""
_LOG_GROWTH = math.log(GROWTH)
LEAST_MS = 0.01
"""What is faster counts as this fast."""

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "max": 1.0}


def bucket_of(value_ms: float) -> int:
    """The bucket whose upper bound is the first not below the value."""
    if value_ms <= LEAST_MS:
        return 0
    return math.ceil(math.log(value_ms / LEAST_MS) / _LOG_GROWTH - 1e-9)


def bound_ms(bucket: int) -> float:
    """A bucket's upper bound."""
    return float(LEAST_MS * GROWTH**bucket)


class Histogram:
    """Counts by bucket."""

    __slots__ = ("counts",)

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts: Counter[int] = Counter(counts or {})

    def add(self, value_ms: float, count: int = 1) -> None:
        self.counts[bucket_of(value_ms)] += count

    def merge(self, other: Histogram) -> None:
        self.counts.update(other.counts)

    def __len__(self) -> int:
        return self.counts.total()

    def percentile_ms(self, share: float) -> float | None:
        """The least value that `share` of all do not exceed, to the bucket; None without values."""
        total = len(self)
        if not total:
            return None
        rank = max(1, math.ceil(share * total - 1e-9))
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                return bound_ms(bucket)
        raise AssertionError("the last bucket ends the sum")

    def summary_ms(self) -> dict[str, float]:
        """By the names of PERCENTILES; empty without values."""
        if not len(self):
            return {}
        return {name: round(self.percentile_ms(share) or 0.0, 3) for name, share in PERCENTILES.items()}


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All of them together."""
    total = Histogram()
    for histogram in histograms:
        total.merge(histogram)
    return total
