"""The population and the traffic of every benchmark: a seeded world, and alerts where its people live.

first sight   every phone once: fills the tables
publish       100 alerts with default rings at places drawn by population, a quarter at each stage of growth
settling      every phone once more: the first ping after a publish is looked at closely, the next ones are not
measured      pings never seen before: 90 % from within 50 m, 10 % from 0.1 to 5 km away
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flows.wire import decode_pings, encode_pings
from geoindex.columns import U32, PingBatch
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, Alert, Settings
from loadtest.world import World

SEED = 1
ALERT_COUNT = 100
BATCH_PINGS = 16_384
"""As many as a log entry holds at most."""
OFFLINE_MS = 1_759_999_981_000
"""Where the shard clock begins in what runs without a server: a second into a minute."""
PING_INTERVAL_MS = 10_000
"""Every phone pings this often, by the shard clock of what runs without a server."""

STAGES = ((10, 100.0), (70, 200.0), (130, 300.0), (240, 500.0))
"""Minutes that a child has been missing, and the ring then (rule 4); the next growth is 50 minutes or more away."""


@dataclass(frozen=True, slots=True)
class ActiveAlert:
    """An alert and the radius of its ring, which stays the same throughout a benchmark."""

    alert: Alert
    ring_km: float


@dataclass(frozen=True, slots=True)
class SentPings:
    """A batch, when it was sent, and which phone of the world sent each of its pings."""

    at_ms: int
    pings: PingBatch
    phone: U32


class Traffic:
    """A world and the pings it has sent so far."""

    def __init__(self, phone_count: int, seed: int = SEED) -> None:
        self.world = World(seed, phone_count)

    @property
    def phone_count(self) -> int:
        return self.world.phone_count

    def settings(self, shard_count: int = 1) -> Settings:
        """What a log of this world begins with."""
        return Settings(shard_count=shard_count, partners=self.world.partner_names, hash_key=SEED)

    def first_sight(self, now_ms: int, batch_pings: int = BATCH_PINGS) -> Iterator[SentPings]:
        """Every phone once, before all other pings."""
        first_ping = 0
        for pings in self.world.first_sight(now_ms, batch_pings):
            yield SentPings(now_ms, pings, self.senders(first_ping, len(pings)))
            first_ping += len(pings)

    def batches(
        self, ping_count: int, batch_pings: int = BATCH_PINGS, now_ms: int | None = None
    ) -> Iterator[SentPings]:
        """The world's next pings, in batches. `now_ms`: all of them now; None: by the shard clock, at the interval."""
        while ping_count > 0:
            size = min(batch_pings, ping_count)
            first_ping = self.phone_count + self.world.ping_count
            at_ms = OFFLINE_MS + first_ping * PING_INTERVAL_MS // self.phone_count if now_ms is None else now_ms
            yield SentPings(at_ms, self.world.batch(size, at_ms), self.senders(first_ping, size))
            ping_count -= size

    def senders(self, first_ping: int, ping_count: int) -> U32:
        """Phones of pings counted from the start of first sight, u32[ping_count]."""
        phone, _ = self.world._draw_phones(first_ping, ping_count)
        return phone


def active_alerts(world: World, count: int, now_ms: int, seed: int = SEED) -> list[ActiveAlert]:
    """Alerts at places drawn by population, each place once, a quarter of them at each stage of growth."""
    random = np.random.default_rng(seed)
    weights = world.places.people / world.places.people.sum()
    alerts = []
    for index, place in enumerate(random.choice(len(weights), count, replace=False, p=weights).tolist()):
        minutes, ring_km = STAGES[index % len(STAGES)]
        missing_since_ms = now_ms - minutes * 60_000
        alert = Alert(
            alert_id=f"bench-{index:03d}",
            revision=1,
            lat=float(world.places.lat[place]),
            lng=float(world.places.lng[place]),
            missing_since_ms=missing_since_ms,
            schedule=DEFAULT_SCHEDULE,
            expires_at_ms=missing_since_ms + DEFAULT_EXPIRY_MS,
        )
        alerts.append(ActiveAlert(alert, ring_km))
    return alerts


def as_decoded(pings: PingBatch) -> PingBatch:
    """The batch as it comes off the wire: read-only views into one payload."""
    columns = decode_pings(encode_pings(pings))
    return PingBatch(
        columns.partner, columns.id_bytes, columns.id_end, columns.lat_e7, columns.lng_e7, columns.observed_at_ms
    )


def squeezed(pings: PingBatch, lat: float, lng: float) -> PingBatch:
    """The same phones on a map 100 times smaller around a place: all of China's within some 40 km of it."""
    lat_e7, lng_e7 = round(lat * 1e7), round(lng * 1e7)
    return PingBatch(
        pings.partner,
        pings.id_bytes,
        pings.id_end,
        (lat_e7 + (pings.lat_e7.astype(np.int64) - lat_e7) // 100).astype(np.int32),
        (lng_e7 + (pings.lng_e7.astype(np.int64) - lng_e7) // 100).astype(np.int32),
        pings.observed_at_ms,
    )
