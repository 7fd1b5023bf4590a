"""What the operator's view costs a gateway: CPU with a page connected and with none, of a large deployment.

a process that publishes stats as 8 shards at 1 M pings/s do ─┐
density:{s} of 10 M phones, counted anew each minute ─────────┼─> server <── gateway <── one page: stream, history,
50 alerts, told more each second ─────────────────────────────┘                          maps and covers
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import msgpack
import numpy as np
import orjson
import psutil
import redis

from flows.density import ShardDensity, density_key, encode_density
from flows.desk import Desk, Relay
from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.metrics import Metrics, StatsPublisher, read_stats
from flows.server import connect
from flows.tallies import tally_key
from gateway.accounts import Accounts
from gateway.keys import Sealer
from geoindex.cells import CELLS_PER_ZONE, cells_of
from geoindex.columns import I64, U16, U32
from geoindex.entries import Settings
from geoindex.phones import PhoneColumns
from loadtest.bench.live import SHARD_COUNT
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import Traffic, active_alerts

ALERTS = 50
PINGS_PER_S = 1_000_000
MATCHES_PER_S = 2_000
START_TIMEOUT_S = 60.0
SETTLE_S = 6.0
MINUTE_S = 60.0


def measure(devices: int, seconds: float, say: Say) -> Report:
    """CPU of a gateway over so many seconds, without and with a page."""
    report = Report("view")
    traffic = Traffic(devices)
    with (
        tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder,
        EmbeddedServer.start(Path(folder) / "valkey") as server,
    ):
        client = connect(server.url)
        settings = ensure_settings(client, traffic.settings(SHARD_COUNT))
        say(f"counting {devices:,} phones by zone")
        zones = _zones(traffic)
        deployment = _Deployment(client, settings, zones, traffic)
        deployment.publish_alerts()
        key = Accounts(client, Sealer.read(Path(folder) / "gateway.key")).add_operator("bench").text
        with deployment.running(), _gateway(server.url, Path(folder)) as (process, url):
            time.sleep(min(SETTLE_S, 3 * seconds))
            say(f"{seconds:g} s without a page")
            without = _cpu_share(process, seconds)
            say(f"{seconds:g} s with one")
            page = _Page(url, key)
            page.start()
            time.sleep(min(SETTLE_S, seconds))
            before = page.counts()
            with_page = _cpu_share(process, seconds)
            seen = {name: count - before.get(name, 0) for name, count in page.counts().items()}
            page.stop()
            sample_ms = _sampling_ms(client)
        report.faults += page.faults
        report.expect("alerts shown", ALERTS, page.alert_count)
        if seen.get("figures", 0) < 0.8 * seconds - 1:
            report.faults.append(f"figures came {seen.get('figures', 0)} times in {seconds:g} s")
        rate = page.figures.get("pings_per_s", 0.0)
        if not 0.8 * PINGS_PER_S < rate < 1.2 * PINGS_PER_S:
            report.faults.append(f"the figures say {rate:,.0f} pings/s, not {PINGS_PER_S:,}")
    report.values = {
        "view_cpu_percent": round(100 * with_page, 3),
        "gateway_cpu_percent_without_page": round(100 * without, 3),
        "view_sample_ms_p50": sample_ms,
        "stream_bytes_per_s": round(page.bytes / max(page.connected_s, 1.0)),
        "history_bytes": page.history_bytes,
        "map_bytes": page.map_bytes,
        "seconds": seconds,
        "pings_per_s": PINGS_PER_S,
        "alerts": ALERTS,
        "shards": SHARD_COUNT,
        "devices": devices,
    }
    report.notes.append(
        "view_cpu_percent: all that the gateway process uses with one page connected, of one core. "
        "Sizes are those of compressed answers."
    )
    return report


def _zones(traffic: Traffic) -> tuple[U32, U16]:
    """Zone and partner of every phone."""
    zones, partners = [], []
    for sent in traffic.first_sight(0):
        zones.append(cells_of(sent.pings.lat_e7, sent.pings.lng_e7) // np.uint32(CELLS_PER_ZONE))
        partners.append(sent.pings.partner)
    return np.concatenate(zones), np.concatenate(partners)


class _Deployment:
    """Publishes what flows of that size would publish."""

    def __init__(self, client: redis.Redis, settings: Settings, phones: tuple[U32, U16], traffic: Traffic) -> None:
        self._client, self._settings, self._traffic = client, settings, traffic
        zone, partner = phones
        keys, counts = np.unique(zone.astype(np.uint64) << np.uint64(16) | partner, return_counts=True)
        self._zone = (keys >> np.uint64(16)).astype(np.uint32)
        self._partner = (keys & np.uint64(0xFFFF)).astype(np.uint16)
        self._counts = counts
        self._random = np.random.default_rng(1)
        self._metrics = Metrics()
        self._publisher = StatsPublisher(client, self._metrics, self._move)
        self._alert_ids: list[str] = []
        self._told = np.zeros((SHARD_COUNT, ALERTS), np.int64)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def publish_alerts(self) -> None:
        """Around the world's largest places, at every stage of growth."""
        desk, now_ms = Desk(self._client), round(time.time() * 1000)
        for active in active_alerts(self._traffic.world, ALERTS, now_ms):
            desk.publish(active.alert)
            self._alert_ids.append(active.alert.alert_id)
        Relay(self._client).copy_pending()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Until the end of the block."""
        self._count_density()
        self._publisher.start()
        self._thread.start()
        try:
            yield
        finally:
            self._stopping.set()
            self._thread.join()
            self._publisher.stop()

    def _move(self) -> None:
        """A second's figures."""
        metrics = self._metrics
        partners = self._settings.partners
        for partner in partners:
            metrics.count("pings_accepted_total", PINGS_PER_S / len(partners), partner=partner)
            metrics.count("pushes_total", MATCHES_PER_S / len(partners), partner=partner, kind="alert")
            for name in ("queue_entries", "queue_pending", "queue_oldest_unacknowledged_ms"):
                metrics.gauge(name, float(self._random.integers(0, 1_000)), partner=partner, shards="0-7")
        metrics.count("pings_refused_total", 100, reason="too_old")
        for name in ("publish_to_queue_ms", "ping_to_queue_ms"):
            for value_ms in self._random.lognormal(2.0, 0.5, 50).tolist():
                metrics.observe(name, value_ms, 40)
        for shard in range(SHARD_COUNT):
            for name in ("lag_ms", "devices_live", "checkpoint_age_ms", "density_age_ms", "table_memory_bytes"):
                metrics.gauge(name, float(self._random.integers(1_000, 1_000_000)), shard=str(shard))

    def _run(self) -> None:
        counted_s = time.monotonic()
        while not self._stopping.wait(1.0):
            self._told += self._random.integers(0, 100, self._told.shape)
            with self._client.pipeline(transaction=False) as pipeline:
                for shard in range(SHARD_COUNT):
                    for index, alert_id in enumerate(self._alert_ids):
                        count = int(self._told[shard, index])
                        told = {name: count // len(self._settings.partners) for name in self._settings.partners}
                        fields = {"told": told, "resolved": {}, "at_ms": 1, "log_id": (1, 1)}
                        pipeline.hset(tally_key(shard), alert_id, cast(Any, msgpack.packb(fields)))
                pipeline.execute()
            if time.monotonic() - counted_s >= MINUTE_S:
                counted_s = time.monotonic()
                self._count_density()

    def _count_density(self) -> None:
        """Each shard has its part of every zone."""
        at_ms = round(time.time() * 1000)
        for shard in range(SHARD_COUNT):
            count: I64 = self._counts // SHARD_COUNT + (self._counts % SHARD_COUNT > shard)
            kept = count > 0
            phones = PhoneColumns(self._zone[kept], self._partner[kept], count[kept].astype(np.uint32))
            density = ShardDensity(shard, at_ms, (at_ms, 0), self._settings.partners, phones)
            self._client.set(density_key(shard), encode_density(density))


@contextlib.contextmanager
def _gateway(valkey: str, folder: Path) -> Iterator[tuple[psutil.Process, str]]:
    command = ["serve", "--valkey", valkey, "--var", str(folder), "--secret-file", str(folder / "gateway.key")]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuanyuan.cli", *command, "--port", "0"],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield psutil.Process(process.pid), _url_of(folder / "serve.log", process)
    finally:
        process.terminate()
        process.wait(30)


def _url_of(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where the gateway says that it answers."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        said = log.read_text(errors="replace")
        for word in said.replace(",", " ").split():
            if word.startswith("http://"):
                return word.rstrip("/;.")
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the gateway did not start: {log.read_text(errors='replace')[-2_000:]}")


def _cpu_share(process: psutil.Process, seconds: float) -> float:
    """Of one core."""
    before, started_s = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after = process.cpu_times()
    used_s = float(after.user + after.system - before.user - before.system)
    return used_s / (time.monotonic() - started_s)


def _sampling_ms(client: redis.Redis) -> float:
    """How long a look takes, median, as the gateway publishes it."""
    return read_stats(client).quantile_ms("view_sample_ms", 0.5) or 0.0


class _Page:
    """Reads as the page does: the stream, the history and all covers once, a map when there is a newer one."""

    def __init__(self, url: str, key: str) -> None:
        self._client = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30)
        self._counts: dict[str, int] = {}
        self.figures: dict[str, float] = {}
        self.alert_count = self.bytes = self.history_bytes = self.map_bytes = 0
        self.faults: list[str] = []
        self._started_s = self.connected_s = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Connect."""
        self._thread.start()

    def stop(self) -> None:
        """Leave."""
        self._stopping = True
        self._thread.join(30)
        self._client.close()

    def counts(self) -> dict[str, int]:
        """Events so far, by name."""
        return dict(self._counts)

    def _run(self) -> None:
        try:
            self.history_bytes = self._fetched("/v1/view/history?minutes=1440")
            self._started_s = time.monotonic()
            with self._client.stream("GET", "/v1/view/stream") as answer:
                name = ""
                for line in answer.iter_lines():
                    self.bytes += len(line) + 1
                    if line.startswith("event: "):
                        name = line.removeprefix("event: ")
                    elif line.startswith("data: "):
                        self._take(name, orjson.loads(line.removeprefix("data: ")))
                    if self._stopping:
                        break
            self.connected_s = time.monotonic() - self._started_s
        except (httpx.HTTPError, orjson.JSONDecodeError) as problem:
            self.faults.append(f"the page failed: {problem}")

    def _take(self, name: str, event: dict[str, Any]) -> None:
        self._counts[name] = self._counts.get(name, 0) + 1
        if name == "figures":
            self.figures = event["figures"]
        elif name == "map":
            self.map_bytes = self._fetched("/v1/view/map")
        elif name == "alerts":
            if not self.alert_count:
                for alert in event["alerts"]:
                    self._fetched(f"/v1/view/alerts/{alert['id']}/cover")
            self.alert_count = len(event["alerts"])

    def _fetched(self, path: str) -> int:
        answer = self._client.get(path)
        if answer.status_code not in (200, 429):  # 50 covers at once may be more than a key's limit
            self.faults.append(f"{path}: {answer.status_code}")
        return int(answer.headers.get("content-length", 0))
