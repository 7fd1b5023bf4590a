"""`tuanyuan demo`: a server, a flow, a gateway, a world of phones and one missing child, watched live and checked.

phones ──partners' clients──> gateway ──> logs ──> flow ──> queues ──> gateway ──> partners' clients
officer ──HTTP──> gateway ──> desk ───────^
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, cast

import httpx
import numpy as np
import redis
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.audit import AuditResult, OwedPush, OwedPushes, compare
from flows.desk import Desk
from flows.embedded import EmbeddedServer
from flows.log import done_key, last_id, log_key, parse_id, read_settings
from flows.metrics import Stats, read_stats
from flows.reconcile import feed
from flows.server import connect
from gateway.accounts import Accounts
from gateway.client import Client, PingSender
from gateway.keys import Sealer
from geoindex.columns import E7, PingBatch
from geoindex.entries import HOUR_MS, Alert, Schedule, Settings
from geoindex.rings import growth_times_ms, radius_km
from loadtest.interrupts import interruptible
from loadtest.world import World
from tuanyuan.console import console, fail, note

EPILOG = """
Example:

    DEMO_SECONDS=20 make demo       or       tuanyuan demo --seconds 20 --phones 500000
"""

_Entries = list[tuple[bytes, dict[bytes, bytes]]]

SHARDS = 8
START_SECONDS = 3.0
"""Of the time given, for starting; as much again for checking."""
STREAM_SECONDS_MIN = 8.0
SETTLE_TIMEOUT_S = 60.0
END_TIMEOUT_S = 15.0
"""For the end to reach everyone told, beyond the streaming time, before the last view."""
PLACE = "Chengdu"
OFFICER, DIVISION = "demo officer", "510100"
"""Of Chengdu: the administrative division code (GB/T 2260)."""
REQUESTS_PER_S = 1_000.0
"""Of a partner's account: its program polls all the time here."""
PULL_WAIT_S = 1.0

# When things happen, in parts of the streaming time.
PUBLISH_AT, HOUR_LASTS, CLOSE_AT = 0.15, 0.15, 0.82


def demo(
    seconds: Annotated[float, typer.Option(envvar="DEMO_SECONDS", min=1, help="About how long it takes.")] = 45.0,
    phones: Annotated[int, typer.Option(min=1000, help="Phones in the world.")] = 200_000,
    rate: Annotated[int, typer.Option(min=1000, help="Pings a second.")] = 50_000,
    seed: Annotated[int, typer.Option(help="Of the world.")] = 1,
) -> None:
    """Watch a missing child's alert reach the phones around, its ring growing; then check every push."""
    stream_s = max(STREAM_SECONDS_MIN, seconds - 2 * START_SECONDS)
    note(f"A world of {phones:,} phones by the population of real places, {rate:,} pings/s, for {stream_s:.0f} s ...")
    with (
        interruptible(signal.SIGINT, signal.SIGTERM),
        tempfile.TemporaryDirectory(prefix="tuanyuan-demo-") as folder,
        EmbeddedServer.start(Path(folder) / "valkey", port=None, on_wait=note) as server,
    ):
        client = connect(server.url)
        # The logs are read from their beginnings at the end, by the audit.
        flow = _Process(
            Path(folder),
            *("run", "--valkey", server.url, "--var", folder, "--checkpoint-interval", "0", "--quiet"),
            *("--shard-count", str(SHARDS)),
        )
        try:
            result = _Demo(client, server.url, flow, Path(folder), World(seed, phones), rate, stream_s).run()
        finally:
            flow.end()
    for words in ("missed", "extra", "duplicate", "unretracted"):
        for push in getattr(result, words)[:5]:
            note(f"{words}: {push.kind} of {push.alert_id!r} to {push.device_id} of {push.partner}")
    # Who was not told of the end is missed, too: a number of its own is for those who only have the queues.
    console.print(f"verified: {result.line().removesuffix(', 0 unretracted')}", highlight=False)
    if not result.clean or not result.pushes:
        raise typer.Exit(1)


class _Process:
    """One of our own commands, with what it says in a file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self.name = name
        self._log_path = folder / f"{name}.log"
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tuanyuan.cli", name, *arguments],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def said(self) -> str:
        return self._log_path.read_text(errors="replace")

    def check(self) -> None:
        """Ends the demo if the process has ended."""
        if self._process.poll() is not None:
            fail(f"`tuanyuan {self.name}` has ended with {self._process.returncode}: {self.said()[-2000:]}")

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass
class _Told:
    """What the partners have pulled so far."""

    pushes: list[OwedPush] = field(default_factory=list)
    by_partner: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(partner, kind) -> devices."""


class _Demo:
    """One run: a sender thread, a partners' thread, and the view in this one."""

    def __init__(
        self,
        client: redis.Redis,
        url: str,
        flow: _Process,
        folder: Path,
        world: World,
        rate: int,
        stream_s: float,
    ) -> None:
        self._client = client
        self._url = url
        self._flow = flow
        self._gateway: _Process | None = None
        self._folder = folder
        self._world = world
        self._rate = rate
        self._stream_s = stream_s
        self._desk = Desk(client)
        self._told = _Told()
        self._told_lock = threading.Lock()
        self._streaming = threading.Event()
        self._pulling = threading.Event()
        self._problems: list[BaseException] = []
        self._stats = Stats()
        self._stats_at_s = 0.0
        self._pings_per_s = 0.0

    def run(self) -> AuditResult:
        settings = self._wait_for_flow()
        self._gateway = _Process(
            self._folder, "serve", "--valkey", self._url, "--var", str(self._folder), "--port", "0", "--quiet"
        )
        try:
            return self._run(settings, self._wait_for_gateway(self._gateway))
        finally:
            self._gateway.end()

    def _run(self, settings: Settings, gateway_url: str) -> AuditResult:
        accounts = Accounts(self._client, Sealer.read(self._folder / "gateway.key"))
        partners = {
            name: Client(gateway_url, accounts.add_partner(name, requests_per_s=REQUESTS_PER_S).text)
            for name in self._world.partner_names
        }
        officer_key = accounts.add_officer(OFFICER, DIVISION, "prefecture").text
        note(f"Watch it in a browser as long as it runs, with an officer's key: {gateway_url}/#key={officer_key}")
        self._streaming.set()
        self._pulling.set()
        sender = self._thread("sender", lambda: self._send([client.pings() for client in partners.values()]))
        pullers = [
            self._thread(f"partner {name}", lambda name=name, client=client: self._pull(name, client))  # type: ignore[misc]
            for name, client in partners.items()
        ]
        try:
            with httpx.Client(base_url=gateway_url, headers={"Authorization": f"Bearer {officer_key}"}) as desk:
                alert_id = self._play(desk)
            self._streaming.clear()
            sender.join()
            self._settle(settings)
        except BaseException:
            # Whoever ends it early does not wait for pings and pushes that nobody will check.
            for client in partners.values():
                client.close(timeout_s=0)
            raise
        finally:
            self._streaming.clear()
            self._pulling.clear()
            sender.join()
            for puller in pullers:
                puller.join()
            for client in partners.values():
                client.close()
        if self._problems:
            raise self._problems[0]
        note(f"Checking every push of {alert_id} against a brute-force answer ...")
        owed_by_shard = self._accounts(settings)
        return compare(
            (push for owed in owed_by_shard for push in owed.pushes),
            self._told.pushes,
            closed=set().union(*(owed.closed for owed in owed_by_shard)),
        )

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                target()
            except BaseException as problem:
                self._problems.append(problem)

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        thread.start()
        return thread

    def _wait_for_flow(self) -> Settings:
        deadline_s = time.monotonic() + 60
        while read_settings(self._client) is None or not read_stats(self._client).process_count:
            self._check()
            if time.monotonic() > deadline_s:
                fail(f"the flow does not start: {self._flow.said()[-2000:]}")
            time.sleep(0.05)
        settings = read_settings(self._client)
        assert settings is not None, "it was there"
        return settings

    def _wait_for_gateway(self, gateway: _Process) -> str:
        deadline_s = time.monotonic() + 60
        while "ready;" not in (said := gateway.said()):
            self._check()
            if time.monotonic() > deadline_s:
                fail(f"the gateway does not start: {said[-2000:]}")
            time.sleep(0.05)
        return str(re.findall(r"http://\S+", said)[0])

    def _check(self) -> None:
        self._flow.check()
        if self._gateway is not None:
            self._gateway.check()
        if self._problems:
            raise self._problems[0]

    # --- what goes on ---------------------------------------------------------------------------------------------

    def _send(self, senders: Sequence[PingSender]) -> None:
        """Each partner's client gets the pings of its phones; it batches, compresses and sends them."""
        try:
            for batch in self._world.first_sight(_now_ms(), 65_536):
                if not self._streaming.is_set():
                    return
                hand_over(batch, senders)
            started_s, given = time.monotonic(), 0
            while self._streaming.is_set():
                due = int((time.monotonic() - started_s) * self._rate)
                if due - given < self._rate // 20:
                    time.sleep(0.01)
                    continue
                hand_over(self._world.batch(due - given, _now_ms()), senders)
                given = due
        finally:
            for sender in senders:
                sender.close(SETTLE_TIMEOUT_S)

    def _pull(self, partner: str, client: Client) -> None:
        while self._pulling.is_set():
            pushes, _ = client.poll(1_000, PULL_WAIT_S)
            with self._told_lock:
                for push in pushes:
                    self._told.by_partner[partner, push.kind] += len(push.device_ids)
                    self._told.pushes += [
                        OwedPush(push.kind, push.alert_id, push.revision, partner, device_id)
                        for device_id in push.device_ids
                    ]
            if pushes:
                client.acknowledge(push.id for push in pushes)

    def _play(self, desk: httpx.Client) -> str:
        """The alert's life, by the streaming time, with the view refreshed four times a second; its id."""
        started_s = time.monotonic()
        alert: Alert | None = None
        closed = False
        with Live(console=console, auto_refresh=False, transient=False) as live:
            while (elapsed_s := time.monotonic() - started_s) < self._stream_s or not (
                closed and (self._all_heard_the_end() or elapsed_s > self._stream_s + END_TIMEOUT_S)
            ):
                self._check()
                if alert is None and elapsed_s >= PUBLISH_AT * self._stream_s:
                    alert = self._publish(desk)
                if alert is not None and not closed and elapsed_s >= CLOSE_AT * self._stream_s:
                    closed = True
                    _ask(desk, f"/v1/alerts/{alert.alert_id}/close", {"outcome": "found", "category": "lost"})
                live.update(self._view(elapsed_s, alert, closed), refresh=True)
                time.sleep(0.25)
            live.update(self._view(self._stream_s, alert, closed), refresh=True)
        if not console.is_terminal:
            console.print()  # a pipe gets the last view alone, without a line end
        assert alert is not None, "it was closed"
        return alert.alert_id

    def _all_heard_the_end(self) -> bool:
        """Whether partners have pulled as many ends as beginnings; for the last view, not for the verdict."""
        with self._told_lock:
            told = self._told.by_partner.copy()
        return 0 < told.total() == 2 * sum(count for (_, kind), count in told.items() if kind == "resolved")

    def _publish(self, desk: httpx.Client) -> Alert:
        hour_s = HOUR_LASTS * self._stream_s
        hour = hour_s * 1000 / HOUR_MS
        schedule: Schedule = ((hour, 100.0), (2 * hour, 200.0), (3 * hour, 300.0), (None, 500.0))
        place = self._world.place(PLACE)
        missing_since = datetime.fromtimestamp(self._desk.now_ms() / 1000, UTC).isoformat(timespec="milliseconds")
        answer = _ask(
            desk,
            "/v1/alerts",
            {
                "location": {"lat": place.lat, "lng": place.lng},
                "missing_since": missing_since,
                "schedule": schedule,
                "child": {"name": "小明", "sex": "male", "age": 6, "clothes": "红色外套"},
                "contact": "028-00000000",
            },
        )
        published = self._desk.show(answer["alert_id"])
        assert published is not None, "the desk has it: it was acknowledged"
        return published.alert

    def _settle(self, settings: Settings) -> None:
        """Wait until every log entry is done and every push has been pulled."""
        deadline_s = time.monotonic() + SETTLE_TIMEOUT_S
        heads = {shard: last_id(self._client, log_key(shard)) for shard in range(settings.shard_count)}
        quiet = 0
        told = -1
        while quiet < 3:
            self._check()
            done = [cast("bytes | None", self._client.get(done_key(shard))) for shard in heads]
            reached = all(
                raw is not None and parse_id(raw) >= head for raw, head in zip(done, heads.values(), strict=True)
            )
            quiet = quiet + 1 if reached and told == len(self._told.pushes) else 0
            told = len(self._told.pushes)
            if time.monotonic() > deadline_s:
                fail("the flow has not come to the end of its logs")
            time.sleep(0.1)

    def _accounts(self, settings: Settings) -> list[OwedPushes]:
        """Who was owed what, from the logs alone, shard by shard."""
        accounts: list[OwedPushes] = []
        for shard in range(settings.shard_count):
            owed = OwedPushes()
            after = "-"
            while entries := cast(_Entries, self._client.xrange(log_key(shard), min=after, count=100)):
                for raw_id, fields in entries:
                    feed(owed, parse_id(raw_id), fields)
                after = f"({entries[-1][0].decode()}"
            accounts.append(owed)
        return accounts

    # --- the view -------------------------------------------------------------------------------------------------

    def _refresh_stats(self) -> None:
        now_s = time.monotonic()
        if now_s - self._stats_at_s < 1.0:
            return
        stats = read_stats(self._client)
        pings = stats.total("pings_accepted_total") - self._stats.total("pings_accepted_total")
        self._pings_per_s = max(0.0, pings) / (now_s - self._stats_at_s) if self._stats_at_s else 0.0
        self._stats, self._stats_at_s = stats, now_s

    def _view(self, elapsed_s: float, alert: Alert | None, closed: bool) -> Group:
        self._refresh_stats()
        stats = self._stats
        flow = Table.grid(padding=(0, 3))
        p50, p99 = (stats.quantile_ms("publish_to_queue_ms", quantile) for quantile in (0.5, 0.99))
        flow.add_row(
            _figure("pings/s", f"{self._pings_per_s:,.0f}"),
            _figure("live phones", f"{stats.total('devices_live'):,.0f}"),
            _figure("pushes", f"{stats.total('pushes_total'):,.0f}"),
            _figure("publish to queue", "-" if p50 is None or p99 is None else f"p50 {p50:.0f} ms · p99 {p99:.0f} ms"),
            _figure("time", f"{elapsed_s:.0f} of {self._stream_s:.0f} s"),
        )
        partners = Table("partner", box=None, padding=(0, 3, 0, 0))
        for kind in ("alert", "resolved"):
            partners.add_column(f"told: {kind}", justify="right")
        for partner in self._world.partner_names:
            counts = [self._told.by_partner[partner, kind] for kind in ("alert", "resolved")]
            partners.add_row(partner, *(f"{count:,}" for count in counts))
        return Group(flow, Text(), self._alert_line(alert, closed), Text(), partners)

    def _alert_line(self, alert: Alert | None, closed: bool) -> Text:
        if alert is None:
            return Text("no alert yet: phones ping, nobody is told", style="dim")
        if closed:
            return Text(f"alert {alert.alert_id!r} in {PLACE}: found. Everyone told hears of it.", style="bold green")
        now_ms = _now_ms()
        ring_km = radius_km(alert.schedule, now_ms - alert.missing_since_ms)
        following = [
            (at_ms, km) for at_ms, km in growth_times_ms(alert.schedule, alert.missing_since_ms) if at_ms > now_ms
        ]
        grows = (
            f"{following[0][1]:g} km in {(following[0][0] - now_ms) / 1000:.1f} s" if following else "full size reached"
        )
        bar = "█" * round(ring_km / 20)
        return Text.assemble(
            (f"alert {alert.alert_id!r} in {PLACE}: ring ", "bold"),
            (f"{ring_km:g} km ", "bold red"),
            (f"{bar:<25} ", "red"),
            f"next: {grows}",
        )


def hand_over(batch: PingBatch, senders: Sequence[PingSender]) -> None:
    """A world's batch to the clients of the partners that know its phones."""
    ids = batch.id_bytes.tobytes()
    ends = batch.id_end.tolist()
    device_ids = [ids[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for partner, sender in enumerate(senders):
        rows = np.flatnonzero(batch.partner == partner)
        if len(rows):
            sender.add_columns(
                [device_ids[row] for row in rows.tolist()],
                batch.lat_e7[rows] / E7,
                batch.lng_e7[rows] / E7,
                batch.observed_at_ms[rows],
            )


def _ask(desk: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The desk's answer. Ends the demo if it refuses."""
    answer = desk.post(path, json=body)
    if not answer.is_success:
        fail(f"the desk refuses {path}: {answer.status_code} {answer.text}")
    return cast("dict[str, Any]", answer.json())


def _figure(name: str, value: str) -> Text:
    return Text.assemble((f"{name}\n", "dim"), (value, "bold"))


def _now_ms() -> int:
    return round(time.time() * 1000)
