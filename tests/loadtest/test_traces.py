"""Recorded pings are sent again as they were, faster if wished, and a file that is none is refused by its line."""

from __future__ import annotations

import gzip
from collections import Counter
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.recording import PingReader
from geoindex.columns import PingBatch
from loadtest.traces import Trace, UnreadableTrace

GEOLIFE = Path(__file__).parents[3] / "shared" / "data" / "geolife_sample.txt.gz"
START_MS = 1_750_000_000_000

SMALL = """device_id,lat,lng,observed_at,partner,at
a,30.1,104.5,1700000000000,amap,1700000000500
b,-31.25,-104.5,2023-11-14T22:13:21Z,ditu,1700000001000
\xe9,0,180,1700000001000,amap,1700000001500

a,30.2,104.6,1699999999000,amap,1700000003500
"""


def write(folder: Path, text: str, name: str = "pings.csv") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.fixture
def small(tmp_path: Path) -> Trace:
    return Trace.read(write(tmp_path, SMALL))


Row = tuple[str, str, int, int, int, int]


def rows(trace: Trace, batches: list[PingBatch]) -> list[Row]:
    found = []
    for batch in batches:
        assert batch.at_ms is not None
        found += [
            (
                batch.device_id(i),
                trace.partner_names[batch.partner[i]],
                int(batch.lat_e7[i]),
                int(batch.lng_e7[i]),
                int(batch.observed_at_ms[i]),
                int(batch.at_ms[i]),
            )
            for i in range(len(batch))
        ]
    return found


def test_a_trace_is_sent_again_at_its_own_pace(small: Trace) -> None:
    replay = small.replay(START_MS)
    assert rows(small, list(replay.pings(START_MS, START_MS + 10_000, timed=True))) == [
        ("a", "amap", 301_000_000, 1_045_000_000, START_MS - 500, START_MS),
        ("b", "ditu", -312_500_000, -1_045_000_000, START_MS + 500, START_MS + 500),
        ("é", "amap", 0, 1_800_000_000, START_MS + 500, START_MS + 1_000),
        ("a", "amap", 302_000_000, 1_046_000_000, START_MS - 1_500, START_MS + 3_000),
    ]
    assert replay.end_ms == START_MS + 3_001
    assert replay.partner_names == ("amap", "ditu")


def test_a_minute_may_take_a_second(small: Trace) -> None:
    replay = small.replay(START_MS, warp=10)
    sent = rows(small, list(replay.pings(START_MS, START_MS + 301, timed=True)))
    assert [row[5] - START_MS for row in sent] == [0, 50, 100, 300]
    assert [row[4] - START_MS for row in sent] == [-50, 50, 50, -150]
    assert list(replay.pings(START_MS + 301, START_MS + 10_000)) == []
    assert replay.pings_per_s == pytest.approx(10.0)


def test_a_loop_begins_again_where_the_next_row_would_have_been(small: Trace) -> None:
    replay = small.replay(START_MS, loop=True)
    assert small.duration_ms == 4_000
    sent = rows(small, list(replay.pings(START_MS + 3_000, START_MS + 8_500, timed=True)))
    assert [(row[0], row[5] - START_MS) for row in sent] == [
        ("a", 3_000),
        ("a", 4_000),
        ("b", 4_500),
        ("é", 5_000),
        ("a", 7_000),
        ("a", 8_000),
    ]
    assert replay.end_ms is None


def test_without_arrivals_a_row_arrives_at_the_latest_observation_so_far(tmp_path: Path) -> None:
    trace = Trace.read(write(tmp_path, "observed_at,lng,lat,device_id,v\n1000,2,1,x,9\n5000,2,1,y,9\n3000,2,1,z,9\n"))
    assert trace.arrived_ms.tolist() == [1_000, 5_000, 5_000]
    assert trace.observed_at_ms.tolist() == [1_000, 5_000, 3_000]
    assert trace.partner_names == ("default",)


def test_partners_keep_the_order_of_the_settings(tmp_path: Path) -> None:
    trace = Trace.read(write(tmp_path, SMALL, "pings.csv.gz"), partners=("ditu", "zhifu", "amap"))
    assert trace.partner.tolist() == [2, 0, 2, 2]
    assert trace.partner_names == ("ditu", "zhifu", "amap")


cuts = st.lists(st.integers(0, 30_000), max_size=5).map(lambda inner: [0, *sorted(inner), 30_000])


@given(
    st.lists(st.tuples(st.integers(0, 4_000), st.text("abé", min_size=1, max_size=9)), min_size=1, max_size=30),
    cuts,
    st.integers(1, 4),
    st.sampled_from([0.3, 1.0, 7.0]),
    st.booleans(),
    st.integers(1, 5),
)
def test_slices_and_workers_send_each_ping_once_however_they_are_cut(
    steps: list[tuple[int, str]], slices: list[int], workers: int, warp: float, loop: bool, batch_size: int
) -> None:
    arrived_ms = np.cumsum([step for step, _ in steps]).astype(np.int64) + 1_000
    ids = [name.encode() for _, name in steps]
    trace = Trace(
        ("one",),
        np.zeros(len(ids), np.uint16),
        np.frombuffer(b"".join(ids), np.uint8),
        np.cumsum([len(name) for name in ids]).astype(np.uint32),
        np.arange(len(ids), dtype=np.int32),
        np.arange(len(ids), dtype=np.int32),
        arrived_ms - 5,
        arrived_ms,
    )
    replay = trace.replay(START_MS, warp, loop)
    # Row by row, without columns.
    expected = [
        (name.decode(), START_MS + int((int(at_ms) - int(arrived_ms[0]) + turn * trace.duration_ms) // warp))
        for turn in range(300 if loop else 1)
        if turn * trace.duration_ms / warp <= 30_001
        for name, at_ms in zip(ids, arrived_ms, strict=True)
    ]
    expected = [row for row in expected if row[1] < START_MS + 30_000]
    parts = []
    for start_ms, stop_ms in pairwise(slices):
        for worker in range(workers):
            span = (START_MS + start_ms, START_MS + stop_ms)
            part = rows(trace, list(replay.pings(*span, (worker, workers), batch_size, timed=True)))
            assert all(span[0] <= row[5] < span[1] for row in part)
            parts += [(row[0], row[5]) for row in part]
    assert Counter(parts) == Counter(expected)
    if workers == 1:
        assert parts == expected


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("device_id,lat,lng\n", 1, "must name the columns device_id, lat, lng, observed_at (and may name partner, at)"),
        ("", 1, "missing device_id, lat, lng, observed_at, got ''"),
        (SMALL.replace("30.2", "91"), 6, "lat must be a number from -90 to 90, got '91'"),
        (SMALL.replace("104.6", "nan"), 6, "lng must be a number from -180 to 180, got 'nan'"),
        (SMALL.replace("-31.25", "1_0"), 3, "lat must be a number from -90 to 90, got '1_0'"),
        (
            SMALL.replace("2023-11-14T22:13:21Z", "noon"),
            3,
            "observed_at must be ms since 1970 or an ISO 8601 time",
        ),
        (SMALL.replace("1700000003500", "1700000000000"), 6, "at must not fall, got 1700000000000 after 1700000001500"),
        (SMALL.replace("b,", f"{'b' * 65},"), 3, "device_id must be 1 to 64 bytes, got 65"),
        (SMALL.replace("b,", ","), 3, "device_id must be 1 to 64 bytes, got 0"),
        (SMALL.replace(",ditu", ""), 3, "must have 6 fields as the header, got 5"),
        (SMALL.replace("ditu", "nobody"), 3, "partner must be one of amap, ditu, got 'nobody'"),
        (SMALL.replace("1700000000000", "-1"), 2, "observed_at must be ms since 1970 or an ISO 8601 time, got '-1'"),
    ],
)
def test_what_is_no_recording_is_refused_with_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UnreadableTrace) as refused:
        Trace.read(path, partners=("amap", "ditu"))
    assert str(refused.value).startswith(f"{path}:{line}: ")
    assert message in str(refused.value)


def test_a_file_cut_in_the_middle_of_its_compression_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.csv.gz"
    path.write_bytes(gzip.compress(SMALL.encode())[:-20])
    with pytest.raises(UnreadableTrace, match=r"cut\.csv\.gz: after line \d+: "):
        Trace.read(path)


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableTrace, match="must hold a ping at least"):
        Trace.read(write(tmp_path, "device_id,lat,lng,observed_at\n"))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pings.csv"
    path.write_bytes(b"device_id,lat,lng,observed_at\n\xff,1,2,3\n")
    with pytest.raises(UnreadableTrace, match=r"pings\.csv: after line \d: .*decode"):
        Trace.read(path)


@pytest.mark.parametrize(
    ("warp", "share", "message"),
    [(0.0, (0, 1), "warp: required more than 0"), (1.0, (3, 3), "share: required")],
)
def test_a_replay_that_makes_no_sense_is_refused(
    small: Trace, warp: float, share: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small.replay(START_MS, warp).pings(START_MS, START_MS + 1, share)


@pytest.mark.skipif(not GEOLIFE.exists(), reason="the recorded traces are not at hand")
def test_real_traces_are_replayed_whole_and_read_as_the_offline_run_reads_them(tmp_path: Path) -> None:
    lines = gzip.decompress(GEOLIFE.read_bytes()).decode().splitlines()[1:]
    fixes = [line.split(",") for line in lines][::20]
    fixes.sort(key=lambda fix: fix[2])
    csv_rows = [f"{uid},{lat},{lng},{datetime.fromisoformat(when).isoformat()}" for lat, lng, when, uid in fixes]
    path = write(tmp_path, "\n".join(["device_id,lat,lng,observed_at", *csv_rows]), "geolife.csv.gz")
    trace = Trace.read(path)
    recorded = next(PingReader(path, 1 << 20).chunks())
    assert len(trace) == len(recorded) > 10_000
    assert np.array_equal(trace.lat_e7, np.rint(recorded.lat * 1e7))
    assert np.array_equal(trace.observed_at_ms, recorded.observed_at_ms)

    hours_ms = [3_600_000 * hour for hour in range(trace.duration_ms // 60 // 3_600_000 + 2)]
    replay = trace.replay(START_MS, warp=60)
    sent = [batch for since, until in pairwise(hours_ms) for batch in replay.pings(START_MS + since, START_MS + until)]
    assert sum(map(len, sent)) == len(trace)
    assert np.array_equal(np.concatenate([batch.lat_e7 for batch in sent]), trace.lat_e7)
    ids = [batch.device_id(i) for batch in sent for i in range(len(batch))]
    assert Counter(ids) == Counter(recorded.ids)
