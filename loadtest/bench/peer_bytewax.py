"""The flow that anybody would write first: an item a ping, keyed by device, with `h3` and dictionaries."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import bytewax.operators as op
import h3
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from bytewax.testing import run_main

from geoindex.columns import E7
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.peer_ours import FlowClock
from loadtest.bench.traffic import ActiveAlert, SentPings

RESOLUTION = 7
ZONE_RESOLUTION = 5
ZONE_REACH_KM = 15.0
"""More than the distance from a zone's centre to any point of a cell whose ancestor it is."""
ZONE_STEP_KM = 12.0
"""Less than the distance between neighbouring zones."""
EARTH_RADIUS_KM = 6371.0088
ITEMS_PER_BATCH = 1_000
MARK = ("", None)
"""An item that comes out when everything before it is through."""


class Ping(NamedTuple):
    """One item of the flow."""

    lat: float
    lng: float
    observed_at_ms: int


@dataclass(slots=True)
class Phone:
    """State of one key."""

    observed_at_ms: int = 0
    cell: str = ""
    told: set[str] = field(default_factory=set)


class Ring(NamedTuple):
    """An alert as seen from one zone."""

    alert_id: str
    lat: float
    lng: float
    radius_km: float
    is_inside: bool
    """The whole zone is: no distance has to be asked."""


def run(workload: Workload) -> PeerRun:
    """One worker. The items exist before they are asked for; the time ends when the last push has come out."""
    rings = cover(workload.alerts)
    clock = FlowClock(1, 1)
    measured = [item for sent in workload.measured for item in items(workload, sent)]
    told: list[Told] = []
    flow = Dataflow("first_try")
    pings = op.input("pings", flow, _Source(workload, measured, clock))
    matches = op.stateful_flat_map("match", pings, lambda phone, ping: on_ping(phone, ping, rings))
    op.output("pushes", matches, _Sink(told, clock))
    run_main(flow)
    words = (
        f"Bytewax, one worker, an item a ping in batches of {ITEMS_PER_BATCH}, stateful_flat_map by device; h3 cell of "
        f"resolution {RESOLUTION}, dict of its ancestors of resolution {ZONE_RESOLUTION} to the rings there, whole "
        "zones inside known as such. Less work than ours: items are ready Python objects, nothing is decoded, "
        "screened, wiped after the live window or encoded for a queue, and alerts neither come, grow nor end"
    )
    return PeerRun(workload.ping_count / clock.seconds, clock.cpu_s / clock.seconds, set(told), words, "flow")


def on_ping(phone: Phone | None, ping: Ping | None, rings: dict[str, list[Ring]]) -> tuple[Phone, list[str | None]]:
    """Move the phone and look for rings it was not told about. A mark (None) passes through."""
    phone = phone or Phone()
    if ping is None:
        return phone, [None]
    if ping.observed_at_ms < phone.observed_at_ms:
        return phone, []
    phone.observed_at_ms = ping.observed_at_ms
    phone.cell = h3.latlng_to_cell(ping.lat, ping.lng, RESOLUTION)
    pushes: list[str | None] = []
    for ring in rings.get(h3.cell_to_parent(phone.cell, ZONE_RESOLUTION), ()):
        if ring.alert_id not in phone.told and (
            ring.is_inside or away_km(ring.lat, ring.lng, ping.lat, ping.lng) <= ring.radius_km
        ):
            phone.told.add(ring.alert_id)
            pushes.append(ring.alert_id)
    return phone, pushes


def away_km(lat_a: float, lng_a: float, lat_b: float, lng_b: float) -> float:
    """Great-circle distance by the haversine formula."""
    phi_a, phi_b = math.radians(lat_a), math.radians(lat_b)
    square = (
        math.sin((phi_b - phi_a) / 2) ** 2
        + math.cos(phi_a) * math.cos(phi_b) * math.sin(math.radians(lng_b - lng_a) / 2) ** 2
    )
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(square))


def cover(alerts: Iterable[ActiveAlert]) -> dict[str, list[Ring]]:
    """Rings by zone."""
    rings: dict[str, list[Ring]] = {}
    for active in alerts:
        alert, radius_km = active.alert, active.ring_km
        steps = math.ceil((radius_km + ZONE_REACH_KM) / ZONE_STEP_KM) + 1
        for zone in h3.grid_disk(h3.latlng_to_cell(alert.lat, alert.lng, ZONE_RESOLUTION), steps):
            distance = away_km(alert.lat, alert.lng, *h3.cell_to_latlng(zone))
            if distance <= radius_km + ZONE_REACH_KM:
                is_inside = distance <= radius_km - ZONE_REACH_KM
                rings.setdefault(zone, []).append(Ring(alert.alert_id, alert.lat, alert.lng, radius_km, is_inside))
    return rings


def items(workload: Workload, sent: SentPings) -> Iterator[tuple[str, Ping | None]]:
    """The batch as items, keyed `partner/id`."""
    names, pings = workload.traffic.world.partner_names, sent.pings
    raw, ends = pings.id_bytes.tobytes().decode(), pings.id_end.tolist()
    for partner, start, end, lat, lng, observed_at_ms in zip(
        pings.partner.tolist(),
        [0, *ends[:-1]],
        ends,
        (pings.lat_e7 / E7).tolist(),
        (pings.lng_e7 / E7).tolist(),
        pings.observed_at_ms.tolist(),
        strict=True,
    ):
        yield f"{names[partner]}/{raw[start:end]}", Ping(lat, lng, observed_at_ms)


Item = tuple[str, Ping | None]


class _Source(FixedPartitionedSource[Item, None]):
    def __init__(self, workload: Workload, measured: list[Item], clock: FlowClock) -> None:
        self._arguments = workload, measured, clock

    def list_parts(self) -> list[str]:
        return ["pings"]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _Partition:
        return _Partition(*self._arguments)


class _Partition(StatefulSourcePartition[Item, None]):
    def __init__(self, workload: Workload, measured: list[Item], clock: FlowClock) -> None:
        self._batches = self._in_turn(workload, measured)
        self._clock = clock

    def _in_turn(self, workload: Workload, measured: list[Item]) -> Iterator[list[Item]]:
        for sent in workload.before:
            yield list(items(workload, sent))
        yield [MARK]
        while not self._clock.may_start:
            yield []
        gc.collect()
        self._clock.start()
        for start in range(0, len(measured), ITEMS_PER_BATCH):
            yield measured[start : start + ITEMS_PER_BATCH]
        yield [MARK]

    def next_batch(self) -> list[Item]:
        return next(self._batches)

    def snapshot(self) -> None:
        return None


class _Sink(DynamicSink[tuple[str, str | None]]):
    def __init__(self, told: list[Told], clock: FlowClock) -> None:
        self._told, self._clock = told, clock

    def build(self, step_id: str, worker_index: int, worker_count: int) -> _SinkPartition:
        return _SinkPartition(self._told, self._clock)


class _SinkPartition(StatelessSinkPartition[tuple[str, str | None]]):
    def __init__(self, told: list[Told], clock: FlowClock) -> None:
        self._told, self._clock = told, clock

    def write_batch(self, items: list[tuple[str, str | None]]) -> None:
        for key, alert_id in items:
            if alert_id is None:
                self._clock.came_out(1)
            elif self._clock.is_measuring:
                partner, _, device_id = key.partition("/")
                self._told.append((alert_id, partner, device_id))
