"""Phones known to be newly in a ring: what takes a ping from its sender to a partner's program is read off their ids.

    feeder ──ping of "probe-<due, ms>-<worker>-<n>", inside the watch alert's ring──> … ──push──> reader: now - due

The first officer publishes one alert of a small ring far from people, for the length of the run. A probe has never been
seen before, so it owes exactly one push, and its id says when its ping was due: no worker has to know another's.
"""

from __future__ import annotations

from loadtest.load.spec import RunSpec

WATCH_LAT, WATCH_LNG = 38.9, 83.6
"""The Taklamakan desert: no phone of the world lives within the ring."""
WATCH_KM = 10.0
WATCH_S = 0.5
"""When the watch alert is due, on the run's clock."""
WATCH_FROM_S = 2.0
"""And when its first probe may come: the alert is in every log by then, or the run has other problems."""
EVERY_S = 0.25
_NAME = "probe"


class Probes:
    """Those of one feeder: one every quarter of a second, on whichever request is the next."""

    def __init__(self, spec: RunSpec, index: int) -> None:
        self._index = index
        self._next_s = min(WATCH_FROM_S, spec.seconds / 4)
        self._until_s = spec.seconds
        self._count = 0

    def due(self, due_s: float, begin_ms: float) -> tuple[float, float, str] | None:
        """Latitude, longitude and id of a probe that goes with a request due then."""
        if not self._next_s <= due_s < self._until_s:
            return None
        self._next_s = due_s + EVERY_S
        self._count += 1
        return WATCH_LAT, WATCH_LNG, probe_id(begin_ms + due_s * 1000, self._index, self._count)


def probe_id(due_ms: float, index: int, number: int) -> str:
    """`due_ms`: since 1970."""
    return f"{_NAME}-{due_ms:.0f}-{index}-{number}"


def due_ms_of(device_id: str) -> float | None:
    """When a probe's ping was due, ms since 1970; None: it is no probe."""
    name, _, rest = device_id.partition("-")
    due, _, _ = rest.partition("-")
    return float(due) if name == _NAME and due.isdigit() else None
