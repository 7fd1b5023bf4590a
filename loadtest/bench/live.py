"""A server and flow processes in a folder of their own, and what a benchmark asks of them.

append ──> log:{s} ──> flow process(es), `tuanyuan run --shards ...` ──> push:{s}:partner
             done:{s} tells how far they are; `freeze` stops them (SIGSTOP) while logs are filled
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import redis

from flows.desk import Desk, Relay
from flows.embedded import EmbeddedServer
from flows.log import (
    FIRST,
    LogId,
    LogWriter,
    done_key,
    ensure_settings,
    last_id,
    log_key,
    parse_id,
    push_key,
)
from flows.metrics import STATS_KEY, Stats, read_stats
from flows.server import connect, link_opener
from flows.supervisor import Supervisor
from flows.wire import decode_push
from geoindex.columns import PingBatch
from geoindex.entries import Alert, Settings
from loadtest.bench.brute_force import BruteForce
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import ActiveAlert, SentPings, Traffic

SHARD_COUNT = 8
APPEND_PINGS = 125_000
"""Of one append: a little under `flows.log.PINGS_PER_ENTRY_MAX` for each of 8 shards, so that entries are full."""
START_TIMEOUT_S = 60.0
DONE_TIMEOUT_S = 600.0
POLL_S = 0.005
CHECKPOINT_INTERVAL_S = 60
"""As `tuanyuan run` has it."""
STATS_TIMEOUT_S = 10.0
MEMORY_SHARE = 0.6
"""Of the machine's memory that the server may use: the flow needs the rest."""

Told = tuple[str, str, str]
"""Alert id, partner, device id."""


class LiveSystem:
    """The server and the flow. Made by `live_system`."""

    def __init__(
        self, server: EmbeddedServer, folder: Path, settings: Settings, process_count: int, checkpoint_interval_s: int
    ) -> None:
        self.server = server
        self.client = connect(server.url)
        self.settings = ensure_settings(self.client, settings)
        self.desk = Desk(self.client)
        self._relay = Relay(self.client)
        self.ping_count = 0
        """Appended so far."""
        self._folder = folder
        self._process_count = process_count
        self._environment = {**os.environ, "TUANYUAN_CHECKPOINT_INTERVAL_S": str(checkpoint_interval_s)}
        self._flows: list[subprocess.Popen[bytes]] = []
        self._writer = LogWriter(link_opener(self.client), self.settings)

    @property
    def shards(self) -> range:
        return range(self.settings.shard_count)

    # --- processes ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the flow processes and wait until all publish numbers."""
        self.launch()
        self.wait_until(lambda: self.stats().process_count >= self._process_count, START_TIMEOUT_S, "flow is up")

    def launch(self) -> None:
        """Start the flow processes, each with an equal part of the shards, and wait for nothing."""
        count = self.settings.shard_count
        for index in range(self._process_count):
            first, last = index * count // self._process_count, (index + 1) * count // self._process_count - 1
            where = ["--valkey", self.server.url, "--var", str(self._folder), "--shards", f"{first}-{last}"]
            with (self._folder / f"run-{index}.log").open("wb") as log:
                self._flows.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tuanyuan.cli", "run", *where, "--quiet"],
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                        env=self._environment,
                    )
                )

    def end_flows(self) -> None:
        """End the flow processes cleanly: everything in them goes out, and a checkpoint of every shard is written.

        Their numbers are forgotten.
        """
        for flow in self._flows:
            flow.terminate()
        for flow in self._flows:
            if flow.wait(DONE_TIMEOUT_S):
                self.check()
        self._flows.clear()
        self.client.delete(STATS_KEY)

    def said(self) -> str:
        """What the flow processes have written, all since the last launch."""
        return "".join(path.read_text(errors="replace") for path in sorted(self._folder.glob("run-*.log")))

    def stop(self) -> None:
        """End the flow processes and close what is open. Killed: a clean end would write checkpoints for nobody."""
        for flow in self._flows:
            flow.kill()
            flow.wait()
        self._writer.close()
        self.client.close()

    def freeze(self) -> None:
        """Stop the flow processes where they are, so that logs can be filled before they are read."""
        for flow in self._flows:
            flow.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them go on."""
        for flow in self._flows:
            if flow.poll() is None:
                flow.send_signal(signal.SIGCONT)

    def cpu_s(self) -> dict[str, float]:
        """CPU time used so far, in seconds: of the flow processes and of the server."""
        flow = sum(_cpu_s(process.pid) for process in self._flows)
        return {"flow": flow, "server": _cpu_s(self.server.pid)}

    def memory_bytes(self) -> dict[str, int]:
        """Resident memory."""
        flow = sum(psutil.Process(process.pid).memory_info().rss for process in self._flows)
        return {"flow": flow, "server": psutil.Process(self.server.pid).memory_info().rss}

    def check(self) -> None:
        """Raises RuntimeError with the end of its log if a flow process has ended."""
        for index, flow in enumerate(self._flows):
            if flow.poll() is not None:
                text = (self._folder / f"run-{index}.log").read_text(errors="replace")
                raise RuntimeError(f"flow process {index} has ended with {flow.returncode}:\n{text[-3000:]}")

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float, what: str, poll_s: float = 0.02) -> float:
        """Wait; returns the moment (monotonic) at which it was so. Raises RuntimeError."""
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            self.check()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"waited {timeout_s:.0f} s in vain: {what}")
            time.sleep(poll_s)
        return time.monotonic()

    # --- logs ---------------------------------------------------------------------------------------------------------

    def append(self, pings: PingBatch) -> None:
        """Append pings to the logs; returns when they are on disk."""
        self._writer.append_pings(pings)
        self.ping_count += len(pings)

    def publish(self, alerts: Iterable[Alert]) -> None:
        """Publish alerts through the desk; returns when they are in all logs."""
        for alert in alerts:
            self.desk.publish(alert)
        self._relay.copy_pending()

    def now_ms(self) -> int:
        """The server's clock."""
        return self.desk.now_ms()

    def heads(self) -> list[LogId]:
        """The last entry of each log."""
        return [last_id(self.client, log_key(shard)) for shard in self.shards]

    def done(self) -> list[LogId]:
        """The last entry of each shard whose pushes are all in the queues."""
        found = cast("list[bytes | None]", self.client.mget([done_key(shard) for shard in self.shards]))
        return [FIRST if raw is None else parse_id(raw) for raw in found]

    def lag_ms(self) -> float:
        """How far the slowest shard is behind its log: age of its last entry when the last finished one was written."""
        return max(
            float(head[0] - done[0]) if head > done else 0.0
            for head, done in zip(self.heads(), self.done(), strict=True)
        )

    def wait_done(self, poll_s: float = POLL_S) -> float:
        """Wait until everything that is in the logs now has gone through; returns the moment (monotonic)."""
        heads = self.heads()
        return self.wait_until(
            lambda: all(done >= head for done, head in zip(self.done(), heads, strict=True)),
            DONE_TIMEOUT_S,
            "logs are worked through",
            poll_s,
        )

    def wait_rewritten(self) -> None:
        """Wait until the server is not rewriting its file."""
        self.wait_until(
            lambda: not server_info(self.client, "persistence")["aof_rewrite_in_progress"],
            DONE_TIMEOUT_S,
            "the server's file is rewritten",
        )

    # --- queues -------------------------------------------------------------------------------------------------------

    def queues(self) -> Iterator[tuple[str, str]]:
        """Partner and key of every push queue."""
        for partner in self.settings.partners:
            for shard in self.shards:
                yield partner, push_key(shard, partner)

    def trim_queues(self) -> None:
        """Drop all pushes, as a partner that has read them."""
        with self.client.pipeline(transaction=False) as pipeline:
            for _, key in self.queues():
                pipeline.xtrim(key, maxlen=0, approximate=False)
            pipeline.execute()

    def queued(self) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
        """Everything in the queues: partner, kind, alert id, device ids, entry by entry."""
        for partner, key in self.queues():
            after = "-"
            while True:
                entries = cast(Any, self.client.xrange(key, min=after, count=500))
                if not entries:
                    break
                for _, fields in entries:
                    for payload in fields.values():
                        push = decode_push(payload)
                        yield partner, push.kind, push.alert_id, push.device_ids
                after = f"({entries[-1][0].decode()}"

    def stats(self) -> Stats:
        """The numbers that the flow processes publish."""
        return read_stats(self.client)

    def last_stats(self) -> Stats:
        """As `stats`, with everything in it that has happened until now."""
        now_ms = time.time() * 1000

        def all_are_later() -> bool:
            published = cast("list[tuple[bytes, float]]", self.client.zrange(STATS_KEY, 0, -1, withscores=True))
            return sum(at_ms > now_ms for _, at_ms in published) >= self._process_count

        self.wait_until(all_are_later, STATS_TIMEOUT_S, "flow publishes its numbers")
        return self.stats()

    def check_totals(self, report: Report, id_count: int | None) -> None:
        """Compare the flow's own counters with what was appended, and with who had to be told."""
        stats = self.last_stats()
        report.expect("pings accepted by the flow", self.ping_count, int(stats.total("pings_accepted_total")))
        report.expect("pings refused by the flow", 0, int(stats.total("pings_refused_total")))
        if id_count is not None:
            report.expect("ids pushed by the flow", id_count, int(stats.total("pushes_total")))


@contextmanager
def live_system(
    settings: Settings, process_count: int = 1, checkpoint_interval_s: int = CHECKPOINT_INTERVAL_S
) -> Iterator[LiveSystem]:
    """A server and a flow of so many processes, under a temporary folder; gone afterwards."""
    memory_bytes_max = round(psutil.virtual_memory().total * MEMORY_SHARE)
    with (
        tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder,
        EmbeddedServer.start(Path(folder) / "valkey", port=None, memory_bytes_max=memory_bytes_max) as server,
    ):
        supervisor = Supervisor(server)
        system = LiveSystem(server, Path(folder), settings, process_count, checkpoint_interval_s)
        try:
            supervisor.start()
            system.start()
            yield system
        finally:
            system.stop()
            supervisor.stop()


@contextmanager
def partners_reading(system: LiveSystem, interval_s: float = 0.25) -> Iterator[None]:
    """Meanwhile every push is read and dropped by its partner at once, so that the queues stay short."""
    ended = threading.Event()

    def read() -> None:
        while not ended.wait(interval_s):
            system.trim_queues()

    thread = threading.Thread(target=read, name="partners", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def measured_cpu(system: LiveSystem) -> Iterator[dict[str, float]]:
    """CPU of flow and server while the block ran, in cores; filled in at its end."""
    shares: dict[str, float] = {}
    before, started_s = system.cpu_s(), time.monotonic()
    yield shares
    elapsed_s = time.monotonic() - started_s
    for name, used_s in system.cpu_s().items():
        shares[name] = (used_s - before[name]) / elapsed_s


def warm_up(
    system: LiveSystem, traffic: Traffic, alerts: Sequence[ActiveAlert], expected: BruteForce | None, say: Say
) -> int:
    """First sight of every phone, the alerts, every phone once more; returns how many ids are to be pushed by then.

    The alerts are made for the server's time of this call: `active_alerts(world, count, system.now_ms())`.
    """
    started_s = time.monotonic()
    expected_count = 0
    with partners_reading(system):
        for sent in traffic.first_sight(system.now_ms(), APPEND_PINGS):
            system.append(sent.pings)
            if expected is not None:
                expected.apply(sent)
        system.wait_done()
        say(f"{traffic.phone_count:,} devices known after {time.monotonic() - started_s:.0f} s")
        if alerts:
            system.publish(active.alert for active in alerts)
            if expected is not None:
                expected_count += expected.publish()
            system.wait_done()
            say(f"{len(alerts)} alerts told after {time.monotonic() - started_s:.0f} s")
        for sent in now_batches(system, traffic, traffic.phone_count):
            system.append(sent.pings)
            if expected is not None:
                expected_count += len(expected.apply(sent)[0])
        system.wait_done()
    system.trim_queues()
    say(f"settled after {time.monotonic() - started_s:.0f} s")
    return expected_count


def now_batches(system: LiveSystem, traffic: Traffic, ping_count: int) -> Iterator[SentPings]:
    """The world's next pings, each batch observed up to the moment at which it is drawn."""
    while ping_count > 0:
        size = min(APPEND_PINGS, ping_count)
        yield from traffic.batches(size, size, system.now_ms())
        ping_count -= size


def told_pairs(system: LiveSystem) -> Counter[Told]:
    """Who was told what, by the queues: alert pushes, each pair as often as it stands there."""
    return Counter(
        (alert_id, partner, device_id)
        for partner, kind, alert_id, device_ids in system.queued()
        if kind == "alert"
        for device_id in device_ids
    )


def server_info(client: redis.Redis, section: str) -> dict[str, Any]:
    """INFO of the server."""
    return client.info(section)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
