"""What the commands say of alarms, of a full server, of old pings; and a flow whose server dies under it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import redis
import typer
from typer.testing import CliRunner

from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.metrics import Metrics, StatsPublisher, read_stats
from flows.server import connect, packed
from flows.wire import encode_pings
from geoindex.entries import Settings
from tests.flows.waiting import memory_limit
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent
from tests.tuanyuan import Running, compile_kernels, embedded_flow, run, run_all, wait_until
from tuanyuan.commands import alert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guards")
    compile_kernels(folder)
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(folder / "v" / "valkey", port=None, memory_bytes_max=64 << 20) as server:
        yield server


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    client.flushall()
    ensure_settings(client, Settings(shard_count=1, partners=("amap",), hash_key=5))
    yield client
    client.close()


# ---- health


def test_health_lists_alarms_with_words_and_ends_with_one(folder: Path, client: redis.Redis) -> None:
    metrics = Metrics()
    metrics.gauge("lag_ms", 10, shard="0")
    metrics.gauge("unsafe_server", 1)
    metrics.alarms.set("memory", "the server's memory is 80 % full")
    metrics.alarms.set("pushes_held", "no room", "shard 3")
    StatsPublisher(client, metrics).publish()
    words, json = run_all([["health"], ["health", "--json"]], folder, TUANYUAN_VAR="v")
    assert (words.code, json.code) == (1, 1)
    assert words.out.splitlines() == [
        "flow processes: 1; largest lag: 0.0 s",
        "the server may lose what it acknowledged (--unsafe-server)",
        "alarm memory: the server's memory is 80 % full",
        "alarm pushes_held (shard 3): no room",
    ]
    assert json.json == {
        "healthy": False,
        "flow_processes": 1,
        "lag_s": 0.01,
        "unsafe_server": True,
        "alarms": [
            {"kind": "memory", "source": "", "words": "the server's memory is 80 % full"},
            {"kind": "pushes_held", "source": "shard 3", "words": "no room"},
        ],
    }


def test_health_without_a_server_is_an_alarm_that_a_program_can_read(folder: Path) -> None:
    url = f"unix://{folder}/nobody.sock"
    ended, embedded = run_all([["health", "--json", "--valkey", url], ["health", "--json", "--var", "no"]], folder)
    for answer in (ended, embedded):
        assert answer.code == 1
        assert answer.json["healthy"] is False
        assert [alarm["kind"] for alarm in answer.json["alarms"]] == ["server_down"]


# ---- alert


def test_an_alert_is_not_entrusted_to_a_server_that_may_lose_it(folder: Path, client: redis.Redis) -> None:
    publish = ["alert", "publish", "a", "--lat", "30", "--lng", "114", "--missing-since", "now"]
    client.config_set("appendfsync", "everysec")
    refused, unsafe = run_all([publish, [*publish, "--unsafe-server"]], folder, TUANYUAN_VAR="v")
    client.config_set("appendfsync", "always")
    assert (refused.code, unsafe.code) == (3, 0)
    assert "the server must run with appendfsync always" in refused.error
    assert "\n[unsafe server] alert 'a': revision 1, in every log" in unsafe.err
    assert client.xlen("desk") == 1


def test_under_a_wrong_clock_an_alert_is_durable_and_reaches_nobody_yet(
    client: redis.Redis, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuanyuan.commands.alert.refused_now", lambda _: "the clock is wrong")
    publish = ["alert", "publish", "a", "--lat", "30", "--lng", "114", "--missing-since", "now", "--var", f"{folder}/v"]
    app = typer.Typer()
    app.add_typer(alert.app, name="alert")
    app.command()(lambda: None)
    ended = CliRunner().invoke(app, publish)
    assert ended.exit_code == 1
    assert (client.xlen("desk"), client.xlen("log:{s0}")) == (1, 1)


# ---- send


def test_send_waits_while_the_memory_is_full_says_so_and_goes_on(folder: Path, client: redis.Redis) -> None:
    limited = ExitStack()
    limited.enter_context(memory_limit(client, int(client.info("memory")["used_memory"] * 1.2)))
    with Running(
        "send", "--world", "1000", "--rate", "4000", "--seconds", "0.5", folder=folder, TUANYUAN_VAR="v"
    ) as send:
        send.wait_for_words("waits: no pings are taken now: the server's memory is ")
        limited.close()
        wait_until(lambda: send.code is not None, timeout_s=30.0)
        assert send.code == 0
        assert send.err.count("waits: ") == 1
        assert "goes on\n" in send.err
        assert "pings: 2,000 sent; set aside: none" in send.err


def test_send_outlives_a_server_that_is_started_again(
    folder: Path, server: EmbeddedServer, client: redis.Redis
) -> None:
    with Running(
        "send", "--world", "1000", "--rate", "4000", "--seconds", "3", folder=folder, TUANYUAN_VAR="v"
    ) as send:
        wait_until(lambda: client.xlen("log:{s0}") > 5, timeout_s=30.0)
        os.kill(server.pid, signal.SIGKILL)
        send.wait_for_words("waits: the server does not answer")
        wait_until(lambda: server.ended() is not None)
        server.revive(lambda _: None)
        wait_until(lambda: send.code is not None, timeout_s=60.0)
        assert send.code == 0
        assert "pings: 12,000 sent" in send.err


# ---- retention


def test_retention_finds_a_planted_old_ping_and_nothing_in_a_clean_folder(folder: Path) -> None:
    now_ms = round(time.time() * 1000)
    for name, hours in (("clean", 6.9), ("old", 7.1)):
        place = folder / name / "valkey" / "appendonlydir"
        place.mkdir(parents=True)
        log_ms = round(now_ms - hours * 3_600_000)
        payload = encode_pings(batch_of([PingEvent("amap", "my-phone", 0, 0, log_ms)], ("amap",)))
        (place / "x.aof").write_bytes(packed("XADD", "log:{s0}", f"{log_ms}-0", "pings", payload))
    clean, old, json, strict, found, nowhere, nothing = run_all(
        [
            ["retention", "--var", "clean"],
            ["retention", "--var", "old"],
            ["retention", "--var", "old", "--json"],
            ["retention", "--var", "clean", "--live-window", "5h"],
            ["retention", "--var", "old", "--find", "my-phone", "--json"],
            ["retention", "--var", "old", "--find", "other-phone"],
            ["retention", "--var", "nothing"],
        ],
        folder,
    )
    path = "old/valkey/appendonlydir/x.aof"
    assert (clean.code, old.code, json.code, strict.code) == (0, 1, 1, 1)
    assert clean.out.endswith("1 files; allowed are 420 min: nothing is older\n")
    assert old.out.startswith(f"{path}: append-only file, 1 pings, the oldest 426.")
    assert "TOO OLD" in old.out
    assert json.json["clean"] is False
    (file,) = json.json["files"]
    assert (file["path"], file["too_old"], file["ping_count"]) == (path, True, 1)
    assert file["oldest_age_ms"] == json.json["oldest_age_ms"] > json.json["allowed_ms"] == 7 * 3_600_000
    assert (found.code, found.json) == (0, {"files": {path: 1}})
    assert (nowhere.code, nowhere.out) == (0, "in no file\n")
    assert (nothing.code, nothing.error) == (2, "no such folder: nothing")


# ---- run


def test_a_flow_whose_embedded_server_is_killed_starts_it_again_and_ends_cleanly(folder: Path) -> None:
    with embedded_flow("r", "--shard-count", "1", "--rewrite-aof-interval", "1", folder=folder) as flow:
        server = EmbeddedServer.find(folder / "r" / "valkey")
        assert server is not None
        client = connect(server.url)
        wait_until(lambda: read_stats(client).total("aof_rewrites_total") >= 1, timeout_s=30.0)
        os.kill(server.pid, signal.SIGKILL)
        flow.wait_for_words("the embedded server runs again")
        flow.wait_for_words("alarm server_down: is over")

        def healthy() -> bool:
            try:
                stats = read_stats(client)
            except redis.ConnectionError:
                return False  # a connection of before
            return stats.process_count == 1 and stats.total("server_restarts_total") == 1 and not stats.alarms

        wait_until(healthy, timeout_s=30.0)
        client.close()
        assert run("health", "--var", "r", folder=folder).code == 0
        ended = flow.end()
        assert (ended.code, "Traceback" in ended.err) == (0, False)
        assert ended.err.endswith("stopped cleanly\n")
    assert EmbeddedServer.find(folder / "r" / "valkey") is None
    assert run("retention", "--var", "r", folder=folder).code == 0
