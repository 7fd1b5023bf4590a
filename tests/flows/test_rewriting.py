"""The append-only file is rewritten in time, whoever does it; what was trimmed is then in no file any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import psutil
import pytest
import redis

from flows.checkpointer import Checkpointer
from flows.checkpoints import CheckpointStore
from flows.embedded import EmbeddedServer
from flows.log import LogWriter, RawEntry, done_key, ensure_settings, log_key, parse_id
from flows.match import Entry, decode, step
from flows.metrics import Metrics
from flows.raw_pings import count_id, limit_ms, scan
from flows.rewriting import REWRITTEN_KEY, FileRewriter
from flows.server import connect, link_opener
from flows.wire import encode_entry
from geoindex.entries import HOUR_MS, Settings, Tick
from tests.flows.waiting import eventually
from tests.geoindex.machines import batch_of
from tests.reference.events import PingEvent

WINDOW_MS = 60_000
SETTINGS = Settings(shard_count=1, partners=("amap",), hash_key=5, live_window_ms=WINDOW_MS)
INTERVAL_S = 3600.0
DEVICE = "unique-" + "0123456789abcdef" * 3


class Rewriting:
    """A rewriter, stepped by hand."""

    def __init__(self, client: redis.Redis, interval_s: float = INTERVAL_S, keep_ms: int = 7 * HOUR_MS) -> None:
        self.client = client
        self.now_s = 1000.0
        self.metrics = Metrics()
        self.rewriter = FileRewriter(client, 1, interval_s, keep_ms, self.metrics, monotonic_s=lambda: self.now_s)

    def step(self) -> None:
        self.rewriter.step()

    def step_until_rewritten(self) -> None:
        def rewritten() -> bool:
            self.step()
            return self.count() > before

        before = self.count()
        eventually(rewritten, timeout_s=30.0)

    def count(self) -> float:
        return self.metrics.value("aof_rewrites_total")

    def alarm(self) -> str | None:
        return next((alarm.words for alarm in self.metrics.alarms.current()), None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """One of its own: what is in its files matters."""
    with EmbeddedServer.start(tmp_path / "var" / "valkey", port=None, memory_bytes_max=64 << 20) as server:
        yield server


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    yield client
    client.close()


def send(client: redis.Redis, *device_ids: str) -> None:
    now_ms = round(time.time() * 1000)
    writer = LogWriter(link_opener(client), ensure_settings(client, SETTINGS))
    pings = [PingEvent("amap", device_id, 300_000_000, 1_140_000_000, now_ms) for device_id in device_ids]
    writer.append_pings(batch_of(pings, SETTINGS.partners))
    writer.close()


def entries(client: redis.Redis, after: str = "-") -> list[tuple[bytes, dict[bytes, bytes]]]:
    return cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(log_key(0), min=after))


def rewrites(client: redis.Redis) -> int:
    return int(client.info("persistence")["aof_rewrites"])


def test_the_first_look_at_a_server_that_nobody_knows_has_it_rewritten(client: redis.Redis) -> None:
    send(client, "phone")
    rewriting = Rewriting(client)
    rewriting.step_until_rewritten()
    assert rewrites(client) == 1
    raw = client.get(REWRITTEN_KEY)
    assert isinstance(raw, bytes)
    began_ms, oldest_ms = map(int, raw.split())
    first = parse_id(entries(client)[0][0])[0]
    assert first == oldest_ms <= began_ms
    for _ in range(3):
        rewriting.step()
    assert rewrites(client) == 1
    assert rewriting.alarm() is None
    # Nor does another process, or the next one, want another so soon.
    Rewriting(client).step()
    assert rewrites(client) == 1


def test_an_hour_later_it_is_rewritten_again(client: redis.Redis) -> None:
    send(client, "phone")
    now_ms = round(time.time() * 1000)
    client.set(REWRITTEN_KEY, f"{now_ms - 3_500_000} {now_ms - 3_500_000}")
    rewriting = Rewriting(client)
    rewriting.step()
    assert rewrites(client) == 0
    client.set(REWRITTEN_KEY, f"{now_ms - 3_601_000} {now_ms - 3_601_000}")
    rewriting = Rewriting(client)
    rewriting.step_until_rewritten()
    assert rewriting.metrics.value("aof_rewrite_age_ms") < 60_000
    assert rewriting.metrics.value("raw_pings_age_ms") < 60_000


def test_a_rewrite_that_the_server_began_by_itself_counts(client: redis.Redis) -> None:
    now_ms = round(time.time() * 1000)
    client.set(REWRITTEN_KEY, f"{now_ms - 3_000_000} {now_ms - 3_000_000}")
    rewriting = Rewriting(client)
    rewriting.step()
    client.bgrewriteaof()
    rewriting.step_until_rewritten()
    raw = client.get(REWRITTEN_KEY)
    assert isinstance(raw, bytes)
    # Held to what was true at the look before: it may have begun right after it.
    assert now_ms - 1000 <= int(raw.split()[0]) <= round(time.time() * 1000)


def test_an_overdue_rewrite_raises_an_alarm(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis.Redis, "bgrewriteaof", lambda _: None)
    now_ms = round(time.time() * 1000)
    rewriting = Rewriting(client)
    client.set(REWRITTEN_KEY, f"{now_ms - 4_400_000} {now_ms - 4_400_000}")
    rewriting.step()
    assert rewriting.alarm() is None
    rewriting = Rewriting(client)
    client.set(REWRITTEN_KEY, f"{now_ms - 4_600_000} {now_ms - 4_600_000}")
    rewriting.step()
    assert rewriting.alarm() == "the append-only file was last rewritten 77 min ago, and should be every 60 min"
    client.set(REWRITTEN_KEY, f"{now_ms} {now_ms}")
    rewriting.step()
    assert rewriting.alarm() is None


def test_pings_that_are_in_the_file_for_too_long_raise_an_alarm(client: redis.Redis) -> None:
    now_ms = round(time.time() * 1000)
    client.set(REWRITTEN_KEY, f"{now_ms - 60_000} {now_ms - 8 * HOUR_MS}")
    rewriting = Rewriting(client)
    rewriting.step()
    assert rewriting.alarm() == "raw pings of 480 min ago may be in the append-only file, which is allowed 420 min"


def test_a_rewrite_that_fails_is_counted_and_tried_again_after_a_minute(
    server: EmbeddedServer, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    send(client, "phone")
    rewriting = Rewriting(client)
    client.config_set("rdb-key-save-delay", 60_000_000)  # us a key: the child is there to be killed
    rewriting.step()
    eventually(lambda: psutil.Process(server.pid).children())
    for child in psutil.Process(server.pid).children():
        child.kill()

    def failed() -> bool:
        rewriting.step()
        return rewriting.metrics.value("aof_rewrite_failures_total") == 1

    eventually(failed, timeout_s=30.0)
    client.config_set("rdb-key-save-delay", 0)
    assert "was not rewritten" in caplog.text
    count = rewrites(client)
    rewriting.step()
    assert rewrites(client) == count
    rewriting.now_s += 61.0
    rewriting.step_until_rewritten()


def test_zero_is_never(client: redis.Redis) -> None:
    rewriter = FileRewriter(client, 1, 0.0, HOUR_MS, Metrics())
    rewriter.start()
    rewriter.stop()
    assert rewrites(client) == 0


# ---- a ping is gone from every byte


def occurrences(var: Path) -> dict[str, int]:
    """Where the device stands, by the name of the file's folder and kind."""
    return {
        str(path.relative_to(var)): count
        for path in var.rglob("*")
        if path.is_file() and (count := count_id(path, DEVICE.encode()))
    }


def test_after_trim_and_rewrite_a_ping_is_in_no_byte_of_any_file(
    server: EmbeddedServer, client: redis.Redis, tmp_path: Path
) -> None:
    var = tmp_path / "var"
    settings = ensure_settings(client, SETTINGS)
    checkpointer = Checkpointer(CheckpointStore(var / "checkpoints", settings), client, [0], 600.0, HOUR_MS, Metrics())
    machine = checkpointer.machine_at(0, checkpointer.begin(0))
    read = "-"

    def flow() -> None:
        """What a flow does with what has come: match it, say it is done, write a checkpoint, trim."""
        nonlocal read
        for raw_id, fields in entries(client, read):
            ((kind, payload),) = fields.items()
            raw = RawEntry(0, *parse_id(raw_id), kind, payload, "run")
            entry = decode(raw)
            assert isinstance(entry, Entry)
            step(machine, entry)
            checkpointer.after_entry(raw, machine)
            read = f"({raw_id.decode()}"
            client.set(done_key(0), raw_id)
            checkpointer.on_done(0, parse_id(raw_id))
        checkpointer.finish()

    send(client, DEVICE, "another")
    flow()
    assert any(name.startswith("valkey/appendonlydir") for name in occurrences(var))
    assert any(name.startswith("checkpoints/") for name in occurrences(var))
    now_ms = parse_id(entries(client)[-1][0])[0]
    # Two checkpoints later, both beyond the live window and a sweep, nothing of it is wanted any more.
    for minute in (1, 2, 3):
        client.xadd(log_key(0), dict([encode_entry(Tick())]), id=f"{now_ms + 60_000 * minute + WINDOW_MS}-0")
        flow()
    assert client.xlen(log_key(0)) == 2
    left = occurrences(var)
    assert left and all(name.startswith("valkey/appendonlydir") for name in left), "trimming alone does not remove it"
    Rewriting(client).step_until_rewritten()
    eventually(lambda: not occurrences(var), timeout_s=10.0)
    assert b"".join(path.read_bytes() for path in var.rglob("*") if path.is_file()).count(DEVICE.encode()[:12]) == 0
    findings = list(scan(var))
    assert limit_ms(findings, None) == WINDOW_MS + HOUR_MS
    assert sum(finding.ping_count for finding in findings) == 0
    assert [finding for finding in findings if finding.problem] == []
