"""Offline runs over files, through the flow, against the reference that merges files the obvious way."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from bytewax.testing import run_main

from flows.match import build_flow
from flows.recording import PingReader, UnreadableFile
from flows.replay import CollectedPushes, CollectingSink, Recording, RecordingSource, read_alert_events
from geoindex.entries import HOUR_MS, AlertClose, AlertRevision, Settings
from geoindex.shard import ShardMachine
from tests.reference.file_generator import generate_files, write_alert_file, write_ping_file
from tests.reference.file_merge import reference_run
from tests.reference.matcher import DevicePush, by_device_and_alert

GEOLIFE = Path(__file__).parents[3] / "shared" / "data" / "geolife_sample.txt.gz"
T0 = 1_700_000_000_000


def _run(
    pings: Path, alerts: Path, live_window_ms: int = 6 * HOUR_MS, shards: int = 4, batch_rows: int = 65_536
) -> tuple[bytes, CollectedPushes, dict[str, int]]:
    """The output's bytes, what was collected, and refused rows by reason."""
    settings = Settings(shard_count=shards, live_window_ms=live_window_ms)
    events, _ = read_alert_events(alerts, settings)
    reader = PingReader(pings, batch_rows)
    collected = CollectedPushes()
    source = RecordingSource(Recording(reader, events, settings))
    run_main(build_flow(source, CollectingSink(collected, shards), lambda _shard: ShardMachine()))
    if source.problem is not None:
        raise source.problem
    return b"".join(collected.lines()), collected, reader.set_aside.counts


def _pushes(output: bytes) -> list[DevicePush]:
    lines = [json.loads(line) for line in output.splitlines()]
    names = ("at", "kind", "alert_id", "revision", "partner", "device_id", "ring_km")
    return [DevicePush(*(line[name] for name in names)) for line in lines]


def _valid(events: list[tuple[int, AlertRevision | AlertClose]]) -> list[tuple[int, AlertRevision | AlertClose]]:
    """Without what a file refuses and a log would not: it is tested by name in test_alert_json."""
    published: set[str] = set()
    valid: list[tuple[int, AlertRevision | AlertClose]] = []
    for at_ms, event in events:
        if isinstance(event, AlertRevision):
            if event.alert.revision < 1 or event.alert.expires_at_ms <= event.alert.missing_since_ms:
                continue
            if event.event == "publish":
                published.add(event.alert.alert_id)
        elif event.alert_id not in published or (event.revision is not None and event.revision < 1):
            continue
        valid.append((at_ms, event))
    return valid


@pytest.mark.parametrize("seed", range(12))
def test_files_give_what_the_reference_gives_whatever_the_shards_and_batches(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    case = generate_files(rng, with_at=seed % 2 == 0, with_partner=seed % 3 > 0)
    pings, alerts = tmp_path / ("pings.csv.gz" if seed % 4 == 0 else "pings.csv"), tmp_path / "alerts.jsonl"
    write_ping_file(pings, case.rows)
    write_alert_file(alerts, _valid(case.alert_events))
    expected = reference_run(pings, alerts, case.live_window_ms)
    first, collected, set_aside = _run(pings, alerts, case.live_window_ms)
    assert by_device_and_alert(_pushes(first)) == by_device_and_alert(expected.pushes)
    assert sum(set_aside.values()) + sum(collected.pings_refused.values()) == sum(expected.refused.values())
    assert collected.pings_accepted == len(case.rows) - sum(expected.refused.values())
    for shards, batch_rows in ((1, 1), (7, 50)):
        assert _run(pings, alerts, case.live_window_ms, shards, batch_rows)[0] == first


def test_lines_are_sorted_by_at(tmp_path: Path) -> None:
    case = generate_files(np.random.default_rng(3), with_at=True)
    pings, alerts = tmp_path / "pings.csv", tmp_path / "alerts.jsonl"
    write_ping_file(pings, case.rows)
    write_alert_file(alerts, case.alert_events)
    times_ms = [push.at_ms for push in _pushes(_run(pings, alerts)[0])]
    assert times_ms == sorted(times_ms)
    assert len(times_ms) > 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "missing device_id, lat, lng, observed_at"),
        ("device_id,lat,lng\n", r"pings\.csv:1: .* missing observed_at, got 'device_id,lat,lng'"),
    ],
)
def test_a_file_without_the_columns_is_refused_by_name(text: str, words: str, tmp_path: Path) -> None:
    pings, alerts = tmp_path / "pings.csv", tmp_path / "alerts.jsonl"
    pings.write_text(text)
    alerts.write_text("")
    with pytest.raises(UnreadableFile, match=words):
        _run(pings, alerts)


def test_a_file_cut_in_the_middle_of_its_compression_is_refused(tmp_path: Path) -> None:
    pings, alerts = tmp_path / "pings.csv.gz", tmp_path / "alerts.jsonl"
    whole = gzip.compress(
        ("device_id,lat,lng,observed_at\n" + "".join(f"a{row * row},1,2,{T0}\n" for row in range(9000))).encode()
    )
    pings.write_bytes(whole[: len(whole) // 2])
    alerts.write_text("")
    with pytest.raises(UnreadableFile, match="after line"):
        _run(pings, alerts)


def test_bad_rows_are_named_with_line_and_reason_and_nothing_else_is_lost(tmp_path: Path) -> None:
    pings, alerts = tmp_path / "pings.csv", tmp_path / "alerts.jsonl"
    pings.write_bytes(
        b"device_id,lat,lng,observed_at\n"
        + f"good,30,114,{T0}\n".encode()
        + f"north,91,114,{T0}\n".encode()
        + f"nan,nan,114,{T0}\n".encode()
        + f",30,114,{T0}\n".encode()
        + f"{'x' * 65},30,114,{T0}\n".encode()
        + b"\xff\xfe,30,114,1700000000000\n"
        + b"when,30,114,noon\n"
        + b"short,30\n"
        + f"underscore,3_0,114,{T0}\n".encode()
        + f"good2,30,114,{T0}\n".encode()
    )
    alerts.write_text(
        json.dumps(
            {
                "at": T0,
                "event": "publish",
                "alert": {"alert_id": "a", "location": {"lat": 30, "lng": 114}, "missing_since": T0},
            }
        )
    )
    settings = Settings(shard_count=1)
    events, _ = read_alert_events(alerts, settings)
    reader = PingReader(pings, 3)
    collected = CollectedPushes()
    source = RecordingSource(Recording(reader, events, settings))
    run_main(build_flow(source, CollectingSink(collected, 1), lambda _shard: ShardMachine()))
    assert {push.device_id for push in _pushes(b"".join(collected.lines()))} == {"good", "good2"}
    assert reader.set_aside.counts == {
        "latitude": 3,
        "id_length": 2,
        "id_utf8": 1,
        "observed_at": 1,
        "columns": 1,
    }
    assert reader.set_aside.examples[0] == (f"{pings}:3: latitude must be a number from -90 to 90, got '91'")
    assert f"{pings}:9: must have 4 fields as the header, got 2" in reader.set_aside.examples


@pytest.mark.skipif(not GEOLIFE.exists(), reason="the GeoLife sample is not beside the checkout")
def test_real_trips_against_small_rings_give_what_the_reference_gives(tmp_path: Path) -> None:
    """217,653 fixes of two people in Beijing; each trip (no gap above 20 minutes) is a device of its own."""
    pings, alerts = tmp_path / "pings.csv", tmp_path / "alerts.jsonl"
    rows: list[tuple[int, str, str, str]] = []
    with gzip.open(GEOLIFE, "rt") as fixes:
        next(fixes)
        for fix in fixes:
            lat, lng, moment, person = fix.strip().split(",")
            rows.append(
                (round(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() * 1000), person, lat, lng)
            )
    trip, last_ms = dict.fromkeys(("001", "005"), 0), dict.fromkeys(("001", "005"), 0)
    lines: list[tuple[int, str]] = []
    for at_ms, person, lat, lng in rows:
        if at_ms - last_ms[person] > 20 * 60_000:
            trip[person] += 1
        last_ms[person] = at_ms
        lines.append((at_ms, f"{person}-trip-{trip[person]:04d},{lat},{lng},{at_ms}\n"))
    lines.sort(key=lambda line: line[0])
    pings.write_text("device_id,lat,lng,observed_at\n" + "".join(line for _, line in lines))
    start_ms, end_ms = lines[0][0], lines[-1][0]
    with alerts.open("w") as events:
        for number, (center_lat, center_lng) in enumerate(
            [(39.984, 116.319), (39.91, 116.40), (40.0, 116.33), (39.95, 116.45)]
        ):
            for repeat in range(6):
                at_ms = start_ms + (end_ms - start_ms) * (6 * number + repeat) // 24
                alert = {
                    "alert_id": f"a{number}-{repeat}",
                    "location": {"lat": center_lat, "lng": center_lng},
                    "missing_since": at_ms,
                    "schedule": [[1, 0.5], [5, 2], [30, 4.5], [None, 9]],
                    "expires_at": at_ms + 300 * HOUR_MS,
                }
                events.write(json.dumps({"at": at_ms, "event": "publish", "alert": alert}) + "\n")
                if repeat % 2:
                    close = {"at": at_ms + 200 * HOUR_MS, "event": "close", "alert_id": f"a{number}-{repeat}"}
                    events.write(json.dumps(close | {"outcome": "found"}) + "\n")
    expected = reference_run(pings, alerts, 6 * HOUR_MS)
    output, collected, _ = _run(pings, alerts, shards=3, batch_rows=10_000)
    assert len(lines) == 217_653
    assert len(expected.pushes) > 100
    assert by_device_and_alert(_pushes(output)) == by_device_and_alert(expected.pushes)
    assert collected.pings_accepted == 217_653 - sum(expected.refused.values())
