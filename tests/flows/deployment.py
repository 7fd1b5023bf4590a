"""A deployment for tests of recovery: a server of its own, flows that can be killed, a crowd that pings, accounts.

The first account: what a fresh machine makes of each log from its first entry on must stand in the queues, entry by
entry and id by id. The second: `flows.audit`, which knows nothing of machines, finds nothing missed, extra or doubled.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from flows.audit import OwedPush, OwedPushes, compare
from flows.checkpoints import CheckpointStore
from flows.desk import Desk, DeskAnswer, Relay
from flows.log import (
    LogId,
    LogWriter,
    RawEntry,
    done_key,
    ensure_settings,
    format_id,
    last_id,
    log_key,
    parse_id,
    push_key,
    trimmed_key,
)
from flows.match import Entry, decode, step
from flows.push_commands import push_id
from flows.server import EmbeddedServer, connect, link_opener
from flows.wire import PingColumns, decode_entry, decode_push, encode_push, screen_pings
from geoindex.entries import DEFAULT_EXPIRY_MS, HOUR_MS, Alert, Settings
from geoindex.shard import ShardMachine
from tests.flows.forked_flow import ForkedFlow
from tests.flows.waiting import eventually
from tests.geoindex.machines import batch_of
from tests.reference.events import DEGREE_E7, PingEvent

PARTNERS = ("amap", "baidu")
SHARD_COUNT = 4
SHARDS = range(SHARD_COUNT)
HOME_LAT, HOME_LNG = 30.0, 114.0
KM = 1 / 111.19508
"""Degrees of latitude."""

PATIENCE_S = 60.0
"""For what takes a tenth of a second on a machine that does nothing else."""

QueueEntries = list[tuple[bytes, dict[bytes, bytes]]]


def ping(partner: str, device_id: str, km_north: float, km_east: float, observed_at_ms: int) -> PingEvent:
    lat_e7, lng_e7 = (
        round((degrees + km * KM) * DEGREE_E7) for degrees, km in ((HOME_LAT, km_north), (HOME_LNG, km_east))
    )
    return PingEvent(partner, device_id, lat_e7, lng_e7, observed_at_ms)


def crowd(seed: int, count: int, observed_at_ms: int) -> list[PingEvent]:
    """Phones all over the rings; the same phones for every seed, elsewhere."""
    places = random.Random(seed)
    return [
        ping(
            PARTNERS[number % 2],
            f"phone-{number:0{3 + number % 40}d}",
            places.uniform(-7, 7),
            places.uniform(-8, 8),
            observed_at_ms,
        )
        for number in range(count)
    ]


def growing_alert(alert_id: str, since_ms: int, step_s: float) -> Alert:
    """Rings of 1, 2, 3 and 5 km."""
    hours = [number * step_s * 1000 / HOUR_MS for number in (1, 2, 3)]
    schedule = ((hours[0], 1.0), (hours[1], 2.0), (hours[2], 3.0), (None, 5.0))
    return Alert(alert_id, 1, HOME_LAT, HOME_LNG, since_ms, schedule, since_ms + DEFAULT_EXPIRY_MS)


class Sender(threading.Thread):
    """A crowd that pings all the time."""

    def __init__(self, url: str, settings: Settings) -> None:
        super().__init__(daemon=True)
        self._url, self._settings = url, settings
        self._ending = threading.Event()

    def run(self) -> None:
        client = connect(self._url)
        writer = LogWriter(link_opener(client), self._settings)
        seed = 0
        while not self._ending.wait(0.02):
            seed += 1
            try:
                writer.append_pings(batch_of(crowd(seed, 200, round(time.time() * 1000)), PARTNERS))
            except redis.RedisError:
                continue  # the server is down, or full: a ping more or less
        writer.close()
        client.close()

    def end(self) -> None:
        self._ending.set()
        self.join(10)


class LogKeeper(threading.Thread):
    """Keeps every entry of every log, also of those that are trimmed."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.entries: dict[int, QueueEntries] = {shard: [] for shard in SHARDS}
        self._client = connect(url)
        self._ending = threading.Event()

    def run(self) -> None:
        positions = dict.fromkeys((log_key(shard) for shard in SHARDS), "0-0")
        while True:
            ending = self._ending.is_set()
            reply = self._client.xread(cast(Any, positions), block=20)
            for key, entries in cast(Any, reply) or []:
                name = key.decode()
                self.entries[int(name[6:-1])] += entries
                positions[name] = entries[-1][0].decode()
            if ending and not reply:
                self._client.close()
                return

    def end(self) -> dict[int, QueueEntries]:
        self._ending.set()
        self.join(10)
        return self.entries


class Deployment:
    """A server of its own, its flows, and the hands that send and publish."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        self.folder = folder
        self.var = folder / "var"
        self._exits = exits
        self._flow_count = 0
        self.server = exits.enter_context(
            EmbeddedServer.start(folder / "valkey", port=None, memory_bytes_max=512 << 20)
        )
        self.client = connect(self.server.url)
        exits.callback(self.client.close)
        self.desk = Desk(self.client)
        self.settings = ensure_settings(self.client, Settings(shard_count=SHARD_COUNT, partners=PARTNERS, hash_key=11))
        self.store = CheckpointStore(self.var / "checkpoints", self.settings)

    # ---- what goes on

    def flow(
        self,
        crash: str | None = None,
        constants: dict[str, Any] | None = None,
        url: str | None = None,
        **options: Any,
    ) -> ForkedFlow:
        """`url`: another way to the server."""
        self._flow_count += 1
        log_path = self.folder / f"flow-{self._flow_count}.log"
        flow = ForkedFlow(url or self.server.url, self.var, log_path, crash, constants, **options)
        self._exits.callback(flow.kill)
        return flow

    def sender(self) -> Sender:
        sender = Sender(self.server.url, self.settings)
        sender.start()
        self._exits.callback(sender.end)
        return sender

    def send(self, pings: list[PingEvent]) -> None:
        writer = LogWriter(link_opener(self.client), self.settings)
        writer.append_pings(batch_of(pings, PARTNERS))
        writer.close()

    def send_crowd(self, seed: int) -> None:
        self.send(crowd(seed, 300, self.desk.now_ms()))

    def publish(self, alert_id: str, step_s: float = 0.15) -> None:
        self._to_the_logs(self.desk.publish(growing_alert(alert_id, self.desk.now_ms(), step_s)))

    def close(self, alert_id: str) -> None:
        self._to_the_logs(self.desk.close(alert_id, "found"))

    def alert_during(self, alert_id: str, life: Callable[[], None]) -> None:
        """Publish an alert whose ring grows during `life`, then close it."""
        self.publish(alert_id)
        life()
        self.close(alert_id)

    def _to_the_logs(self, answer: DeskAnswer) -> None:
        Relay(self.client).copy_pending()
        assert self.desk.wait_copied(answer.desk_id, 5.0)

    # ---- how far it has come

    def heads(self) -> list[LogId]:
        return [last_id(self.client, log_key(shard)) for shard in SHARDS]

    def done(self, shard: int) -> LogId:
        raw = cast("bytes | None", self.client.get(done_key(shard)))
        return parse_id(raw) if raw else (0, 0)

    def trimmed(self, shard: int) -> LogId:
        raw = cast("bytes | None", self.client.get(trimmed_key(shard)))
        return parse_id(raw) if raw else (0, 0)

    def positions(self, shard: int) -> list[LogId]:
        """Of the shard's final checkpoints, the newest first."""
        return [checkpoint.position for checkpoint in self.store.finals(shard)]

    def settle(self) -> None:
        """Until all that stands in the logs now is done."""
        heads = self.heads()
        eventually(lambda: all(self.done(shard) >= heads[shard] for shard in SHARDS), timeout_s=PATIENCE_S)

    def wait_for_checkpoints(self, count: int = 1) -> None:
        """Until every shard has `count` new final ones."""
        for _ in range(count):
            newest = [self.positions(shard)[:1] for shard in SHARDS]

            def all_newer(newest: list[list[LogId]] = newest) -> bool:
                return all(self.positions(shard)[:1] != newest[shard] for shard in SHARDS)

            eventually(all_newer, timeout_s=PATIENCE_S)

    # ---- accounts

    def logs(self) -> dict[int, QueueEntries]:
        return {shard: cast(QueueEntries, self.client.xrange(log_key(shard))) for shard in SHARDS}

    def queues(self) -> dict[str, QueueEntries]:
        keys = [push_key(shard, partner) for shard in SHARDS for partner in PARTNERS]
        return {key: cast(QueueEntries, self.client.xrange(key)) for key in keys}

    def check(self, logs: dict[int, QueueEntries] | None = None, pushes_min: int = 100) -> None:
        """Both accounts. `logs`: with what was trimmed away."""
        logs = self.logs() if logs is None else logs
        queues = self.queues()
        assert queues == queues_of(logs)
        result = compare(owed_by(logs), told_in(queues))
        assert result.clean, (result.line(), result.missed[:5], result.extra[:5], result.duplicate[:5])
        assert result.pushes >= pushes_min


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    with ExitStack() as exits:
        yield Deployment(folder, exits)


def queues_of(logs: dict[int, QueueEntries]) -> dict[str, QueueEntries]:
    """What one machine a shard, fed from the first entry to the last, puts into the queues."""
    queues: dict[str, QueueEntries] = {push_key(shard, partner): [] for shard in SHARDS for partner in PARTNERS}
    for shard, entries in logs.items():
        machine = ShardMachine()
        for raw_id, fields in entries:
            ((kind, payload),) = fields.items()
            log_id = parse_id(raw_id)
            entry = decode(RawEntry(shard, *log_id, kind, payload, ""))
            assert isinstance(entry, Entry)
            numbers: dict[str, int] = defaultdict(int)
            for push in step(machine, entry).pushes:
                key = push_key(shard, PARTNERS[push.partner])
                numbers[key] += 1
                entry_id = format_id(push_id(log_id, numbers[key])).encode()
                queues[key].append((entry_id, {push.kind.encode(): encode_push(push)}))
    return queues


def owed_by(logs: dict[int, QueueEntries]) -> list[OwedPush]:
    pushes: list[OwedPush] = []
    for entries in logs.values():
        audit = OwedPushes()
        for raw_id, fields in entries:
            ((kind, payload),) = fields.items()
            entry = decode_entry(kind, payload)
            if isinstance(entry, PingColumns):
                entry, _ = screen_pings(entry, len(PARTNERS))
            audit.apply(parse_id(raw_id)[0], entry)
        pushes += audit.pushes
    return pushes


def told_in(queues: dict[str, QueueEntries]) -> list[OwedPush]:
    told: list[OwedPush] = []
    for key, entries in queues.items():
        partner = key.rpartition(":")[2]
        for _, fields in entries:
            push = decode_push(next(iter(fields.values())))
            told += [
                OwedPush(push.kind, push.alert_id, push.revision, partner, device_id) for device_id in push.device_ids
            ]
    return told
