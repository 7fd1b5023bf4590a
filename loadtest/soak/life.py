"""What goes on while things break: phones that ping, officers that publish, edit and close, partners that read.

Every thread goes on through whatever the server does; what was not acknowledged is tried again, as real senders do.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import redis

from flows.alert_json import AlertRefused
from flows.consumers import Consumer
from flows.desk import Desk, DeskAnswer
from flows.log import LogId, LogWriter, format_id, log_key, parse_id, trimmed_key
from flows.server import ServerRefused, connect, link_opener
from geoindex.columns import I64, PingBatch, pack_ids
from geoindex.entries import DEFAULT_EXPIRY_MS, HOUR_MS, Alert, Settings
from loadtest.soak.accounts import StreamEntries

PARTNERS = ("amap", "baidu")
HOME_LAT, HOME_LNG = 30.0, 114.0
DEGREES_PER_KM = 1 / 111.19508
"""Of latitude."""
PHONES = 100
"""Of one batch."""
COHORT_BATCHES = 30
"""After so many batches other phones ping, which nobody has been told about yet."""
SERVER_TROUBLE = (redis.RedisError, ServerRefused, OSError)

Mangle = Callable[[PingBatch, np.random.Generator], list[PingBatch]]
"""What becomes of a batch before it is sent."""


def as_it_is(batch: PingBatch, chance: np.random.Generator) -> list[PingBatch]:
    """Sent once, as it was observed."""
    return [batch]


def phones(cohort: int, count: int = PHONES) -> PingBatch:
    """So many phones of all partners at home, ids of many lengths, observed at 0."""
    id_bytes, id_end = pack_ids([f"phone-{cohort}-{number:0{3 + number % 40}d}" for number in range(count)])
    return PingBatch(
        (np.arange(count) % len(PARTNERS)).astype(np.uint16),
        id_bytes,
        id_end,
        np.full(count, round(HOME_LAT * 1e7), np.int32),
        np.full(count, round(HOME_LNG * 1e7), np.int32),
        np.zeros(count, np.int64),
    )


def somewhere(batch: PingBatch, chance: np.random.Generator, observed_at_ms: int | I64, km: float = 8.0) -> PingBatch:
    """The same phones all over the rings."""
    lat, lng = (chance.uniform(-km, km, len(batch)) * DEGREES_PER_KM * 1e7 for _ in range(2))
    return PingBatch(
        batch.partner,
        batch.id_bytes,
        batch.id_end,
        (round(HOME_LAT * 1e7) + lat).astype(np.int32),
        (round(HOME_LNG * 1e7) + lng).astype(np.int32),
        np.broadcast_to(np.asarray(observed_at_ms, np.int64), len(batch)).copy(),
    )


def growing_alert(alert_id: str, since_ms: int, step_s: float, **what: Any) -> Alert:
    """Rings of 1, 2, 3 and 5 km, a step each."""
    hours = [number * step_s * 1000 / HOUR_MS for number in (1, 2, 3)]
    schedule = ((hours[0], 1.0), (hours[1], 2.0), (hours[2], 3.0), (None, 5.0))
    place = {"lat": HOME_LAT, "lng": HOME_LNG} | what
    return Alert(
        alert_id,
        1,
        missing_since_ms=since_ms,
        schedule=schedule,
        expires_at_ms=since_ms + DEFAULT_EXPIRY_MS,
        **place,
    )


class Worker(threading.Thread):
    """A thread that a failure ends loudly: whoever ends it hears of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.ending = threading.Event()
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as problem:
            self.problem = problem

    def work(self) -> None:
        raise NotImplementedError

    def end(self, timeout_s: float = 60.0) -> None:
        """Raises what ended it before."""
        self.ending.set()
        self.join(timeout_s)
        if self.problem is not None:
            raise self.problem
        if self.is_alive():
            raise RuntimeError(f"{self.name} must have ended within {timeout_s:g} s")


class Senders(Worker):
    """Phones that ping all the time: `per_s` batches of `phone_count` each."""

    def __init__(
        self,
        url: str,
        settings: Settings,
        seed: int,
        mangle: Mangle = as_it_is,
        per_s: float = 30.0,
        phone_count: int = PHONES,
    ) -> None:
        super().__init__("senders")
        self.pings = 0
        """Sent and acknowledged."""
        self.refused = 0
        """Batches that the server did not take the first time."""
        self.per_s = per_s
        self._url, self._settings, self._mangle, self._phone_count = url, settings, mangle, phone_count
        self._chance = np.random.default_rng(seed)

    def work(self) -> None:
        client = connect(self._url)
        writer = LogWriter(link_opener(client), self._settings)
        number, due_s = 0, time.monotonic()
        crowd = phones(0, self._phone_count)
        while not self.ending.is_set():
            if number % COHORT_BATCHES == 0:
                crowd = phones(number // COHORT_BATCHES, self._phone_count)
            number += 1
            for batch in self._mangle(somewhere(crowd, self._chance, round(time.time() * 1000)), self._chance):
                self._send(writer, batch)
            due_s = max(due_s + 1 / self.per_s, time.monotonic() - 0.5)
            self.ending.wait(due_s - time.monotonic())
        writer.close()
        client.close()

    def _send(self, writer: LogWriter, batch: PingBatch) -> None:
        """Until it is acknowledged, whole: as a gateway does with what a partner sent."""
        while True:
            try:
                writer.append_pings(batch)
            except SERVER_TROUBLE:
                self.refused += 1
                if self.ending.wait(0.02):
                    return
                continue
            self.pings += len(batch)
            return


class Officers(Worker):
    """Alerts published, edited and closed, several open at once; all are closed at the end."""

    def __init__(self, desk: Desk, seed: int, pause_s: float = 0.06, step_s: float = 0.15) -> None:
        super().__init__("officers")
        self.acknowledged: list[LogId] = []
        """Desk ids of what officers were told is done."""
        self.published = 0
        self._desk, self._pause_s, self._step_s = desk, pause_s, step_s
        self._chance = random.Random(seed)
        self._open: list[str] = []

    def work(self) -> None:
        while not self.ending.wait(self._chance.uniform(0, 2 * self._pause_s)):
            self._one_more()
        while not self._close_all():
            time.sleep(0.05)

    def _close_all(self) -> bool:
        """Whether no alert is open any more, as far as the desk knows: it may know less than the officers."""
        try:
            alerts = self._desk.list(only_open=True)
        except SERVER_TROUBLE:
            return False
        closed = [self._acknowledge(partial(self._desk.close, known.alert.alert_id, "found")) for known in alerts]
        return all(closed)

    def _one_more(self) -> None:
        chance = self._chance
        drawn = chance.random()
        if len(self._open) < 2 or (drawn < 0.4 and len(self._open) < 6):
            self.published += 1
            self._publish(f"alert-{self.published}")
        elif drawn < 0.7:
            self._edit(chance.choice(self._open))
        else:
            self._close(chance.choice(self._open))

    def _place(self) -> dict[str, float]:
        north, east = (self._chance.uniform(-4, 4) * DEGREES_PER_KM for _ in range(2))
        return {"lat": HOME_LAT + north, "lng": HOME_LNG + east}

    def _publish(self, alert_id: str) -> None:
        what: dict[str, Any] = self._place()
        drawn = self._chance.random()
        if drawn < 0.2:
            what |= {"audience": (self._chance.choice(PARTNERS),)}
            if drawn < 0.1:
                what |= {"status": "exercise"}

        def publish() -> DeskAnswer:
            return self._desk.publish(growing_alert(alert_id, self._desk.now_ms(), self._step_s, **what))

        self._open.append(alert_id)  # also if nobody knows whether it was published: it is closed like the others
        self._acknowledge(publish)

    def _edit(self, alert_id: str) -> None:
        self._acknowledge(partial(self._desk.update, alert_id, cast(Any, self._place())))

    def _close(self, alert_id: str) -> None:
        outcome = self._chance.choice(("found", "false_report", "cancelled"))
        if self._acknowledge(partial(self._desk.close, alert_id, outcome)):
            self._open.remove(alert_id)

    def _acknowledge(self, act: Callable[[], DeskAnswer]) -> bool:
        """Whether an event is durable, or refused: nothing is to be tried again."""
        try:
            self.acknowledged.append(act().desk_id)
        except SERVER_TROUBLE:
            return False
        except AlertRefused:
            pass  # closed or never published, by a call whose answer was lost
        return True


@dataclass(frozen=True, slots=True)
class Delivered:
    """One queue entry that a partner was given. `latency_ms`: since the log entry that caused it."""

    at_s: float
    latency_ms: float


class Partner(Worker):
    """Reads one partner's queues, acknowledges, and keeps each entry once, by queue and id."""

    def __init__(
        self, url: str, name: str, shard_count: int, consumer: str = "one", claim_after_s: float = 5.0
    ) -> None:
        super().__init__(f"partner {name}")
        self.partner = name
        self.delivered: dict[tuple[str, LogId], Delivered] = {}
        self.again = 0
        """Deliveries of entries that it had before."""
        self._url, self._shard_count, self._consumer, self._claim_after_s = url, shard_count, consumer, claim_after_s

    def work(self) -> None:
        client = connect(self._url)
        consumer = Consumer(client, self.partner, self._shard_count, "soak", self._consumer, self._claim_after_s)
        while not self.ending.is_set():
            try:
                deliveries = consumer.read(100, 0)
                now_s = time.time()
                for delivery in deliveries:
                    key = delivery.stream, delivery.entry_id
                    if key in self.delivered:
                        self.again += 1
                        continue
                    self.delivered[key] = Delivered(now_s, now_s * 1000 - delivery.entry_id[0])
                consumer.acknowledge(deliveries)
            except SERVER_TROUBLE:
                deliveries = []
            if not deliveries:
                self.ending.wait(0.01)
        client.close()


class LogKeeper(Worker):
    """Keeps every entry of every log, also of those that are trimmed later."""

    def __init__(self, url: str, shard_count: int) -> None:
        super().__init__("log keeper")
        self.entries: dict[int, StreamEntries] = {shard: [] for shard in range(shard_count)}
        self._url = url

    def work(self) -> None:
        client = connect(self._url)
        positions = dict.fromkeys(self.entries, (0, 0))
        while True:
            ending = self.ending.is_set()
            try:
                found = self._read(client, positions)
            except SERVER_TROUBLE:
                found = True
                self.ending.wait(0.05)
            if not found:
                if ending:
                    break
                time.sleep(0.01)
        client.close()

    def _read(self, client: redis.Redis, positions: dict[int, LogId]) -> bool:
        with client.pipeline(transaction=True) as pipeline:
            after = {log_key(shard): format_id(position) for shard, position in positions.items()}
            pipeline.xread(cast(Any, after), count=500)
            pipeline.mget([trimmed_key(shard) for shard in positions])
            reply, trimmed = pipeline.execute()
        for shard, raw in zip(positions, trimmed, strict=True):
            if raw is not None and parse_id(raw) > positions[shard]:
                raise RuntimeError(f"shard {shard} was trimmed up to {raw.decode()} before its entries were kept")
        for key, entries in reply or []:
            shard = int(key.decode()[6:-1])
            self.entries[shard] += entries
            positions[shard] = parse_id(entries[-1][0])
        return bool(reply)
