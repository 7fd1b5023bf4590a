"""Raw pings are found in whatever file they stand, with their age; and nothing else is taken for one."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from flows.checkpoints import MAGIC, CheckpointStore
from flows.raw_pings import FileFinding, count_id, limit_ms, scan
from flows.server import packed
from flows.wire import encode_entry, encode_pings
from geoindex.devices import DeviceTable
from geoindex.entries import HOUR_MS, Settings
from geoindex.shard import ShardMachine
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

AT_MS = 1_700_000_000_000
PARTNERS = ("amap",)
SETTINGS = Settings(shard_count=1, partners=PARTNERS, hash_key=5, live_window_ms=2 * HOUR_MS)


def pings(*observed_at_ms: int) -> bytes:
    """The payload of a batch; ids of different lengths, so that all of its columns are there."""
    events = [
        PingEvent("amap", f"phone-{'x' * number}", 300_000_000, 1_140_000_000, time_ms)
        for number, time_ms in enumerate(observed_at_ms)
    ]
    return encode_pings(batch_of(events, PARTNERS))


def logged(log_ms: int, payload: bytes) -> bytes:
    """The command that an append-only file holds for a batch."""
    return packed("XADD", "log:{s0}", f"{log_ms}-0", "pings", payload)


def only(folder: Path) -> FileFinding:
    (finding,) = scan(folder)
    return finding


def test_an_append_only_file_tells_how_long_its_oldest_batch_has_been_there(tmp_path: Path) -> None:
    kind, payload = encode_entry(SETTINGS)
    file = tmp_path / "appendonly.aof.1.incr.aof"
    file.write_bytes(
        packed("SELECT", 0)
        + packed("XADD", "log:{s0}", f"{AT_MS - 9000}-0", kind, payload)
        + logged(AT_MS - 2000, pings(AT_MS - 90_000, AT_MS - 2000))
        + packed("SET", "done:{s0}", f"{AT_MS - 2000}-0")
        + logged(AT_MS - 5000, pings(AT_MS))  # of another shard: the order of ids is that of its log alone
        + packed("XADD", "push:{s0}:amap", "1-1", "alert", b"pings")
        + packed("XADD", "log:{s0}", "1-0", "tick", b"pings")
    )
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.oldest_ms) == ("append-only file", 3, AT_MS - 5000)
    assert finding.live_window_ms == 2 * HOUR_MS
    assert finding.problem is None


@pytest.mark.parametrize("name", ["copy.bin", "temp-rewriteaof-bg-71.aof", "valkey.log", "deep/er/x"])
def test_whatever_a_file_is_called_a_batch_in_it_is_found(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x00rubbish *5\r\n" + logged(AT_MS, pings(AT_MS, AT_MS)) + b"more")
    assert (only(tmp_path / name.partition("/")[0]) if "/" in name else only(tmp_path)).ping_count == 2


def test_a_batch_that_is_cut_off_still_holds_pings(tmp_path: Path) -> None:
    whole = logged(AT_MS, pings(*range(AT_MS - 50, AT_MS)))
    (tmp_path / "x.aof").write_bytes(whole[: len(whole) // 2])
    finding = only(tmp_path)
    assert (finding.ping_count, finding.oldest_ms) == (50, AT_MS)


def test_a_bare_batch_is_as_old_as_its_newest_ping(tmp_path: Path) -> None:
    (tmp_path / "core.4711").write_bytes(b"x" * 1001 + pings(AT_MS - 7000, AT_MS - 3000) + b"y" * 77)
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.oldest_ms) == ("other", 1, AT_MS - 3000)


def test_a_batch_inside_a_command_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "x.aof").write_bytes(logged(AT_MS, pings(AT_MS)) + pings(AT_MS - 1))
    assert only(tmp_path).ping_count == 2


@pytest.mark.parametrize(
    "raw", [b"", b"{}", b"\x86\xa1v\x01\xa1n", b"\r\n$5\r\npings\r\n$", b"pings\n" * 99, MAGIC[:-1]]
)
def test_what_only_looks_like_pings_is_none(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(raw)
    finding = only(tmp_path)
    assert (finding.ping_count, finding.oldest_ms, finding.problem) == (0, None, None)


def checkpoint(folder: Path, *observed_at_ms: int) -> Path:
    machine = ShardMachine()
    machine.apply(AT_MS, SETTINGS)
    events = [PingEvent("amap", f"phone-{time_ms}", 300_000_000, 1_140_000_000, time_ms) for time_ms in observed_at_ms]
    if events:
        machine.apply(AT_MS, batch_of(events, PARTNERS))
    written = CheckpointStore(folder, SETTINGS).write(0, (AT_MS, 0), machine.state(), machine.columns())
    CheckpointStore(folder, SETTINGS).finalise(written)
    (path,) = folder.rglob("*.checkpoint")
    return path


def test_a_checkpoint_tells_its_oldest_location(tmp_path: Path) -> None:
    checkpoint(tmp_path, AT_MS - 1000, AT_MS - HOUR_MS, AT_MS)
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.oldest_ms) == ("checkpoint", 3, AT_MS - HOUR_MS)
    assert (finding.live_window_ms, finding.problem) == (2 * HOUR_MS, None)


def test_a_checkpoint_without_locations_has_none(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.oldest_ms, finding.problem) == ("checkpoint", 0, None, None)


def test_a_checkpoint_that_was_never_finished_is_looked_into_as_far_as_it_goes(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, *range(AT_MS - 1000, AT_MS))
    path.with_suffix(".writing").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    path.unlink()
    finding = only(tmp_path)
    assert finding.kind == "checkpoint"
    assert 100 < finding.ping_count < 1000
    assert finding.oldest_ms == AT_MS - 1000


def test_a_location_beyond_the_live_window_by_the_checkpoints_own_clock_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that forgets to wipe.
    monkeypatch.setattr(DeviceTable, "sweep", lambda *_: None)
    machine = ShardMachine()
    machine.apply(AT_MS, SETTINGS)
    machine.apply(AT_MS, batch_of([PingEvent("amap", "phone", 0, 0, AT_MS - HOUR_MS)], PARTNERS))
    machine.apply(AT_MS + 2 * HOUR_MS, SETTINGS)
    store = CheckpointStore(tmp_path, SETTINGS)
    store.finalise(store.write(0, (AT_MS + 2 * HOUR_MS, 0), machine.state(), machine.columns()))
    assert only(tmp_path).problem == "by its own clock it holds a location 60 min older than the live window"


def test_a_file_that_begins_as_a_checkpoint_and_is_none_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(MAGIC + b"\xff" * 100)
    assert only(tmp_path).problem == "it begins as a checkpoint and cannot be read"


def test_a_snapshot_is_not_taken_for_clean(tmp_path: Path) -> None:
    (tmp_path / "dump.rdb").write_bytes(b"REDIS0011\xfa" + bytes(100))
    finding = only(tmp_path)
    assert (finding.kind, finding.oldest_ms) == ("snapshot", None)
    assert "cannot be looked into" in str(finding.problem)


@pytest.mark.parametrize("name", ["pings.csv", "pings.csv.gz"])
def test_a_recording_is_as_old_as_its_oldest_ping(name: str, tmp_path: Path) -> None:
    text = f"device_id,lat,lng,observed_at\na,30,114,{AT_MS - 5}\nb,30,114,{AT_MS - 77}\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.oldest_ms) == ("recording", 2, AT_MS - 77)


def test_a_table_of_something_else_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "costs.csv").write_text("month,yuan\n5,3\n")
    finding = only(tmp_path)
    assert (finding.kind, finding.ping_count, finding.problem) == ("other", 0, None)


def test_allowed_is_the_longest_live_window_that_a_file_names_and_an_hour(tmp_path: Path) -> None:
    assert limit_ms([], None) == Settings().live_window_ms + HOUR_MS
    checkpoint(tmp_path)
    findings = list(scan(tmp_path))
    assert limit_ms(findings, None) == 3 * HOUR_MS
    assert limit_ms(findings, 1000) == HOUR_MS + 1000


def test_an_id_is_counted_in_bytes_and_in_records(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"phone-1 phone-12 phone-1")
    assert count_id(tmp_path / "x", b"phone-1") == 3
    assert count_id(tmp_path / "x", b"nobody") == 0
    path = checkpoint(tmp_path / "c", AT_MS, AT_MS - 1)
    assert count_id(path, f"phone-{AT_MS}".encode()) >= 1
    assert count_id(path, b"phone-9") == 0
