"""Everything a run has seen, by name and second of the run's clock; each worker's goes to the master every few seconds.

A latency belongs to the second in which its request was *due*. One that took long so stands where it hurt, and a
deployment that stops answering for ten seconds spoils all the seconds that waited for it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from loadtest.load.histogram import Histogram, merged

REASON_CHARS_MAX = 80
REASONS_MAX = 50
"""Different ones, of a name: what a server writes must not fill the memory."""


@dataclass(slots=True)
class FanOut:
    """What came of one log entry that told of an alert, by what readers took: moments in ms since 1970."""

    cause: tuple[int, int]
    """The log entry. Of one alert, kind and shard the first counts: caused by the event, not by later pings."""
    first_ms: float
    last_ms: float
    devices: int = 0


FanOutKey = tuple[str, str, int]
"""Alert id, kind, shard."""


@dataclass(slots=True)
class Recorder:
    """Grows until it is taken. For one thread."""

    latencies: dict[str, dict[int, Histogram]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Histogram))
    )
    failures: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    failed_at: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    counts: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    """Other things that add up: pings, devices, bytes."""
    fan_outs: dict[FanOutKey, FanOut] = field(default_factory=dict)
    published: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Alert id -> what officers know of it: when its events were due and answered."""
    loads: list[dict[str, Any]] = field(default_factory=list)
    """What the generator itself used, each second: `cores`, `rss`, `feeder_cores`, `ahead_s`."""

    # ---- events

    def request(self, name: str, latency_ms: float, at_s: float, failure: str | None = None) -> None:
        """One request or end-to-end time. `at_s`: when it was due."""
        second = int(at_s)
        if failure is None:
            self.latencies[name][second].add(latency_ms)
        else:
            reasons = self.failures[name]
            words = failure[:REASON_CHARS_MAX]
            reasons[words if words in reasons or len(reasons) < REASONS_MAX else "other"] += 1
            self.failed_at[name][second] += 1

    def count(self, name: str, amount: int, at_s: float) -> None:
        self.counts[name][int(at_s)] += amount

    def pushed(self, key: FanOutKey, cause: tuple[int, int], devices: int, at_ms: float) -> None:
        """A queue entry was taken by its partner."""
        known = self.fan_outs.get(key)
        if known is None or cause < known.cause:
            self.fan_outs[key] = FanOut(cause, at_ms, at_ms, devices)
        elif cause == known.cause:
            known.first_ms, known.last_ms = min(known.first_ms, at_ms), max(known.last_ms, at_ms)
            known.devices += devices

    # ---- travelling

    def take(self) -> dict[str, Any]:
        """All of it as plain values, and begin anew."""
        taken = {
            "latencies": [
                [name, second, sorted(histogram.counts.items())]
                for name, seconds in self.latencies.items()
                for second, histogram in seconds.items()
            ],
            "failures": [[name, sorted(reasons.items())] for name, reasons in self.failures.items()],
            "failed_at": [[name, sorted(seconds.items())] for name, seconds in self.failed_at.items()],
            "counts": [[name, sorted(seconds.items())] for name, seconds in self.counts.items()],
            "fan_outs": [
                [*key, *found.cause, found.first_ms, found.last_ms, found.devices]
                for key, found in self.fan_outs.items()
            ],
            "published": self.published,
            "loads": self.loads,
        }
        for emptied in (self.latencies, self.failures, self.failed_at, self.counts, self.fan_outs):
            emptied.clear()
        self.published, self.loads = {}, []
        return taken

    def merge(self, taken: dict[str, Any], worker: int = 0) -> None:
        """What another recorder gave. `worker`: whose loads these are."""
        for name, second, buckets in taken["latencies"]:
            self.latencies[name][second].merge(Histogram(dict(buckets)))
        for kind in ("failures", "failed_at", "counts"):
            mine = getattr(self, kind)
            for name, amounts in taken[kind]:
                mine[name].update(dict(amounts))
        for alert_id, kind, shard, ms, sequence, first_ms, last_ms, devices in taken["fan_outs"]:
            key, cause = (alert_id, kind, shard), (ms, sequence)
            self.pushed(key, cause, devices, first_ms)
            if self.fan_outs[key].cause == cause:
                self.fan_outs[key].last_ms = max(self.fan_outs[key].last_ms, last_ms)
        for alert_id, known in taken["published"].items():
            self.published.setdefault(alert_id, {}).update(known)
        self.loads += [{**load, "worker": worker} for load in taken["loads"]]

    # ---- reading

    def between(self, name: str, from_s: float, until_s: float) -> Histogram:
        """Latencies of requests due in [from_s, until_s), both whole seconds or cut to them."""
        seconds = self.latencies.get(name, {})
        return merged(histogram for second, histogram in seconds.items() if int(from_s) <= second < until_s)

    def counted(self, name: str, from_s: float = 0.0, until_s: float = float("inf")) -> int:
        """A count's sum over the same."""
        return sum(amount for second, amount in self.counts.get(name, {}).items() if int(from_s) <= second < until_s)

    def failed(self, name: str, from_s: float = 0.0, until_s: float = float("inf")) -> int:
        return sum(amount for second, amount in self.failed_at.get(name, {}).items() if int(from_s) <= second < until_s)

    def names(self) -> Iterator[str]:
        """Of everything with latencies or failures, sorted."""
        yield from sorted(self.latencies.keys() | self.failures.keys())
