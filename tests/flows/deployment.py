"""The deployment of the fault table (`loadtest.soak`) in the hands of a test, which says itself what goes on in it.

A story ends with the accounts of `loadtest.soak.accounts`.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import redis

from flows.desk import DeskAnswer, Relay
from flows.log import LogWriter, log_key
from flows.server import connect, link_opener
from geoindex.entries import Settings
from loadtest.soak import accounts, deployment
from loadtest.soak.accounts import StreamEntries as QueueEntries
from loadtest.soak.accounts import told_in
from loadtest.soak.deployment import PATIENCE_S, SETTINGS, SHARD_COUNT
from loadtest.soak.flow import ForkedFlow, Trouble
from loadtest.soak.life import HOME_LAT, HOME_LNG, PARTNERS, growing_alert
from tests.geoindex.machines import batch_of
from tests.reference.events import DEGREE_E7, PingEvent

__all__ = [
    "HOME_LAT",
    "HOME_LNG",
    "PARTNERS",
    "PATIENCE_S",
    "SHARDS",
    "SHARD_COUNT",
    "Deployment",
    "LogKeeper",
    "QueueEntries",
    "Sender",
    "crowd",
    "deployed",
    "growing_alert",
    "ping",
    "told_in",
]

SHARDS = range(SHARD_COUNT)
KM = 1 / 111.19508
"""Degrees of latitude."""


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


class Deployment(deployment.Deployment):
    """A server of its own, its flows, and the hands that send and publish."""

    def __init__(self, folder: Path, exits: ExitStack) -> None:
        super().__init__(folder, exits, SETTINGS)

    def flow(
        self,
        trouble: Trouble | None = None,
        url: str | None = None,
        constants: dict[str, Any] | None = None,
        **options: Any,
    ) -> ForkedFlow:
        """`url`: another way to the server; `constants`: other values for some, as {"flows.server.NAME": value}."""
        return super().flow(trouble or Trouble(constants=constants or {}), url, **options)

    def sender(self) -> Sender:
        sender = Sender(self.server.url, self.settings)
        sender.start()
        self.exits.callback(sender.end)
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

    def check(self, logs: dict[int, QueueEntries] | None = None, pushes_min: int = 100) -> None:
        """The accounts. `logs`: with what was trimmed away."""
        found = accounts.account(self.logs() if logs is None else logs, self.queues(), PARTNERS)
        assert found.clean, (found.line(), found.examples)
        assert found.pushes >= pushes_min


@contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    with ExitStack() as exits:
        yield Deployment(folder, exits)
