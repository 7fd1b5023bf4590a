"""NumPy brute force: every ping of a batch against every alert, as a matrix of cosines.

numpy       as fast as it gets
numpy_h3    and the H3 cell of every device is kept, as we do
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterable

import h3.api.basic_int as h3_int
import numpy as np

from geoindex.columns import E7, I64, PingBatch
from loadtest.bench.brute_force import EARTH_RADIUS_KM, unit_vectors
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.traffic import as_decoded

CHUNK_ROWS = 512
"""A chunk's matrix stays in the cache, and BLAS in this thread: faster than whole batches."""
RESOLUTION = 7

Pairs = tuple[I64, I64]
"""Positions in a batch, and of alerts."""


def run(workload: Workload) -> PeerRun:
    """Decoded columns in, pairs out; H3 plays no part."""
    return _run(workload, False)


def run_with_cells(workload: Workload) -> PeerRun:
    """The same, keeping each device's cell by the h3 library."""
    return _run(workload, True)


def _run(workload: Workload, keeps_cells: bool) -> PeerRun:
    world = workload.traffic.world
    batches = [as_decoded(sent.pings) for sent in workload.measured]
    first = _Matcher(workload, keeps_cells)
    rates: list[float] = []
    cores: list[float] = []
    found: list[Pairs] = []
    for _ in range(workload.repeats):
        matcher = first.copy()
        gc.collect()
        cpu_s, started_s = time.process_time(), time.perf_counter()
        found = [matcher.match(batch) for batch in batches]
        seconds = time.perf_counter() - started_s
        cores.append((time.process_time() - cpu_s) / seconds)
        rates.append(workload.ping_count / seconds)
    told: set[Told] = {
        (workload.alerts[which].alert.alert_id, world.partner_names[batch.partner[place]], batch.device_id(place))
        for batch, (places, alerts) in zip(batches, found, strict=True)
        for place, which in zip(places.tolist(), alerts.tolist(), strict=True)
    }
    cells = "the h3 library's cell of every ping kept" if keeps_cells else "no H3 cell kept"
    words = (
        f"decoded columns; dicts from id to row; unit vectors times alerts, {CHUNK_ROWS} rows at a time; told sets as "
        f"bits; {cells}. Less work than ours: nothing is wiped after the live window, ids are not copied for a queue, "
        "a phone must not stand twice in a batch, and alerts neither come, grow nor end"
    )
    return PeerRun(float(np.median(rates)), float(np.median(cores)), told, words, "machine")


class _Matcher:
    """State of all devices as columns, with every phone of `workload.first` known and told."""

    def __init__(self, workload: Workload, keeps_cells: bool) -> None:
        self._rows_of: list[dict[bytes, int]] = [{} for _ in workload.traffic.world.partners]
        row_count = 0
        for sent in workload.first:
            raw = sent.pings.id_bytes.tobytes()
            for partner, start, end in _spans(sent.pings):
                self._rows_of[partner][raw[start:end]] = row_count
                row_count += 1
        self._told = workload.told_first[np.concatenate([sent.phone for sent in workload.first])]
        self._lat_e7 = np.concatenate([sent.pings.lat_e7 for sent in workload.first])
        self._lng_e7 = np.concatenate([sent.pings.lng_e7 for sent in workload.first])
        self._observed_at_ms = np.concatenate([sent.pings.observed_at_ms for sent in workload.first])
        self._cell = np.zeros(row_count, np.uint64) if keeps_cells else None
        self._centres = unit_vectors(
            np.array([active.alert.lat for active in workload.alerts]),
            np.array([active.alert.lng for active in workload.alerts]),
        ).T.copy()
        self._cosine_min = np.array([math.cos(active.ring_km / EARTH_RADIUS_KM) for active in workload.alerts])

    def copy(self) -> _Matcher:
        """With state of its own; the index of ids is shared, for it does not change."""
        other = _Matcher.__new__(_Matcher)
        other.__dict__.update(self.__dict__)
        other._told = self._told.copy()
        other._lat_e7, other._lng_e7 = self._lat_e7.copy(), self._lng_e7.copy()
        other._observed_at_ms = self._observed_at_ms.copy()
        return other

    def match(self, batch: PingBatch) -> Pairs:
        """Move the devices of a batch and find who is newly inside of what."""
        raw = batch.id_bytes.tobytes()
        rows_of = self._rows_of
        rows = np.array([rows_of[partner][raw[start:end]] for partner, start, end in _spans(batch)])
        newer = np.flatnonzero(batch.observed_at_ms >= self._observed_at_ms[rows])
        rows, lat_e7, lng_e7 = rows[newer], batch.lat_e7[newer], batch.lng_e7[newer]
        self._lat_e7[rows], self._lng_e7[rows] = lat_e7, lng_e7
        self._observed_at_ms[rows] = batch.observed_at_ms[newer]
        lat, lng = lat_e7 / E7, lng_e7 / E7
        if self._cell is not None:
            places = zip(lat.tolist(), lng.tolist(), strict=True)
            self._cell[rows] = [h3_int.latlng_to_cell(*place, RESOLUTION) for place in places]
        vectors = unit_vectors(lat, lng)
        places_found: list[I64] = [np.empty(0, np.int64)]
        alerts_found: list[I64] = [np.empty(0, np.int64)]
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            inside = vectors[start : start + CHUNK_ROWS] @ self._centres >= self._cosine_min
            new = np.packbits(inside, axis=1, bitorder="little") & ~self._told[chunk]
            changed = np.flatnonzero(new.any(axis=1))
            if len(changed):
                self._told[chunk] |= new
                position, alert = np.nonzero(np.unpackbits(new[changed], axis=1, bitorder="little"))
                places_found.append(newer[start + changed[position]])
                alerts_found.append(alert)
        return np.concatenate(places_found), np.concatenate(alerts_found)


def _spans(batch: PingBatch) -> Iterable[tuple[int, int, int]]:
    """Partner, start and end of every id."""
    ends = batch.id_end.tolist()
    return zip(batch.partner.tolist(), [0, *ends[:-1]], ends, strict=True)
