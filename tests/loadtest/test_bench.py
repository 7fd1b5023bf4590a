"""Benchmarks at their smallest: they run, they verify, they notice what is wrong. Nothing here looks at a clock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from geoindex.columns import PingBatch
from loadtest.bench import peers
from loadtest.bench.brute_force import BruteForce, count_bits, distance_km
from loadtest.bench.inside import verify
from loadtest.bench.peer_bytewax import ZONE_REACH_KM, cover
from loadtest.bench.plots import draw
from loadtest.bench.report import GOALS, Report
from loadtest.bench.sustained import Trial
from loadtest.bench.traffic import OFFLINE_MS, STAGES, Traffic, active_alerts, as_decoded, squeezed
from loadtest.bench.warm import WarmMachine, warm_machine
from tuanyuan.commands import bench as command
from tuanyuan.commands.bench import RUNS, Benchmark, run_all

KEYS = {
    "kernel": {"pings_per_s_per_core", "ns_per_ping"},
    "flow": {"pings_per_s", "bytes_per_ping", "prefill_pings", "prefill_bytes"},
    "sustained": {"pings_per_s", "seconds", "lag_p99_ms", "lag_max_ms"},
    "fanout": {"seconds", "ids_per_s"},
    "growth": {"seconds", "scan_seconds", "cost_ratio", "sizes_devices", "alerts_open", "ns_per_ping_of_alerts"},
    "latency": {"p50_ms", "p99_ms", "pings_per_s"},
    "memory": {"bytes_per_device"},
    "checkpoint": {"write_seconds", "load_seconds", "stop_ms_max", "bytes_per_device"},
    "recovery": {"seconds", "first_done_seconds", "load_seconds", "missed_pings"},
    "coldstart": {"seconds"},
    "idle": {"cpu_share", "seconds"},
    "audit": {"pings_per_s", "ns_per_ping", "pushes"},
    "gateway": {"json_pings_per_s", "columns_pings_per_cpu_s", "small_request_p99_ms", "worst_body_mb_max"},
    "figures": {"cpu_share_of_density", "stop_ms_max", "stop_us_median", "read_ms", "circle_ms"},
    "world": {"pings_per_s_per_core", "ns_per_ping", "datum_ns_per_ping"},
    "view": {"gateway_cpu_percent_without_page", "view_sample_ms_p50", "stream_bytes_per_s", "map_bytes"},
    "peers": {"min_ratio", "ratios"},
}


def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command.bench)
    return found


def quiet(_words: str) -> None:
    pass


# ---- every benchmark, small


@pytest.mark.parametrize("benchmark", list(RUNS))
def test_smoke_run_verifies_itself_and_names_units(benchmark: Benchmark) -> None:
    done = CliRunner().invoke(app(), [benchmark.value, "--smoke", "--json"])
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["verified"] is True
    assert found["faults"] == []
    assert found["benchmark"] == benchmark.value
    assert KEYS[benchmark.value] | {"devices", "machine", "python", "notes"} <= found.keys()
    assert {key for name, key in GOALS if name == benchmark.value} <= found.keys()


def test_a_table_shows_value_and_goal() -> None:
    done = CliRunner(env={"COLUMNS": "160"}).invoke(app(), ["kernel", "--smoke"])
    assert done.exit_code == 0, done.output
    assert "pings_per_s_per_core" in done.stdout
    assert ">= 20,000,000 at 10,000,000 devices" in done.stdout


# ---- what is wrong is noticed


@pytest.fixture(scope="module")
def warm() -> WarmMachine:
    traffic = Traffic(2_000)
    return warm_machine(traffic, active_alerts(traffic.world, 20, OFFLINE_MS), quiet)


def faults(warm: WarmMachine) -> list[str]:
    return verify(warm.machine, warm.traffic, warm.alerts, warm.expected, 1_000)


def test_a_right_machine_has_no_faults(warm: WarmMachine) -> None:
    assert faults(warm) == []
    report = Report("test")
    warm.check(report, 1_000)
    assert report.verified


def test_a_device_told_too_little_is_noticed(warm: WarmMachine) -> None:
    told = warm.expected.told.copy()
    warm.expected.told[7] ^= 1
    assert faults(warm) == ["1 of 2000 devices were not told what brute force says"]
    warm.expected.told[:] = told


def test_a_device_in_the_wrong_cell_is_noticed(warm: WarmMachine) -> None:
    lat_e7 = warm.expected.lat_e7.copy()
    warm.expected.lat_e7 += 1_000_000
    assert any("another cell than the h3 library's" in words for words in faults(warm))
    warm.expected.lat_e7[:] = lat_e7


def test_a_lost_ping_is_noticed(warm: WarmMachine) -> None:
    report = Report("test")
    replace(warm, sent_count=warm.sent_count + 1).check(report, 1_000)
    assert any("pings accepted" in words for words in report.faults)


def test_a_failed_verification_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("kernel", faults=["made up"])
    monkeypatch.setitem(RUNS, Benchmark.KERNEL, lambda _wanted: report)
    done = CliRunner().invoke(app(), ["kernel", "--json"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["verified"] is False
    assert "made up" in done.stderr


def test_a_peer_that_differs_away_from_the_edge_is_wrong() -> None:
    workload = peers._workload(3_000, 3_000, 1, 10)
    alert = workload.alerts[0].alert
    phone = workload.measured[0].pings.device_id(0)
    partner = workload.traffic.world.partner_names[int(workload.measured[0].pings.partner[0])]
    differing = {(alert.alert_id, partner, phone)}
    lat, lng = (column[:1] / 1e7 for column in (workload.measured[0].pings.lat_e7, workload.measured[0].pings.lng_e7))
    expected_m = abs(distance_km(alert.lat, alert.lng, lat, lng)[0] - workload.alerts[0].ring_km) * 1000
    assert peers._worst_m(workload, differing) == pytest.approx(expected_m)
    assert peers._worst_m(workload, {(alert.alert_id, partner, "stranger")}) == float("inf")


@pytest.mark.parametrize(
    ("lag_ms", "grows"),
    [
        ([0.0] * 40, False),
        ([400.0] * 40, False),
        ([2000.0] * 40, False),
        ([3000.0] * 40, True),
        ([10.0 * at for at in range(40)], False),
        ([100.0 * at for at in range(40)], True),
        ([0.0] * 30 + [3000.0] * 10, True),
    ],
)
def test_a_lag_grows_when_its_end_is_above_its_beginning_or_too_large(lag_ms: list[float], grows: bool) -> None:
    trial = Trial(1000.0, 10.0, sent=10_000, lag_ms=lag_ms)
    assert trial.lag_grows is grows
    assert trial.keeps_up is not grows


def test_a_sender_that_falls_behind_does_not_keep_up() -> None:
    assert not Trial(1000.0, 10.0, sent=9_000, lag_ms=[0.0] * 40).keeps_up


# ---- brute force, pinned by hand


def sent_at(traffic: Traffic, lat: list[float], observed_at_ms: list[int]) -> Any:
    """Pings of phones 0, 1, ... at longitude 104."""
    (first,) = traffic.first_sight(0)
    order = np.argsort(first.phone)
    pings = first.pings
    moved = PingBatch(
        pings.partner,
        pings.id_bytes,
        pings.id_end,
        np.array(lat, np.float64)[first.phone].__mul__(1e7).round().astype(np.int32),
        np.full(len(order), 1_040_000_000, np.int32),
        np.array(observed_at_ms, np.int64)[first.phone],
    )
    return replace(first, pings=moved)


def test_brute_force_tells_who_is_inside_and_ignores_what_is_late() -> None:
    traffic = Traffic(3)
    (active,) = active_alerts(traffic.world, 1, OFFLINE_MS)
    active = replace(active, alert=replace(active.alert, lat=30.0, lng=104.0), ring_km=100.0)
    known = BruteForce([active], 3)
    known.apply(sent_at(traffic, [30.0, 30.8, 31.0], [10, 10, 10]))  # 0 km, 89 km, 111 km away
    assert known.publish() == 2
    assert known.told[:, 0].tolist() == [1, 1, 0]
    phones, _ = known.apply(sent_at(traffic, [30.0, 30.8, 30.5], [11, 11, 9]))  # late
    assert phones.tolist() == []
    phones, alerts = known.apply(sent_at(traffic, [35.0, 35.0, 30.5], [12, 12, 12]))
    assert (phones.tolist(), alerts.tolist()) == ([2], [0])
    assert count_bits(known.told) == 3


def test_a_sample_is_told_as_the_whole_is() -> None:
    traffic = Traffic(1_000)
    alerts = active_alerts(traffic.world, 30, OFFLINE_MS)
    sample = np.arange(0, 1_000, 7, dtype=np.uint32)
    whole, part = BruteForce(alerts, 1_000), BruteForce(alerts, 1_000, sample)
    for sent in [*traffic.first_sight(OFFLINE_MS), *traffic.batches(2_500)]:
        for known in (whole, part):
            known.apply(sent)
            known.publish()
    assert count_bits(whole.told) > 0
    assert np.array_equal(whole.told[sample], part.told)


# ---- traffic


def test_senders_of_pings_are_named() -> None:
    traffic = Traffic(500)
    for sent in [*traffic.first_sight(OFFLINE_MS, 200), *traffic.batches(700, 300)]:
        partner, id_bytes, id_end = traffic.world.phone_ids(sent.phone)
        assert np.array_equal(partner, sent.pings.partner)
        assert np.array_equal(id_bytes, sent.pings.id_bytes)
        assert np.array_equal(id_end, sent.pings.id_end)


def test_pings_wait_as_the_wire_leaves_them() -> None:
    (sent,) = Traffic(100).first_sight(OFFLINE_MS)
    decoded = as_decoded(sent.pings)
    for name in ("partner", "id_bytes", "id_end", "lat_e7", "lng_e7", "observed_at_ms"):
        column = getattr(decoded, name)
        assert np.array_equal(column, getattr(sent.pings, name))
        assert not column.flags.writeable


def test_a_quarter_of_the_alerts_is_at_each_stage_and_none_is_about_to_grow() -> None:
    alerts = active_alerts(Traffic(10).world, 100, OFFLINE_MS)
    assert len({(active.alert.lat, active.alert.lng) for active in alerts}) == 100
    for minutes, ring_km in STAGES:
        stage = [active for active in alerts if active.ring_km == ring_km]
        assert len(stage) == 25
        assert {OFFLINE_MS - active.alert.missing_since_ms for active in stage} == {minutes * 60_000}
        assert ring_km == 500.0 or 60 - minutes % 60 >= 50


def test_squeezed_phones_are_all_near() -> None:
    traffic = Traffic(20_000)
    place = traffic.world.place("Chengdu")
    for sent in traffic.first_sight(OFFLINE_MS):
        near = squeezed(sent.pings, place.lat, place.lng)
        assert distance_km(place.lat, place.lng, near.lat_e7 / 1e7, near.lng_e7 / 1e7).max() < 50.0


def test_zones_of_the_first_try_cover_every_ring() -> None:
    """The naive flow must be a fair peer: no phone may be lost between its zones."""
    import h3

    traffic = Traffic(3_000)
    alerts = active_alerts(traffic.world, 12, OFFLINE_MS)
    rings = cover(alerts)
    assert ZONE_REACH_KM > 0
    for sent in traffic.first_sight(OFFLINE_MS):
        for lat, lng in zip((sent.pings.lat_e7 / 1e7).tolist(), (sent.pings.lng_e7 / 1e7).tolist(), strict=True):
            zone = h3.cell_to_parent(h3.latlng_to_cell(lat, lng, 7), 5)
            here = {ring.alert_id: ring for ring in rings.get(zone, ())}
            for active in alerts:
                away = distance_km(active.alert.lat, active.alert.lng, np.array([lat]), np.array([lng]))[0]
                ring = here.get(active.alert.alert_id)
                assert ring is not None or away > active.ring_km
                assert ring is None or not ring.is_inside or away <= active.ring_km


# ---- all


@pytest.fixture
def reports() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for benchmark in RUNS:
        report = Report(benchmark.value)
        report.values = {key: 2.0 for name, key in GOALS if name == benchmark.value}
        found[benchmark.value] = report.as_json()
    found["peers"]["pings_per_s"] = {"ours_machine": 2e7, "numpy": 1e6}
    found["sustained"]["series"] = {"lag": {"at_s": [0.0, 1.0], "lag_ms": [1.0, 2.0], "sent": [0.0, 9.0]}}
    found["latency"] |= {"pings_per_s": 2e6, "series": {"latency": {"latency_ms": [3.0, 1.0, 2.0]}}}
    found["growth"]["series"] = {"cost": {"devices": [1e6, 1e8], "ns_per_ping": [30.0, 60.0]}}
    return found


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_all_leaves_a_json_each_and_plots(tmp_path: Path, reports: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    found = run_all(tmp_path / "out", lambda benchmark: reports[benchmark.value])
    assert found == reports
    assert {path.stem for path in (tmp_path / "out").glob("*.json")} == {benchmark.value for benchmark in RUNS}
    pictures = list((tmp_path / "out").glob("*.png"))
    assert {path.stem for path in pictures} == {"goals", "peers", "sustained", "latency", "growth"}
    assert all(is_png(path) for path in pictures)


def test_what_was_not_measured_is_not_drawn(tmp_path: Path, reports: dict[str, dict[str, Any]]) -> None:
    pytest.importorskip("matplotlib")
    assert {path.name for path in draw({"kernel": reports["kernel"]}, tmp_path)} == {"goals.png"}
    assert draw({}, tmp_path) == []


def test_all_refuses_sizes_of_its_own() -> None:
    done = CliRunner().invoke(app(), ["all", "--devices", "1000"])
    assert done.exit_code == 2
    assert "for a single one" in done.stderr


def test_goals_name_benchmarks_that_exist() -> None:
    assert {name for name, _ in GOALS} == {benchmark.value for benchmark in RUNS}


@pytest.fixture(autouse=True)
def _no_flow_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TUANYUAN_VALKEY", "TUANYUAN_VAR", "TUANYUAN_SHARDS"):
        monkeypatch.delenv(name, raising=False)
