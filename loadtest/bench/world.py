"""The generator of the load tests on one core: how many pings a second it makes, so that it is never the bottleneck."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

import numpy as np

from geoindex.columns import E7, PingBatch
from loadtest.behaviour import DAY_MS, HOUR_MS
from loadtest.bench.report import Report, Say
from loadtest.life import BATCH_PINGS, Life

# A Wednesday, 4:00 in Beijing.
DAY_START_MS = 1_762_286_400_000
HOURS = {"night": 0, "morning": 4, "evening": 15}
"""Hours after 4:00: asleep, commuting, out."""
LOAD_PINGS_PER_S = 1_000_000
METRES_PER_E7 = 0.011_119_5
JITTER_M_MAX = 24.2
SLICES = 7
SAMPLE_SECONDS = 0.1


def measure(devices: int, repeats: int, pings_per_repeat: int, say: Say) -> Report:
    """Batches as a load test asks for them, ids and all, at three hours of a day; then the same pings cut otherwise."""
    report = Report("world")
    started_s = time.monotonic()
    life = Life(1, devices)
    seconds = pings_per_repeat / LOAD_PINGS_PER_S
    _drain(life.pings_at_rate(LOAD_PINGS_PER_S, DAY_START_MS, DAY_START_MS + 100))
    _drain(life.first_sight(DAY_START_MS, min(devices, BATCH_PINGS)), 1)
    say(f"a world of {devices:,} phones after {time.monotonic() - started_s:.1f} s")
    ns_per_ping: dict[str, float] = {}
    for name, hour in HOURS.items():
        found = []
        for repeat in range(repeats):
            from_ms = DAY_START_MS + hour * HOUR_MS + repeat * DAY_MS
            until_ms = from_ms + round(seconds * 1_000)
            wall_s = time.perf_counter()
            count = _drain(life.pings_at_rate(LOAD_PINGS_PER_S, from_ms, until_ms))
            wall_s = time.perf_counter() - wall_s
            found.append(wall_s * 1e9 / count)
            _expect_about(report, f"pings {name}", (until_ms - from_ms) * LOAD_PINGS_PER_S // 1_000, count, life)
        ns_per_ping[name] = float(np.median(found))
        say(f"{name}: {ns_per_ping[name]:.0f} ns a ping")
    slowest = max(ns_per_ping.values())
    report.values = {
        "pings_per_s_per_core": 1e9 / slowest,
        "ns_per_ping": ns_per_ping,
        "datum_ns_per_ping": _datum_ns(life),
        "devices": devices,
        "partners": len(life.partners),
        "batch_pings": BATCH_PINGS,
        "natural_pings_per_s": float(life.expected_pings_per_s(DAY_START_MS + HOURS["evening"] * HOUR_MS).sum()),
    }
    report.notes.append(
        "One thread, batches of columns with ids, coordinates and times, as they go into logs. The slowest of three "
        "hours of the day counts. datum_ns_per_ping: what JSON bodies in partners' datums cost besides."
    )
    _check(report, life)
    return report


def _drain(batches: Iterator[PingBatch], batches_max: int | None = None) -> int:
    count = 0
    for made, batch in enumerate(batches, 1):
        count += len(batch)
        if made == batches_max:
            break
    return count


def _expect_about(report: Report, what: str, expected: int, got: int, life: Life) -> None:
    if abs(expected - got) > len(life.partners):
        report.faults.append(f"{what}: expected {expected} to within one a partner, got {got}")


def _datum_ns(life: Life) -> float:
    (batch, *_) = life.pings_at_rate(LOAD_PINGS_PER_S, DAY_START_MS, DAY_START_MS + 9)
    life.in_datum(batch)
    wall_s = time.perf_counter()
    for _ in range(10):
        life.in_datum(batch)
    return (time.perf_counter() - wall_s) * 1e8 / len(batch)


def _check(report: Report, life: Life) -> None:
    """A tenth of a second: cut into slices for several workers it is the same; ids are each phone's own; and every
    ping is where its phone is.
    """
    from_ms = DAY_START_MS + HOURS["morning"] * HOUR_MS
    length_ms = round(SAMPLE_SECONDS * 1_000)
    whole = _rows(life.pings_at_rate(LOAD_PINGS_PER_S, from_ms, from_ms + length_ms))
    cuts = [from_ms + length_ms * i // SLICES for i in range(SLICES + 1)]
    parts = [
        _rows(life.pings_at_rate(LOAD_PINGS_PER_S, start_ms, stop_ms, (worker, 3), 100))
        for start_ms, stop_ms in itertools.pairwise(cuts)
        for worker in range(3)
    ]
    report.expect("the same pings in slices", True, sorted(whole) == sorted(row for part in parts for row in part))

    live = min(life.phone_count, 20_000)
    first = next(life.first_sight(from_ms, live))
    ids = {first.device_id(i) for i in range(len(first))}
    report.expect("ids of phones seen first", len(first), len(ids))
    phones = np.arange(min(life.phone_count, 100_000), dtype=np.uint32)
    partner, id_bytes, id_end = life.phone_ids(phones)
    ends = id_end.tolist()
    index = {id_bytes[start:end].tobytes(): i for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))}
    seen = off = 0
    for name, degrees_lat, degrees_lng, observed_at_ms, owner in whole:
        phone = index.get(name)
        if phone is None or life.clock_offset_ms([phone])[0]:
            continue
        seen += 1
        lat, lng = life.where([phone], [observed_at_ms])
        north_m = (int(lat[0]) - degrees_lat) * METRES_PER_E7
        east_m = (int(lng[0]) - degrees_lng) * METRES_PER_E7 * np.cos(np.radians(lat[0] / E7))
        off += bool(north_m**2 + east_m**2 > JITTER_M_MAX**2 or partner[phone] != owner)
        if seen == 1_000:
            break
    report.expect("pings away from their phone", 0, off)


def _rows(batches: Iterator[PingBatch]) -> list[tuple[bytes, int, int, int, int]]:
    rows = []
    for batch in batches:
        ends = batch.id_end.tolist()
        names = [batch.id_bytes[start:end].tobytes() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        columns = (batch.lat_e7, batch.lng_e7, batch.observed_at_ms, batch.partner)
        rows += list(zip(names, *(column.tolist() for column in columns), strict=True))
    return rows
