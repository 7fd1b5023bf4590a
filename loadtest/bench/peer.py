"""What every peer is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from loadtest.bench.brute_force import PackedRows
from loadtest.bench.live import Told
from loadtest.bench.traffic import ActiveAlert, SentPings, Traffic


@dataclass(frozen=True, slots=True)
class Workload:
    """Alerts, the pings that make every phone known, and those that are measured, with the pairs they owe."""

    traffic: Traffic
    alerts: Sequence[ActiveAlert]
    first: list[SentPings]
    measured: list[SentPings]
    told_first: PackedRows
    """Told after `first`, by phone, as in `brute_force`."""
    owed: set[Told]
    """Newly told by the measured pings."""
    repeats: int

    @property
    def before(self) -> list[SentPings]:
        """What is not measured: every phone is seen, and has settled there, as in `loadtest.bench.warm`."""
        return self.first + self.first

    @property
    def ping_count(self) -> int:
        return sum(len(sent.pings) for sent in self.measured)


@dataclass(frozen=True, slots=True)
class PeerRun:
    """One peer's measurement: what it told, how long it took, and what it is."""

    pings_per_s: float
    """Median over repeats."""
    cores: float
    """CPU used while measured, of all its processes, the client among them."""
    told: set[Told] = field(repr=False)
    words: str
    """Its configuration, and where it does less than we do."""
    compared_with: str = ""
    """Ours: "machine" or "flow"."""
    edge_m: float = 0.0
    """How far from a ring's edge its distances may be wrong."""

    def line(self, name: str) -> str:
        return f"{name}: {self.pings_per_s:,.0f} pings/s with {self.cores:.2f} cores, {len(self.told):,} pairs"
