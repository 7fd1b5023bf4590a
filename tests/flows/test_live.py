"""The live flow end to end: real processes, a real Valkey, every push accounted for.

Each story plays once on a server of its own; the tests look at what it left behind. What is in the queues is held
against two other answers: `flows.audit` over the logs, and what follows by hand for a few devices.

    due north of HOME (30 N, 114 E) one kilometre is 1 / 111.19508 degree
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import redis

from flows.audit import AuditResult, OwedPush, OwedPushes, compare
from flows.consumers import Consumer
from flows.desk import Desk, DeskAnswer, Relay
from flows.embedded import EmbeddedServer
from flows.log import (
    LogId,
    LogWriter,
    append_entry,
    done_key,
    ensure_settings,
    last_id,
    log_key,
    parse_id,
    push_key,
    read_settings,
)
from flows.metrics import read_stats
from flows.push_commands import log_id_of
from flows.server import connect, link_opener
from flows.wire import MalformedEntry, PingColumns, PushEntry, decode_entry, decode_push, screen_pings
from geoindex.entries import DEFAULT_EXPIRY_MS, HOUR_MS, Alert, Schedule, Settings, Tick
from tests.geoindex.machines import batch_of
from tests.reference.events import DEGREE_E7, PingEvent

ROOT = Path(__file__).resolve().parents[2]
PARTNERS = ("amap", "baidu", "ditu")
SHARD_COUNT = 8
HOME_LAT, HOME_LNG = 30.0, 114.0
KM = 1 / 111.19508
START_TIMEOUT_S, STOP_TIMEOUT_S, SETTLE_TIMEOUT_S = 30.0, 15.0, 20.0

QueueEntries = list[tuple[bytes, dict[bytes, bytes]]]
Queues = dict[str, QueueEntries]
"""Every push queue's entries by key, byte for byte."""


# ---- processes


class FlowProcess:
    """`tuanyuan run` in a process of its own. `var`: where its checkpoints are."""

    def __init__(self, url: str, log_path: Path, var: Path, *options: str) -> None:
        self._log_path = log_path
        command = [sys.executable, "-m", "tuanyuan.cli", "run", "--valkey", url, "--var", str(var), "--quiet", *options]
        # An audit needs the whole log; a crash is more interesting when a checkpoint has just been taken.
        environment = clean_environment() | {"TUANYUAN_TRIM_LOGS": "no", "TUANYUAN_CHECKPOINT_INTERVAL_S": "1"}
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def said(self) -> str:
        return self._log_path.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        wait_for(lambda: "ready;" in self.said, START_TIMEOUT_S, lambda: f"a flow that is ready, got: {self.said}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Its exit code."""
        self._process.send_signal(number)
        return self._process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def clean_environment() -> dict[str, str]:
    """Without settings of whoever runs the tests; tracebacks of Rust would only be long."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TUANYUAN_", "RUST_"))}


def wait_for(condition: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:g} s for {what()}"
        time.sleep(0.02)


class Stage:
    """A server of its own, its flows, and the hands that send and publish."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._flow_count = 0
        self._exits = ExitStack()
        self.server = self._exits.enter_context(
            EmbeddedServer.start(folder / "valkey", port=None, memory_bytes_max=512 << 20)
        )
        self.client = connect(self.server.url)
        self._exits.callback(self.client.close)
        self.desk = Desk(self.client)

    def close(self) -> None:
        self._exits.close()

    def start_flow(self, *options: str, from_checkpoint: bool = True, wait: bool = True) -> FlowProcess:
        """A flow that knows the checkpoints of those before it, or one that must replay the whole log."""
        self._flow_count += 1
        var = self._folder / ("var" if from_checkpoint else f"var-{self._flow_count}")
        flow = FlowProcess(self.server.url, self._folder / f"flow-{self._flow_count}.log", var, *options)
        self._exits.callback(flow.kill)
        if wait:
            flow.wait_until_ready()
        return flow

    def begin_logs(self) -> Settings:
        """The settings that the first flow would write; every log begins with them."""
        return ensure_settings(self.client, Settings(shard_count=SHARD_COUNT, partners=PARTNERS, hash_key=7))

    def send(self, pings: Iterable[PingEvent]) -> None:
        settings = read_settings(self.client)
        assert settings is not None
        writer = LogWriter(link_opener(self.client), settings)
        writer.append_pings(batch_of(list(pings), settings.partners))
        writer.close()

    def to_the_logs(self, answer: DeskAnswer) -> DeskAnswer:
        Relay(self.client).copy_pending()
        assert self.desk.wait_copied(answer.desk_id, 5.0)
        return answer

    def publish(self, alert: Alert) -> DeskAnswer:
        return self.to_the_logs(self.desk.publish(alert))

    def heads(self) -> dict[int, LogId]:
        return {shard: last_id(self.client, log_key(shard)) for shard in range(SHARD_COUNT)}

    def done(self) -> dict[int, LogId]:
        raws = cast("list[bytes | None]", self.client.mget([done_key(shard) for shard in range(SHARD_COUNT)]))
        return {shard: parse_id(raw) if raw else (0, 0) for shard, raw in enumerate(raws)}

    def settle(self) -> None:
        """Until everything that stands in the logs now is done."""
        heads = self.heads()
        wait_for(
            lambda: all(done >= heads[shard] for shard, done in self.done().items()),
            SETTLE_TIMEOUT_S,
            lambda: f"`done` to reach {heads}, got {self.done()}",
        )

    def queues(self) -> Queues:
        keys = [push_key(shard, partner) for shard in range(SHARD_COUNT) for partner in PARTNERS]
        queues = {key: cast(QueueEntries, self.client.xrange(key)) for key in keys}
        return {key: entries for key, entries in queues.items() if entries}

    def logs(self) -> dict[int, QueueEntries]:
        return {shard: cast(QueueEntries, self.client.xrange(log_key(shard))) for shard in range(SHARD_COUNT)}

    def forget(self, *patterns: str) -> None:
        """Delete keys: what no product ever does, to see everything written once more."""
        for pattern in patterns:
            for key in cast("list[bytes]", self.client.keys(pattern)):
                self.client.delete(key)

    def audit(self) -> AuditResult:
        return compare(owed_by(self.logs()), queued_in(self.queues()))


@contextmanager
def staged(folder: Path) -> Iterator[Stage]:
    stage = Stage(folder)
    try:
        yield stage
    finally:
        stage.close()


@pytest.fixture(scope="module", autouse=True)
def _compiled_kernels() -> None:
    """A flow that compiles first would make every timeout a guess."""
    command = [sys.executable, "-m", "tuanyuan.cli", "warmup"]
    subprocess.run(command, cwd=ROOT, env=clean_environment(), check=True, capture_output=True, timeout=110)


# ---- accounts


def owed_by(logs: dict[int, QueueEntries]) -> list[OwedPush]:
    """What the logs owe, by `flows.audit`; malformed entries owe nothing."""
    pushes: list[OwedPush] = []
    for entries in logs.values():
        audit = OwedPushes()
        partner_count = 0
        for raw_id, fields in entries:
            try:
                ((kind, payload),) = fields.items()
                entry = decode_entry(kind, payload)
            except ValueError:
                continue
            if isinstance(entry, Settings):
                partner_count = len(entry.partners)
            if isinstance(entry, PingColumns):
                entry, _ = screen_pings(entry, partner_count)
            audit.apply(parse_id(raw_id)[0], entry)
        pushes += audit.pushes
    return pushes


class Told(NamedTuple):
    """One device told one thing, as it stands in a queue."""

    kind: str
    revision: int
    ring_km: float
    at_ms: int


def decoded(queues: Queues) -> Iterator[tuple[str, LogId, PushEntry]]:
    """(partner, entry id, push) of every entry, in queue order within a queue."""
    for key, entries in queues.items():
        for raw_id, fields in entries:
            ((kind, payload),) = fields.items()
            push = decode_push(payload)
            assert kind.decode() == push.kind
            yield key.rpartition(":")[2], parse_id(raw_id), push


def queued_in(queues: Queues) -> list[OwedPush]:
    return [
        OwedPush(push.kind, push.alert_id, push.revision, partner, device_id)
        for partner, _, push in decoded(queues)
        for device_id in push.device_ids
    ]


def told_in(queues: Queues, alert_id: str) -> dict[tuple[str, str], list[Told]]:
    """(partner, device) -> what it was told of one alert, in queue order."""
    told: dict[tuple[str, str], list[Told]] = defaultdict(list)
    for partner, _, push in decoded(queues):
        if push.alert_id == alert_id:
            for device_id in push.device_ids:
                told[partner, device_id].append(Told(push.kind, push.revision, push.ring_km, push.at_ms))
    return dict(told)


def ends_of(client: redis.Redis, queues: Queues) -> dict[str, tuple[int, LogId]]:
    """(length, last id ever given) of each queue."""
    return {key: (client.xlen(key), last_id(client, key)) for key in queues}


def assert_in_order(queues: Queues) -> None:
    """Rule 10, and: `at` is the time of the log entry that caused the push or, for growth, an earlier one."""
    ranks = {"alert": 0, "update": 1, "resolved": 2}
    for alert_id in {push.alert_id for _, _, push in decoded(queues)}:
        for device, pushes in told_in(queues, alert_id).items():
            order = [(ranks[push.kind], push.revision) for push in pushes]
            assert order == sorted(set(order)), f"{device}, {alert_id}: {pushes}"
            assert [push.kind for push in pushes].count("alert") == 1
    for _, entry_id, push in decoded(queues):
        assert push.at_ms <= log_id_of(entry_id)[0]


def ping(partner: str, device_id: str, km_north: float, observed_at_ms: int, lng: float = HOME_LNG) -> PingEvent:
    return PingEvent(
        partner,
        device_id,
        round((HOME_LAT + km_north * KM) * DEGREE_E7),
        round(lng * DEGREE_E7),
        observed_at_ms,
    )


def crowd(seed: int, count: int, observed_at_ms: int, prefix: str = "crowd") -> list[PingEvent]:
    """Phones all over the rings, of all partners, ids of many lengths; the same seed, the same phones elsewhere."""
    places = random.Random(seed)
    return [
        PingEvent(
            PARTNERS[number % 3],
            f"{prefix}-{number:0{3 + number % 40}d}",
            round((HOME_LAT + places.uniform(-7, 7) * KM) * DEGREE_E7),
            round((HOME_LNG + places.uniform(-8, 8) * KM) * DEGREE_E7),
            observed_at_ms,
        )
        for number in range(count)
    ]


def growing_alert(alert_id: str, since_ms: int, first_step_s: float, step_s: float, **what: Any) -> Alert:
    """Rings of 1, 2, 3 and 5 km; the first step may be longer than the others."""
    hours = [(first_step_s + number * step_s) * 1000 / HOUR_MS for number in range(3)]
    schedule: Schedule = ((hours[0], 1.0), (hours[1], 2.0), (hours[2], 3.0), (None, 5.0))
    place = {"lat": HOME_LAT, "lng": HOME_LNG} | what
    return Alert(
        alert_id,
        1,
        missing_since_ms=since_ms,
        schedule=schedule,
        expires_at_ms=since_ms + DEFAULT_EXPIRY_MS,
        **place,
    )


# ---- the whole life of an alert

FIRST_STEP_S, STEP_S = 2.0, 0.6
MALFORMED: list[dict[bytes, bytes]] = [
    {b"pings": random.Random(1).randbytes(300)},
    {b"pings": b""},
    {b"publish": random.Random(2).randbytes(80)},
    {b"settings": b"\x80"},
    {b"nonsense": b"\x81\xa1v\x01"},
    {b"pings": b"\x80", b"tick": b"\x80"},
]


@dataclass
class Story:
    """What the first story left behind."""

    missing_since_ms: int = 0
    updated_at_ms: int = 0
    logs: dict[int, QueueEntries] = field(default_factory=dict)
    queues: Queues = field(default_factory=dict)
    delivered: dict[str, list[OwedPush]] = field(default_factory=dict)
    """By consumer group."""
    unacknowledged: dict[str, int] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    refused: dict[str, float] = field(default_factory=dict)
    exit_code: int = -1
    said: str = ""
    ends: dict[str, tuple[int, LogId]] = field(default_factory=dict)
    resumed_ends: dict[str, tuple[int, LogId]] = field(default_factory=dict)
    """After a restart from the checkpoint of the clean stop."""
    replayed_ends: dict[str, tuple[int, LogId]] = field(default_factory=dict)
    """After a replay of the whole log."""
    replayed_queues: Queues = field(default_factory=dict)
    replayed_stats: dict[str, float] = field(default_factory=dict)


def play(stage: Stage) -> Story:
    """Publish, grow, edit, close; then stop, and start again on the same logs."""
    story = Story()
    client, desk = stage.client, stage.desk
    options = ["--shard-count", str(SHARD_COUNT)]
    for partner in PARTNERS:
        options += ["--partner", partner]
    flow = stage.start_flow(*options)

    now_ms = desk.now_ms()
    stage.send(
        [
            ping("amap", "at-home", 0.0, now_ms),
            ping("baidu", "at-home", 0.0, now_ms),  # the same phone in another app: another device
            ping("baidu", "half", 0.5, now_ms),
            ping("baidu", "one-and-a-half", 1.5, now_ms),
            ping("ditu", "two-and-a-half", 2.5, now_ms),
            ping("amap", "four", 4.0, now_ms),
            ping("baidu", "eight", 8.0, now_ms),
            ping("amap", "comes", 8.0, now_ms),
            ping("amap", "goes", 0.5, now_ms),
            ping("ditu", "stale", 0.0, now_ms - 6 * HOUR_MS - 60_000),
            ping("ditu", "ahead", 0.0, now_ms + 3_600_000),
            ping("baidu", "there", 50.0, now_ms),
            ping("amap", "there", 50.0, now_ms),
        ]
    )
    for fields in MALFORMED:
        for shard in range(SHARD_COUNT):
            client.xadd(log_key(shard), cast(Any, fields))
    stage.send(crowd(1, 400, now_ms))

    story.missing_since_ms = since_ms = desk.now_ms()
    stage.publish(growing_alert("child", since_ms, FIRST_STEP_S, STEP_S))
    stage.publish(growing_alert("drill", since_ms, 600, 1, status="exercise", audience=("ditu",)))
    now_ms = desk.now_ms()
    stage.send([ping("amap", "comes", 0.25, now_ms), ping("amap", "goes", 8.0, now_ms)])
    stage.send(crowd(2, 400, now_ms))  # everybody moves
    time.sleep(max(0.0, (since_ms - desk.now_ms()) / 1000 + FIRST_STEP_S + 2 * STEP_S + 0.1))

    story.updated_at_ms = desk.now_ms()
    stage.to_the_logs(desk.update("child", {"lat": HOME_LAT + 50 * KM, "audience": ("baidu",)}, expected_revision=1))
    stage.send([ping("baidu", "late", 50.0, desk.now_ms()), ping("ditu", "late", 50.0, desk.now_ms())])
    stage.to_the_logs(desk.close("child", "found", expected_revision=2))
    stage.send([ping("baidu", "too-late", 50.0, desk.now_ms())])
    stage.to_the_logs(desk.close("drill", "cancelled"))
    stage.settle()

    for group in ("first", "second"):
        story.delivered[group], story.unacknowledged[group] = pull_everything(client, group)
    story.exit_code = flow.stop(signal.SIGTERM)
    story.stats, story.refused = counters(client)  # published once more at the end
    story.said = flow.said
    story.logs, story.queues = stage.logs(), stage.queues()
    story.ends = ends_of(client, story.queues)

    second = stage.start_flow()
    stage.send(crowd(3, 400, desk.now_ms()))
    stage.settle()
    second.stop()
    story.resumed_ends = ends_of(client, stage.queues())
    stage.forget("stats*")

    third = stage.start_flow(from_checkpoint=False)
    known = sum(length for length, _ in story.ends.values())
    wait_for(
        lambda: counters(client)[0]["push_entries_known_total"] >= known,
        SETTLE_TIMEOUT_S,
        lambda: f"{known} push entries to be refused again, got {counters(client)[0]}",
    )
    stage.settle()
    third.stop()
    story.replayed_stats = counters(client)[0]
    story.replayed_queues = stage.queues()
    story.replayed_ends = ends_of(client, story.replayed_queues)
    return story


def counters(client: redis.Redis) -> tuple[dict[str, float], dict[str, float]]:
    """Totals of all processes, and refused pings by reason."""
    stats = read_stats(client)
    names = ("pings_accepted_total", "malformed_entries_total", "pushes_total", "push_entries_total")
    totals = {name: stats.total(name) for name in (*names, "push_entries_known_total", "devices_live")}
    return totals, stats.by_label("pings_refused_total", "reason")


def pull_everything(client: redis.Redis, group: str) -> tuple[list[OwedPush], int]:
    """All that a group of consumers is given: two consumers a partner, in turns; and what stays unacknowledged."""
    found: list[OwedPush] = []
    for partner in PARTNERS:
        consumers = [Consumer(client, partner, SHARD_COUNT, group, name) for name in ("left", "right")]
        idle = 0
        while idle < 4:
            for consumer in consumers:
                deliveries = consumer.read(7, 0)
                idle = 0 if deliveries else idle + 1
                for delivery in deliveries:
                    push = delivery.push
                    found += [
                        OwedPush(push.kind, push.alert_id, push.revision, partner, device_id)
                        for device_id in push.device_ids
                    ]
                assert consumer.acknowledge(deliveries) == len(deliveries)
    pending = 0
    for shard in range(SHARD_COUNT):
        for partner in PARTNERS:
            pending += cast(dict[str, int], client.xpending(push_key(shard, partner), group))["pending"]
    return found, pending


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with staged(tmp_path_factory.mktemp("story")) as stage:
        yield play(stage)


def test_every_push_of_an_alerts_life_is_accounted_for(story: Story) -> None:
    result = compare(owed_by(story.logs), queued_in(story.queues))
    assert result.clean, (result.missed[:5], result.extra[:5], result.duplicate[:5])
    assert result.pushes > 500
    assert_in_order(story.queues)


def test_each_device_is_told_what_follows_by_hand(story: Story) -> None:
    told = {
        device: [(push.kind, push.revision, push.ring_km) for push in pushes]
        for device, pushes in told_in(story.queues, "child").items()
        if not device[1].startswith("crowd")
    }
    edited = [("update", 2, 5.0), ("resolved", 3, 5.0)]
    assert told == {
        ("amap", "at-home"): [("alert", 1, 1.0), *edited],
        ("baidu", "at-home"): [("alert", 1, 1.0), *edited],
        ("baidu", "half"): [("alert", 1, 1.0), *edited],
        ("amap", "goes"): [("alert", 1, 1.0), *edited],
        ("amap", "comes"): [("alert", 1, 1.0), *edited],
        ("baidu", "one-and-a-half"): [("alert", 1, 2.0), *edited],
        ("ditu", "two-and-a-half"): [("alert", 1, 3.0), *edited],
        ("amap", "four"): [("alert", 1, 5.0), *edited],
        # Moved 50 km north, for one partner only: told devices stay told, new ones are that partner's alone.
        ("baidu", "there"): [("alert", 2, 5.0), ("resolved", 3, 5.0)],
        ("baidu", "late"): [("alert", 2, 5.0), ("resolved", 3, 5.0)],
    }


def test_a_ring_grows_at_the_hour_itself_though_nobody_pings(story: Story) -> None:
    told = told_in(story.queues, "child")
    for device, step in ((("baidu", "one-and-a-half"), 0), (("ditu", "two-and-a-half"), 1), (("amap", "four"), 2)):
        assert told[device][0].at_ms == story.missing_since_ms + round((FIRST_STEP_S + step * STEP_S) * 1000)
    rings = Counter(pushes[0].ring_km for pushes in told.values() if pushes[0].revision == 1)
    assert sorted(rings) == [1.0, 2.0, 3.0, 5.0]


def test_an_exercise_reaches_its_partner_and_nobody_else(story: Story) -> None:
    told = told_in(story.queues, "drill")
    assert told
    assert {partner for partner, _ in told} == {"ditu"}
    assert {tuple(push.kind for push in pushes) for pushes in told.values()} == {("alert", "resolved")}


def test_every_consumer_group_is_given_everything_once(story: Story) -> None:
    queued = Counter(queued_in(story.queues))
    assert story.delivered.keys() == {"first", "second"}
    for group, delivered in story.delivered.items():
        assert Counter(delivered) == queued, group
    assert story.unacknowledged == {"first": 0, "second": 0}


def test_malformed_entries_are_counted_and_passed_over_and_nothing_else_is_lost(story: Story) -> None:
    assert story.stats["malformed_entries_total"] == len(MALFORMED) * SHARD_COUNT
    assert story.said.count("is set aside") == len(MALFORMED) * SHARD_COUNT
    assert "Traceback" not in story.said
    malformed = 0
    for entries in story.logs.values():
        for _, fields in entries:
            try:
                ((kind, payload),) = fields.items()
                decode_entry(kind, payload)
            except (MalformedEntry, ValueError):
                malformed += 1
    assert malformed == len(MALFORMED) * SHARD_COUNT


def test_pings_are_counted_and_refused_by_reason(story: Story) -> None:
    handmade, crowds = 13 + 2 + 2 + 1, 800
    assert story.refused == {"too_old": 1, "from_the_future": 1}
    assert story.stats["pings_accepted_total"] == handmade + crowds - 2
    assert story.stats["pushes_total"] == len(queued_in(story.queues))
    located = {"at-home", "half", "one-and-a-half", "two-and-a-half", "four", "eight", "comes", "goes", "too-late"}
    twice = {"at-home", "there", "late"}
    assert story.stats["devices_live"] == 400 + len(located | twice) + len(twice)


def test_sigterm_ends_a_flow_cleanly(story: Story) -> None:
    assert story.exit_code == 0
    assert "stopped cleanly" in story.said
    assert "warning" not in story.said.lower()


def test_a_restart_after_a_clean_stop_writes_nothing_new(story: Story) -> None:
    assert story.resumed_ends == story.ends


def test_a_replay_of_the_whole_log_writes_nothing_new(story: Story) -> None:
    assert story.replayed_ends == story.ends
    assert story.replayed_queues == story.queues
    assert story.replayed_stats["push_entries_total"] == 0
    assert story.replayed_stats["pushes_total"] == 0
    assert story.replayed_stats["push_entries_known_total"] == sum(length for length, _ in story.ends.values())
    assert story.replayed_stats["pings_accepted_total"] == story.stats["pings_accepted_total"] + 400


# ---- one history, run by different processes


@dataclass
class History:
    """Logs that are complete, and what one process makes of them."""

    stage: Stage
    queues: Queues

    def run(self, *flows: Sequence[str]) -> Queues:
        """The queues that some processes write from nothing, run at once."""
        self.stage.forget("push:*", "done:*")
        processes = [self.stage.start_flow(*options, from_checkpoint=False, wait=False) for options in flows]
        for process in processes:
            process.wait_until_ready()
        self.stage.settle()
        assert [process.stop() for process in processes] == [0] * len(flows)
        return self.stage.queues()


def write_history(stage: Stage) -> None:
    """Alerts published, grown, edited and closed among moving phones, with ticks, and no flow at hand."""
    stage.begin_logs()
    desk = stage.desk
    stage.send(crowd(1, 600, desk.now_ms()))
    since_ms = desk.now_ms()
    for number in range(5):
        stage.publish(growing_alert(f"alert-{number}", since_ms, 0.1 + number / 20, 0.1, lat=HOME_LAT + number * KM))
    for round_number in range(8):
        stage.send(crowd(10 + round_number, 600, desk.now_ms()))
        time.sleep(0.1)
        for shard in range(SHARD_COUNT):
            append_entry(stage.client, shard, Tick())
    stage.to_the_logs(desk.update("alert-1", {"lng": HOME_LNG + 4 * KM}))
    stage.to_the_logs(desk.close("alert-0", "found"))
    stage.to_the_logs(desk.close("alert-1", "false_report"))
    stage.send(crowd(99, 600, desk.now_ms()))


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    with staged(tmp_path_factory.mktemp("history")) as stage:
        write_history(stage)
        history = History(stage, {})
        history.queues = history.run(())
        yield history


def test_one_process_gives_what_the_logs_owe(history: History) -> None:
    result = compare(owed_by(history.stage.logs()), queued_in(history.queues))
    assert result.clean, (result.missed[:5], result.extra[:5], result.duplicate[:5])
    assert result.pushes > 3000
    assert_in_order(history.queues)


def test_two_processes_with_half_of_the_shards_each_give_what_one_gives(history: History) -> None:
    assert history.run(["--shards", "0-3"], ["--shards", "4-7"]) == history.queues


def test_a_process_writes_queues_of_its_own_shards_only(history: History) -> None:
    history.stage.forget("push:*", "done:*")
    flow = history.stage.start_flow("--shards", "2,5-6", from_checkpoint=False)
    heads = history.stage.heads()
    wait_for(
        lambda: all(history.stage.done()[shard] >= heads[shard] for shard in (2, 5, 6)),
        SETTLE_TIMEOUT_S,
        lambda: "its shards",
    )
    assert flow.stop() == 0
    expected = {key: entries for key, entries in history.queues.items() if key[7:8] in "256"}
    assert expected
    assert history.stage.queues() == expected
    assert {shard for shard, done in history.stage.done().items() if done > (0, 0)} == {2, 5, 6}


def test_two_processes_on_the_same_shards_by_mistake_write_nothing_twice(history: History) -> None:
    assert history.run((), ["--shards", "0-7"]) == history.queues


# ---- crashes


class Sender(threading.Thread):
    """A crowd that pings all the time, from a thread of its own."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(daemon=True)
        self._stage = stage
        self._ending = threading.Event()
        self.batch_count = 0

    def run(self) -> None:
        writer_client = connect(self._stage.server.url)
        settings = read_settings(writer_client)
        assert settings is not None
        writer = LogWriter(link_opener(writer_client), settings)
        while not self._ending.wait(0.02):
            self.batch_count += 1
            try:
                batch = batch_of(crowd(self.batch_count, 300, round(time.time() * 1000)), settings.partners)
                writer.append_pings(batch)
            except (redis.ConnectionError, redis.TimeoutError):
                continue  # the server is down: a ping more or less
        writer.close()
        writer_client.close()

    def end(self) -> None:
        self._ending.set()
        self.join(10)


def test_a_flow_that_is_killed_again_and_again_pushes_everything_exactly_once(tmp_path: Path) -> None:
    """A second flow on the same shards runs part of the time; alerts are published, edited and closed all along."""
    moments = random.Random(20)
    with staged(tmp_path) as stage:
        stage.begin_logs()
        desk = stage.desk
        stage.send(crowd(0, 300, desk.now_ms()))
        sender = Sender(stage)
        sender.start()
        flow = stage.start_flow()
        for life in range(3):
            since_ms = desk.now_ms()
            for number in range(3):
                stage.publish(growing_alert(f"alert-{life}-{number}", since_ms, 0.1, 0.1, lng=HOME_LNG + number * KM))
            time.sleep(moments.uniform(0.0, 0.5))
            flow.kill()
            if life:
                stage.to_the_logs(desk.update(f"alert-{life - 1}-0", {"lat": HOME_LAT + 2 * KM}))
                stage.to_the_logs(desk.close(f"alert-{life - 1}-1", "found"))
            flow = stage.start_flow()
        by_mistake = stage.start_flow()
        stage.publish(growing_alert("last", desk.now_ms(), 0.2, 0.2))
        time.sleep(0.5)
        assert flow.stop(signal.SIGINT) == 0
        stage.to_the_logs(desk.close("last", "found"))
        sender.end()
        stage.settle()
        assert by_mistake.stop() == 0
        result = stage.audit()
        assert result.clean, (result.line(), result.missed[:5], result.extra[:5], result.duplicate[:5])
        assert result.pushes > 3000
        assert sender.batch_count > 20
        assert_in_order(stage.queues())


def test_a_server_that_is_killed_and_started_again_costs_no_push_and_doubles_none(tmp_path: Path) -> None:
    with staged(tmp_path) as stage:
        stage.begin_logs()
        flow = stage.start_flow()
        sender = Sender(stage)
        sender.start()
        stage.publish(growing_alert("before", stage.desk.now_ms(), 0.3, 0.3))
        time.sleep(0.3)
        os.kill(stage.server.pid, signal.SIGKILL)
        time.sleep(0.3)
        with EmbeddedServer.start(tmp_path / "valkey", port=None, memory_bytes_max=512 << 20):
            stage.to_the_logs(stage.desk.close("before", "found"))
            stage.publish(growing_alert("after", stage.desk.now_ms(), 0.2, 0.2))
            time.sleep(0.7)
            stage.to_the_logs(stage.desk.close("after", "found"))
            sender.end()
            stage.settle()
            assert flow.is_alive()
            assert flow.stop() == 0
            result = stage.audit()
            assert result.clean, (result.line(), result.missed[:5], result.extra[:5], result.duplicate[:5])
            assert {push.alert_id for push in queued_in(stage.queues())} == {"before", "after"}
            assert "the server was restarted" in flow.said
