"""How many live phones there are where: counted by each shard once a minute, published, and asked by the gateway.

    worker   after_entry ── some rows at a time ──> counts by zone and partner ──> publisher ──> SET density:{s} EX 600
    gateway  read_density ── all shards added up ──> phones_in_circle, coarse_cells

A count begins at the first entry of a minute of shard clock, behind the sweep, and goes on behind the next entries, so
many rows each that none waits for long. It is therefore of some seconds, not of one moment: a phone that moves
meanwhile is counted once, here or there. Only shards that are near the end of their log count: a replay tells nothing.

`density:{s}` is a msgpack map:

    v         1
    at_ms     shard clock at the beginning of the count
    log_id    [ms, seq] of the log entry behind which it began
    partners  names, by partner index
    zone      u32[n], partner u16[n], count u32[n]: little-endian, ascending by zone and partner; zones are dense H3
              numbers of resolution 5 (`geoindex.cells`), counts at least 1
    left_out  phones of pairs that were too many to be published; 0 but for a planet full of partners

The figures in it are exact, down to single phones: they stay on the server, beside the logs. Whoever shows them to
people leaves out what is below `SHOWN_MIN`.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import msgpack
import numpy as np
import redis

from flows.clock import CLOCK, Clock
from flows.log import LogId, RawEntry
from flows.metrics import METRICS, Metrics
from geoindex.cells import CELLS_PER_ZONE, ZONE_RESOLUTION, cell_centers, coarse_to_h3
from geoindex.columns import F64, I64, U16, U32, U64
from geoindex.figure_kernels import PARTNER_BITS
from geoindex.phones import PLACES_MIN, PhoneColumns, PhoneCounts
from geoindex.rings import chord2_max, cover_circle, unit_vector
from geoindex.shard import MINUTE_MS, ShardMachine

FORMAT_VERSION = 1
EXPIRY_S = 600
"""A shard that says nothing for so long is missing, rather than as it was."""
ROWS_AT_ONCE = 1 << 17
"""*Measured*: 1.3 ms (docs/decisions/0012-figures.md)."""
SLICES_MAX = 32
"""A count has ended after so many entries: half a minute of ticks, if nothing else comes."""
GROWTH = 2
"""A table that has grown so much since the last count is counted again within the minute: a deployment that begins
need not wait, and one that does not pays nothing."""
LAG_MS_MAX = 60_000
"""A shard further behind than that is catching up, and does not count."""
PAIRS_MAX = 1 << 20
"""Pairs of zone and partner that a shard publishes: 10 MB. A country and ten partners have 400,000."""
SHOWN_MIN = 20
"""Fewer phones than that are nobody's business."""
SHOWN_STEP = 10
"""Counts on a map are rounded to this: a cell that is hidden cannot be worked out from its parent and its siblings, nor
one phone from two counts."""
RESOLUTIONS = range(3, ZONE_RESOLUTION + 1)
"""Of cells on a map."""


def density_key(shard: int) -> str:
    """The shard's last count."""
    return f"density:{{s{shard}}}"


# --- counting ---------------------------------------------------------------------------------------------------------


class ShardDensity(NamedTuple):
    """What a shard has counted."""

    shard: int
    at_ms: int
    log_id: LogId
    partners: tuple[str, ...]
    phones: PhoneColumns


@dataclass(slots=True)
class _Count:
    """A count that is under way. It keeps no machine in memory that the shard has left."""

    at_ms: int
    log_id: LogId
    live_from_ms: int
    counts: PhoneCounts
    next_row: int = 0
    partners: tuple[str, ...] = ()
    """Of its end: every device that was counted has one of them."""


@dataclass(slots=True)
class _Lane:
    """What is known of one shard."""

    minute: int = -1
    """Of the last count's beginning, by the shard clock."""
    row_count: int = 0
    """Of the table, then."""
    count: _Count | None = None
    places: int = PLACES_MIN


class DensityCounter:
    """Counts the phones of the shards of a process, in the thread that runs their machines. `take`: from another."""

    def __init__(self, metrics: Metrics = METRICS, clock: Clock = CLOCK) -> None:
        self._metrics = metrics
        self._clock = clock
        self._lanes: dict[int, _Lane] = {}
        self._counted: dict[int, _Count] = {}

    def begin(self, shard: int) -> None:
        """The shard starts, or starts anew: it counts as soon as it has caught up."""
        self._lanes[shard] = _Lane()

    def after_entry(self, raw: RawEntry, machine: ShardMachine) -> None:
        """A machine has seen an entry, and the next one waits: a part of a count, if there is one to be made."""
        lane = self._lanes[raw.shard]
        if lane.count is None:
            row_count = machine.device_table.row_count
            is_due = raw.ms // MINUTE_MS != lane.minute or row_count > GROWTH * lane.row_count
            if not is_due or self._clock.now_ms() - raw.ms > LAG_MS_MAX:
                return
            lane.minute, lane.row_count = raw.ms // MINUTE_MS, row_count
            live_from_ms = machine.clock_ms - machine.settings.live_window_ms
            lane.count = _Count(machine.clock_ms, raw.log_id, live_from_ms, PhoneCounts(lane.places))
        started_s = time.perf_counter()
        self._go_on(raw.shard, machine, lane, lane.count)
        self._metrics.observe("density_stop_ms", 1000 * (time.perf_counter() - started_s))

    def _go_on(self, shard: int, machine: ShardMachine, lane: _Lane, count: _Count) -> None:
        table = machine.device_table
        rows = table.row_count
        stop = min(rows, count.next_row + max(ROWS_AT_ONCE, -(-rows // SLICES_MAX)))
        count.counts.add_rows(table, count.next_row, stop, count.live_from_ms)
        count.next_row = stop
        if stop == rows:
            lane.count, lane.places, count.partners = None, count.counts.places, machine.settings.partners
            # In one step: the other thread takes it, or the one before.
            self._counted[shard] = count

    def take(self) -> list[ShardDensity]:
        """Counts that have ended since the last call."""
        ended = [(shard, self._counted.pop(shard)) for shard in list(self._counted)]
        return [
            ShardDensity(shard, count.at_ms, count.log_id, count.partners, count.counts.columns())
            for shard, count in ended
        ]


def encode_density(density: ShardDensity) -> bytes:
    """The value of `density_key`. Of more than PAIRS_MAX pairs, those with the most phones."""
    phones, left_out = density.phones, 0
    if len(phones.count) > PAIRS_MAX:
        kept = np.sort(np.argpartition(phones.count, -PAIRS_MAX)[-PAIRS_MAX:])
        left_out = int(phones.count.sum()) - int(phones.count[kept].sum())
        phones = PhoneColumns(phones.zone[kept], phones.partner[kept], phones.count[kept])
    fields = {
        "v": FORMAT_VERSION,
        "at_ms": density.at_ms,
        "log_id": density.log_id,
        "partners": density.partners,
        "zone": phones.zone.astype("<u4").tobytes(),
        "partner": phones.partner.astype("<u2").tobytes(),
        "count": phones.count.astype("<u4").tobytes(),
        "left_out": left_out,
    }
    return cast(bytes, msgpack.packb(fields))


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Density:
    """Live phones by zone and partner, over all shards that have said so: ascending, each pair once.

    Exact counts: what is shown to people goes through `phones_in_circle` and rounding, or `coarse_cells`.
    """

    zone: U32
    """u32[n]: dense H3 number of resolution 5."""
    partner: U16
    """u16[n]: index into `partners`."""
    count: I64
    """i64[n]: phones, at least 1."""
    partners: tuple[str, ...]
    at_ms: int | None
    """Shard clock of the oldest count that is in it; None if there is none."""
    missing: tuple[int, ...]
    """Shards that have not counted lately: their phones are not in it."""
    left_out: int
    """Phones that shards left out because there were too many pairs of zone and partner."""
    newest_ms: int | None = None
    """Shard clock of the newest count that is in it."""

    @property
    def phone_count(self) -> int:
        """Phones in all zones."""
        return int(self.count.sum()) + self.left_out


def read_density(client: redis.Redis, shard_count: int) -> Density:
    """What all shards have published last. Some 0.1 s of work for ten million phones: keep it for some seconds.

    A shard is missing if it published nothing within EXPIRY_S, or in a format of another version.
    Raises redis.RedisError.
    """
    with client.pipeline(transaction=False) as pipeline:
        for shard in range(shard_count):
            pipeline.get(density_key(shard))
        payloads = cast("list[bytes | None]", pipeline.execute())
    found: list[dict[str, Any]] = []
    missing: list[int] = []
    for shard, payload in enumerate(payloads):
        fields = None if payload is None else msgpack.unpackb(payload)
        if fields is None or fields["v"] != FORMAT_VERSION:
            missing.append(shard)
        else:
            found.append(fields)
    zone, partner, count = (
        np.concatenate([np.frombuffer(fields[name], dtype) for fields in found] or [np.zeros(0, dtype)])
        for name, dtype in (("zone", "<u4"), ("partner", "<u2"), ("count", "<u4"))
    )
    keys = zone.astype(np.uint64) << np.uint64(PARTNER_BITS) | partner
    pairs, pair_of = np.unique(keys, return_inverse=True)
    return Density(
        zone=(pairs >> np.uint64(PARTNER_BITS)).astype(np.uint32),
        partner=(pairs & np.uint64((1 << PARTNER_BITS) - 1)).astype(np.uint16),
        count=np.bincount(pair_of, count, len(pairs)).astype(np.int64),
        # The list only grows, and a shard may be a moment behind.
        partners=max((tuple(fields["partners"]) for fields in found), key=len, default=()),
        at_ms=min((fields["at_ms"] for fields in found), default=None),
        newest_ms=max((fields["at_ms"] for fields in found), default=None),
        missing=tuple(missing),
        left_out=sum(fields["left_out"] for fields in found),
    )


def phones_in_circle(
    density: Density, lat: float, lng: float, radius_km: float, partners: Collection[str] | None = None
) -> float:
    """About how many live phones are within `radius_km` of a place in degrees; `partners`: theirs alone.

    Zones inside the circle count whole, those at its edge by the share of their 49 cells whose centre is in it: as if
    phones were spread evenly over a zone (253 km2 on average). How far that is off: docs/decisions/0012-figures.md.
    An estimate for `SHOWN_MIN` and rounding, not to be shown as it is.
    Raises ValueError for a place that is none or a radius not within (0, 1000] km.
    """
    cover = cover_circle(lat, lng, radius_km)
    zone, count = density.zone, density.count
    if partners is not None:
        wanted = np.array([name in partners for name in density.partners], np.bool_)
        chosen = wanted[density.partner]
        zone, count = zone[chosen], count[chosen]
    # Phones in zones below each row's; the rows of a range are consecutive.
    below = np.concatenate([np.zeros(1, np.int64), np.cumsum(count)])
    inside = np.searchsorted(zone, cover.inside)
    total = float((below[inside[:, 1]] - below[inside[:, 0]]).sum())
    edge = np.searchsorted(zone, cover.edge)
    rows = [np.arange(start, stop) for start, stop in edge.tolist()]
    edge_rows = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    edge_zones, zone_of = np.unique(zone[edge_rows], return_inverse=True)
    shares = _covered_share(edge_zones, unit_vector(lat, lng), chord2_max(radius_km))
    return total + float((count[edge_rows] * shares[zone_of]).sum())


def _covered_share(zone: U32, centre: tuple[float, float, float], chord2_limit: float) -> F64:
    """Share of each zone's cells whose centre is within a squared chord of `centre`."""
    cells = (zone[:, None] * np.uint32(CELLS_PER_ZONE) + np.arange(CELLS_PER_ZONE, dtype=np.uint32)).reshape(-1)
    vector, exists = cell_centers(cells)  # of a pentagon's digits some name no cell
    is_inside = exists & (((vector - centre) ** 2).sum(axis=1) <= chord2_limit)
    cell_counts = exists.reshape(len(zone), CELLS_PER_ZONE).sum(axis=1)
    share: F64 = is_inside.reshape(len(zone), CELLS_PER_ZONE).sum(axis=1) / cell_counts
    return share


class CoarseCells(NamedTuple):
    """Cells for a map, ascending by index: `h3_index` u64[n], `phones` i64[n], each rounded and at least SHOWN_MIN."""

    h3_index: U64
    phones: I64


def coarse_cells(density: Density, resolution: int) -> CoarseCells:
    """Phones by H3 cell of a resolution of `RESOLUTIONS`, all partners together, fit to be shown to people.

    Raises ValueError for another resolution.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution: must be from {RESOLUTIONS.start} to {RESOLUTIONS.stop - 1}, got {resolution}")
    coarse, cell_of = np.unique(density.zone // np.uint32(7 ** (ZONE_RESOLUTION - resolution)), return_inverse=True)
    phones = np.bincount(cell_of, density.count, len(coarse)).astype(np.int64)
    shown = phones >= SHOWN_MIN
    rounded = (phones[shown] + SHOWN_STEP // 2) // SHOWN_STEP * SHOWN_STEP
    return CoarseCells(coarse_to_h3(coarse[shown], resolution), rounded)
