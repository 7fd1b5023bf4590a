"""`tuanyuan match` as a user runs it: small files, and every line of the result worked out by hand."""

from __future__ import annotations

import gzip
import re
import shlex
import signal
import subprocess
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.tuanyuan import COMMAND, ROOT, Ran, Running, clean_environment, compile_kernels, run, run_all, wait_until

# The child went missing in Chengdu at 14:30 Beijing time; one degree of latitude is 111.195 km.
PINGS = """\
device_id,lat,lng,observed_at,partner
asleep,30.66,104.06,2026-05-01T08:00:00+08:00,baidu
near,30.70,104.06,2026-05-01T14:40:00+08:00,amap
"far, 150 km",32.00,104.06,2026-05-01T14:50:00+08:00,amap
north,91,104.06,2026-05-01T14:50:00+08:00,amap
近处,30.66,104.06,2026-05-01T06:55:00Z,baidu
driver,33.00,104.06,2026-05-01T15:00:00+08:00,baidu
driver,30.66,104.50,2026-05-01T15:20:00+08:00,baidu
,30.66,104.06,2026-05-01T15:20:00+08:00,baidu
near,20.00,104.06,2026-05-01T15:40:00+08:00,amap
after,30.66,104.06,2026-05-01T16:30:00+08:00,amap
"""
ALERTS = """\
{"at":"2026-05-01T14:45:00+08:00","event":"publish","alert":{"alert_id":"a17","location":{"lat":30.66,"lng":104.06},\
"missing_since":"2026-05-01T14:30:00+08:00"}}

{"at":"2026-05-01T15:45:00+08:00","event":"update","alert":{"alert_id":"a17","audience":["amap"]}}
{"at":"2026-05-01T15:50:00+08:00","event":"update","alert":{"alert_id":"a17","expires":"tomorrow"}}
{"at":"2026-05-01T16:00:00+08:00","event":"close","alert_id":"a17","outcome":"found"}
{"at":"2026-05-01T16:10:00+08:00","event":"close","alert_id":"a18","outcome":"found"}
{"at":"2026-05-01T16:20:00+08:00","event":"close","alert_id":"a17","outcome":"found"}
"""
AT_14_45, AT_14_55, AT_15_20, AT_15_30, AT_15_45, AT_16_00 = (
    1777617900000, 1777618500000, 1777620000000, 1777620600000, 1777621500000, 1777622400000,
)  # fmt: skip


def line(at_ms: int, kind: str, revision: int, partner: str, device_id: str, ring_km: int) -> str:
    return (
        f'{{"at":{at_ms},"kind":"{kind}","alert_id":"a17","revision":{revision},'
        f'"partner":"{partner}","device_id":"{device_id}","ring_km":{ring_km}}}\n'
    )


PUSHES = "".join(
    [
        line(AT_14_45, "alert", 1, "amap", "near", 100),
        line(AT_14_55, "alert", 1, "baidu", "近处", 100),
        line(AT_15_20, "alert", 1, "baidu", "driver", 100),
        line(AT_15_30, "alert", 1, "amap", "far, 150 km", 200),  # the ring grows; nobody pings
        # The edit goes to everyone told, also to baidu's; "near" has left, "asleep" was silent for too long.
        line(AT_15_45, "update", 2, "amap", "far, 150 km", 200),
        line(AT_15_45, "update", 2, "amap", "near", 200),
        line(AT_15_45, "update", 2, "baidu", "driver", 200),
        line(AT_15_45, "update", 2, "baidu", "近处", 200),
        line(AT_16_00, "resolved", 2, "amap", "far, 150 km", 200),
        line(AT_16_00, "resolved", 2, "amap", "near", 200),
        line(AT_16_00, "resolved", 2, "baidu", "driver", 200),
        line(AT_16_00, "resolved", 2, "baidu", "近处", 200),
    ]
)
SAID = """\
pings.csv:5: latitude must be a number from -90 to 90, got '91'
pings.csv:9: device_id must be 1 to 64 bytes, got 0
alerts.jsonl:4: alert 'a17': unknown field 'expires'; known are alert_id, revision, location, missing_since, \
schedule, expires_at, status, audience, headline, description, instruction, contact, web, photo_url
alerts.jsonl:6: alert 'a18': cannot be closed: it was never published
alerts.jsonl:7: alert 'a17': this close has no effect: the alert is closed already
pings: 8 accepted; set aside: id_length 1, latitude 1
alert events refused: 2
pushes: 12 -> out.jsonl
"""
MATCH = ["match", "--pings", "pings.csv", "--alerts", "alerts.jsonl", "--out"]
ONE_EVENT = ALERTS.splitlines()[0] + "\n"


def match(pings: str, alerts: str, out: str, *options: str) -> list[str]:
    return ["match", "--pings", pings, "--alerts", alerts, "--out", out, *options]


RUNS: dict[str, list[str]] = {
    "one shard, row by row": match("pings.csv", "alerts.jsonl", "one.jsonl", "--shards", "1", "--batch-rows", "1"),
    "many shards": match("pings.csv", "alerts.jsonl", "many.jsonl", "--shards", "64", "--batch-rows", "3"),
    "gzip": match("pings.csv.gz", "alerts.jsonl", "gzip.jsonl"),
    "older result": match("pings.csv", "alerts.jsonl", "older.jsonl"),
    "long window": match("pings.csv", "alerts.jsonl", "window.jsonl", "--live-window", "12h"),
    "strict, bad rows": match("pings.csv", "clean.jsonl", "strict-1.jsonl", "--strict"),
    "strict, bad events": match("clean.csv", "unknown.jsonl", "strict-2.jsonl", "--strict"),
    "strict, nothing bad": match("clean.csv", "clean.jsonl", "strict-3.jsonl", "--strict"),
    "strict, an old ping": match("old.csv", "clean.jsonl", "strict-4.jsonl", "--strict"),
    "nothing at all": match("none.csv", "none.jsonl", "none-1.jsonl"),
    "no pings": match("none.csv", "alerts.jsonl", "none-2.jsonl"),
    "no alerts": match("pings.csv", "none.jsonl", "none-3.jsonl"),
    "no such folder": match("pings.csv", "alerts.jsonl", "nowhere/out.jsonl"),
    "a folder": match("pings.csv", "alerts.jsonl", "a-folder"),
    "cut gzip": match("cut.csv.gz", "alerts.jsonl", "kept.jsonl"),
    "damaged gzip": match("damaged.csv.gz", "alerts.jsonl", "kept.jsonl"),
    "over its pings": match("mine.csv", "alerts.jsonl", "mine.csv"),
    "over its alerts": match("pings.csv", "mine.jsonl", "link.jsonl"),
    "window of ages": match("pings.csv", "alerts.jsonl", "ages.jsonl", "--live-window", "99999999999999999999d"),
    "first row from the future": match("future.csv", "clean.jsonl", "future.jsonl"),
    "byte order mark": match("pings.csv", "bom.jsonl", "bom-out.jsonl"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("match")
    compile_kernels(folder)
    many = "device_id,lat,lng,observed_at\n" + "".join(f"a{n},30,104,{AT_14_45 + n}\n" for n in range(20_000))
    damaged = bytearray(gzip.compress(many.encode(), mtime=0))
    for position in range(5000, 5050):
        damaged[position] ^= 0xFF
    files: dict[str, str | bytes] = {
        "pings.csv": PINGS,
        "pings.csv.gz": gzip.compress(PINGS.encode()),
        "alerts.jsonl": ALERTS,
        "clean.csv": f"device_id,lat,lng,observed_at\nnear,30.70,104.06,{AT_14_45}\n",
        "clean.jsonl": ONE_EVENT,
        "unknown.jsonl": ONE_EVENT + "not json\n",
        "old.csv": f"device_id,lat,lng,observed_at,at\nold,30,104,1,{AT_14_45}\n",
        "none.csv": "device_id,lat,lng,observed_at\n",
        "none.jsonl": "\n",
        "older.jsonl": "older\n" * 1000,
        "kept.jsonl": "kept\n",
        "cut.csv.gz": gzip.compress(many.encode())[:-20],
        "damaged.csv.gz": bytes(damaged),
        "mine.csv": PINGS,
        "mine.jsonl": ALERTS,
        "future.csv": (
            f"device_id,lat,lng,observed_at,at\na,30,104,{AT_16_00},{AT_14_45}\nb,30,104,{AT_14_45},{AT_14_45}\n"
        ),
        "bom.jsonl": "\ufeff" + ALERTS,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "link.jsonl").symlink_to("mine.jsonl")
    (folder / "a-folder").mkdir()
    return folder


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, Ran]:
    return dict(zip(RUNS, run_all(list(RUNS.values()), folder), strict=True))


def result(folder: Path, ended: Ran) -> str:
    return (folder / ended.arguments[6]).read_text()


def said(ended: Ran) -> list[str]:
    return sorted(ended.err.strip().splitlines())


def test_a_run_over_files_writes_the_lines_worked_out_by_hand_and_names_what_it_set_aside(folder: Path) -> None:
    plain = run(*MATCH, "out.jsonl", folder=folder)
    assert plain.code == 0, plain.err
    assert result(folder, plain) == PUSHES
    assert said(plain) == sorted(SAID.splitlines())
    assert plain.out == ""


@pytest.mark.parametrize("name", ["one shard, row by row", "many shards", "gzip", "older result"])
def test_shards_batches_gzip_and_an_older_result_change_nothing(name: str, folder: Path, ran: dict[str, Ran]) -> None:
    ended = ran[name]
    assert ended.code == 0, ended.err
    assert result(folder, ended) == PUSHES
    pings, out = ended.arguments[2], ended.arguments[6]
    assert said(ended) == sorted(SAID.replace("pings.csv", pings).replace("out.jsonl", out).splitlines())


def test_neither_hash_seed_nor_time_zone_change_anything(folder: Path) -> None:
    ended = run(*MATCH, "zone.jsonl", folder=folder, PYTHONHASHSEED="1", TZ="America/New_York")
    assert (ended.code, result(folder, ended)) == (0, PUSHES)


def test_a_result_is_readable_by_all(folder: Path, ran: dict[str, Ran]) -> None:
    assert (folder / ran["older result"].arguments[6]).stat().st_mode & 0o777 == 0o644


def test_a_longer_live_window_finds_who_slept(folder: Path, ran: dict[str, Ran]) -> None:
    lines = result(folder, ran["long window"]).splitlines(keepends=True)
    assert line(AT_14_45, "alert", 1, "baidu", "asleep", 100) in lines
    assert len(lines) == len(PUSHES.splitlines()) + 3


def test_strict_ends_with_three_if_anything_was_set_aside_and_still_writes_the_rest(
    folder: Path, ran: dict[str, Ran]
) -> None:
    rows, events, nothing = (ran[f"strict, {what}"] for what in ("bad rows", "bad events", "nothing bad"))
    assert (rows.code, events.code, nothing.code) == (3, 3, 0)
    assert result(folder, rows).startswith(line(AT_14_45, "alert", 1, "amap", "near", 100))
    assert result(folder, events) == line(AT_14_45, "alert", 1, "default", "near", 100)
    assert "unknown.jsonl:2: " in events.err
    assert "set aside: none\n" in nothing.err
    assert "refused" not in nothing.err


def test_a_ping_that_is_only_too_old_is_counted_and_strict_does_not_mind(ran: dict[str, Ran]) -> None:
    ended = ran["strict, an old ping"]
    assert ended.code == 0, ended.err
    assert "pings: 0 accepted; set aside: too_old 1\n" in ended.err


def test_files_without_pings_or_alerts_give_an_empty_result(folder: Path, ran: dict[str, Ran]) -> None:
    for name in ("nothing at all", "no pings", "no alerts"):
        assert (ran[name].code, result(folder, ran[name])) == (0, "")
    assert "pings: 0 accepted; set aside: none\n" in ran["nothing at all"].err
    assert "alert events refused: 2\n" in ran["no pings"].err


def test_a_place_that_cannot_be_written_is_named(ran: dict[str, Ran]) -> None:
    for name, words in (("no such folder", "No such file or directory"), ("a folder", "Is a directory")):
        assert ran[name].code in (1, 2)
        assert re.match(f"--out: .*{words}", ran[name].error)


def test_a_gzip_file_that_ends_early_is_refused(ran: dict[str, Ran]) -> None:
    assert ran["cut gzip"].code == 2
    assert re.match(r"cut\.csv\.gz: after line \d+: Compressed file ended", ran["cut gzip"].error)


def test_a_run_that_fails_keeps_what_stood_there_and_leaves_no_half_of_a_file(
    folder: Path, ran: dict[str, Ran]
) -> None:
    assert ran
    assert (folder / "kept.jsonl").read_text() == "kept\n"
    assert not list(folder.rglob(".*"))


def test_the_readmes_example_runs_as_it_stands(tmp_path: Path, folder: Path) -> None:
    _, _, section = (ROOT / "README.md").read_text().partition("## Match files")
    block = re.search(r"\n\n((?:    .*\n)+)", section)
    assert block, "README.md: an indented block of commands under `Match files`"
    assert folder.exists()  # kernels are compiled
    command = tmp_path / ".venv" / "bin" / "tuanyuan"
    command.parent.mkdir(parents=True)
    command.write_text(f'#!/bin/sh\nexec {shlex.join(COMMAND)} "$@"\n')
    command.chmod(0o755)
    script = textwrap.dedent(block[1])
    subprocess.run(["sh", "-euc", script], cwd=tmp_path, env=clean_environment(), check=True, timeout=60)
    expected = [
        (AT_14_45, "alert", "phone-near", 100),
        (AT_15_30, "alert", "phone-150-km", 200),
        (AT_16_00, "resolved", "phone-150-km", 200),
        (AT_16_00, "resolved", "phone-near", 200),
    ]
    assert (tmp_path / "pushes.jsonl").read_text() == "".join(
        line(at_ms, kind, 1, "default", device_id, ring_km) for at_ms, kind, device_id, ring_km in expected
    )


# ---- faults of old


def test_a_result_never_replaces_its_own_input(folder: Path, ran: dict[str, Ran]) -> None:
    assert (ran["over its pings"].code, ran["over its alerts"].code) == (2, 2)
    assert (folder / "mine.csv").read_text() == PINGS
    assert (folder / "mine.jsonl").read_text() == ALERTS


def test_a_gzip_file_that_is_damaged_in_the_middle_is_refused(ran: dict[str, Ran]) -> None:
    assert ran["damaged gzip"].code == 2
    assert ran["damaged gzip"].error.startswith("damaged.csv.gz: after line ")


def test_a_live_window_of_ages_is_refused_or_works(ran: dict[str, Ran]) -> None:
    assert "Traceback" not in ran["window of ages"].err
    assert ran["window of ages"].code in (0, 2)


def test_a_first_row_from_the_future_is_named_with_a_time_that_means_something(ran: dict[str, Ran]) -> None:
    assert "future.csv:2: " in ran["first row from the future"].err
    assert str(-(1 << 63)) not in ran["first row from the future"].err


def test_a_byte_order_mark_is_no_part_of_the_first_alert_event(folder: Path, ran: dict[str, Ran]) -> None:
    assert (ran["byte order mark"].code, result(folder, ran["byte order mark"])) == (0, PUSHES)


def test_ctrl_c_ends_a_run_without_a_traceback_and_without_a_result(folder: Path, tmp_path: Path) -> None:
    assert folder.exists()  # kernels are compiled
    (tmp_path / "long.csv").write_text("device_id,lat,lng,observed_at\n" + f"near,30.7,104,{AT_14_45}\n" * 2_000_000)
    (tmp_path / "clean.jsonl").write_text(ONE_EVENT)
    with Running(*match("long.csv", "clean.jsonl", "out.jsonl"), folder=tmp_path) as matching:
        process = psutil.Process(matching.pid)
        wait_until(lambda: any(file.path.endswith("long.csv") for file in process.open_files()))
        ended = matching.end(signal.SIGINT)
    assert ended.code == 130
    assert "Traceback" not in ended.err and "panicked" not in ended.err
    assert not (tmp_path / "out.jsonl").exists()
