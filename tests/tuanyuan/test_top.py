"""`tuanyuan top`: what it shows, at any size of terminal, and when the server is away."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import redis

from flows.alarms import Alarm
from flows.desk import Desk
from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.metrics import Metrics, StatsPublisher
from flows.server import connect
from flows.view_figures import ViewFigures
from geoindex.entries import HOUR_MS, Alert, Settings
from tests.flows.conftest import client as client
from tests.flows.conftest import server as server
from tests.flows.conftest import session_server as session_server
from tests.flows.waiting import eventually
from tests.gateway.desk import now_ms
from tuanyuan.connection import NoServer
from tuanyuan.top_look import STALE_S, Look, Looker
from tuanyuan.top_screen import count, countdown, duration, rate, screen, size

FIGURES = {
    "flow_processes": 2,
    "gateway_processes": 1,
    "pings_per_s": 1_002_310.0,
    "pings_per_s:amap": 612_000.0,
    "pings_per_s:baidu": 390_310.0,
    "pings_refused_per_s": 12.0,
    "pings_refused_per_s:too_old": 12.0,
    "matches_per_s": 2_100.0,
    "publish_to_queue_p50_ms": 3.5,
    "publish_to_queue_p99_ms": 14.0,
    "lag_ms": 7_000.0,
    **{f"lag_ms:{shard}": 12.0 for shard in range(8)},
    "queue_entries:amap": 340.0,
    "queue_pending:amap": 12.0,
    "queue_oldest_ms:amap": 1_900.0,
    "dead_letters:amap": 3.0,
    "checkpoint_age_ms": 41_000.0,
    "server_memory_bytes": 3.2e9,
    "server_memory_max_bytes": 8e9,
    "flow_memory_bytes": 1.1e9,
    "disk_free_bytes": 41e9,
    "devices_live": 9_900_000,
}
NOW_MS = 1_777_617_000_000


def alert(index: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"a-{index}",
        "status": "actual",
        "state": "open",
        "ring_km": 200.0,
        "next_growth_ms": NOW_MS + 754_000,
        "next_ring_km": 300.0,
        "told": 4_300,
        "delivered": 4_200,
        "acknowledged": None,
    } | more


def look(alerts: int = 2, alarms: int = 0, **more: Any) -> Look:
    found = tuple(Alarm("queue_unread", f"partner-{index}", "does not read its queue") for index in range(alarms))
    figures = ViewFigures(NOW_MS - 1_000, FIGURES, found)  # seen a second before `lines` looks
    return replace(Look(figures, tuple(map(alert, range(alerts))), 100.0), **more)


def lines(seen: Look, width: int = 80, height: int = 24, now_s: float = 101.0) -> list[str]:
    return [line.plain for line in screen(seen, now_s, width, height)]


def test_everything_that_matters_fits_80_columns_and_24_lines() -> None:
    text = "\n".join(lines(look()))
    for words in (
        "flows 2",
        "phones 9.9M",
        "pings/s 1M",
        "matches/s 2100",
        "refused/s 12",
        "publish to queue p50 3.5 ms  p99 14 ms",
        "lag 7 s  by shard 0:12ms",
        "checkpoint 41 s",
        "server 3.2 GB of 8 GB",
        "disk free 41 GB",
        "too_old 12",
    ):
        assert words in text, words
    rows = {line.split()[0]: line.split()[1:] for line in lines(look())}
    assert rows["amap"] == ["612k", "340", "12", "1.9", "s", "3"]
    assert rows["a-0"] == ["200", "km", "12:34", "300", "km", "4300", "4200", "<20"]


@pytest.mark.parametrize("size", [(80, 24), (140, 45), (40, 10), (20, 5), (1, 1)])
@pytest.mark.parametrize("alerts", [0, 3, 100])
@pytest.mark.parametrize("alarms", [0, 9])
def test_no_line_and_no_table_is_too_large_for_the_terminal(size: tuple[int, int], alerts: int, alarms: int) -> None:
    width, height = size
    for seen in (look(alerts, alarms), look(alerts, alarms, problem="x" * 200, seen_s=0.0), Look(problem="away")):
        shown = lines(seen, width, height)
        assert len(shown) <= height
        assert all(len(line) <= width for line in shown)


def test_what_does_not_fit_is_counted() -> None:
    shown = lines(look(alerts=100, alarms=9))
    assert "and 5 more alarms: tuanyuan health" in shown
    visible = sum(line.startswith("a-") for line in shown)
    assert shown[-1] == f"and {100 - visible} more alerts"
    assert visible > 3
    assert sum(line.startswith("a-") for line in lines(look(alerts=30), 140, 45)) == 30


def test_what_was_not_seen_for_a_while_is_called_stale_within_3_seconds() -> None:
    assert STALE_S < 3
    assert not any("STALE" in line for line in lines(look(), now_s=102.4))
    stale = lines(look(problem="the server does not answer"), now_s=102.9)
    assert "STALE: this is 3 s old: the server does not answer" in stale
    assert "pings/s 1M" in "\n".join(stale)  # the last numbers stay
    assert "nothing was seen yet: away" in lines(Look(problem="away"))


def test_numbers_are_written_as_people_read_them() -> None:
    assert [count(value) for value in (None, 0, 980, 9_999, 12_345, 1_002_310, 2e9)] == [
        "·", "0", "980", "9999", "12.3k", "1M", "2G",
    ]  # fmt: skip
    assert [rate(value) for value in (0, 0.25, 9.96, 10)] == ["0", "0.2", "10.0", "10"]
    assert [duration(value) for value in (0.25, 120, 3_200, 300_000, 7_560_000)] == [
        "0.25 ms", "120 ms", "3.2 s", "5 min", "2.1 h",
    ]  # fmt: skip
    assert [size(value) for value in (10, 1.5e3, 2e6, 1.23e9, 4e12)] == ["10 B", "1.5 kB", "2 MB", "1.23 GB", "4 TB"]
    assert [countdown(value) for value in (-1, 0, 59_999, 754_000, 3_723_000)] == [
        "now", "now", "0:59", "12:34", "1:02:03",
    ]  # fmt: skip


# --- against a server -------------------------------------------------------------------------------------------------


def publish(client: redis.Redis) -> None:
    """A flow's figures, and an alert."""
    ensure_settings(client, Settings(shard_count=2, partners=("amap",)))
    metrics = Metrics()
    metrics.count("pings_accepted_total", 500, partner="amap")
    metrics.gauge("lag_ms", 12, shard="0")
    StatsPublisher(client, metrics).publish()
    since_ms = now_ms() - HOUR_MS // 2
    Desk(client).publish(Alert("a-1", 1, 30.0, 120.0, since_ms, ((1.0, 100.0), (None, 200.0)), since_ms + 72 * HOUR_MS))


def test_a_look_finds_figures_and_alerts(client: redis.Redis, server: EmbeddedServer) -> None:
    publish(client)
    looker = Looker(lambda: connect(server.url))
    looker.look()
    seen = looker.newest
    assert seen.figures is not None and seen.figures.figures["lag_ms:0"] == 12
    assert [(found["id"], found["ring_km"], found["told"]) for found in seen.alerts] == [("a-1", 100, None)]


def test_a_looker_goes_on_by_itself_when_the_server_is_back(client: redis.Redis, server: EmbeddedServer) -> None:
    publish(client)
    is_away = False

    def open_client() -> redis.Redis:
        if is_away:
            raise NoServer("no server runs")
        return connect(server.url)

    looker = Looker(open_client)
    looker.start()
    eventually(lambda: looker.newest.figures is not None)
    is_away = True
    assert looker._client is not None
    looker._client.connection_pool.disconnect()
    looker._client = None
    eventually(lambda: looker.newest.problem == "no server runs")
    assert looker.newest.figures is not None
    is_away = False
    eventually(lambda: looker.newest.problem is None)
    looker.stop()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tuanyuan.cli", "top", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_once_prints_plain_text_or_json(client: redis.Redis, server: EmbeddedServer) -> None:
    publish(client)
    plain = run("--once", "--valkey", server.url)
    assert plain.returncode == 0, plain.stderr
    assert "a-1" in plain.stdout and "\x1b" not in plain.stdout
    found = json.loads(run("--once", "--json", "--valkey", server.url).stdout)
    assert [one["id"] for one in found["alerts"]] == ["a-1"]
    assert found["figures"].keys() >= {"flow_processes"}


def test_mistakes_are_told() -> None:
    assert run("--json").returncode == 2
    away = run("--once", "--valkey", "redis://127.0.0.1:1")
    assert away.returncode == 1
    assert "does not answer" in away.stderr
