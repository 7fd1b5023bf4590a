"""Who is outside: senders of pings, officers at the desk, partners at their queues, all with the program's clients."""

from __future__ import annotations

import contextlib
import math
import random
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import redis

from flows.alert_json import AlertRefused
from flows.consumers import Consumer
from flows.desk import Desk, Relay, RevisionConflict
from flows.log import LogWriter, SettingsMismatch, add_partner, log_key, read_settings
from flows.server import ServerRefused
from geoindex.columns import E7, PingBatch, pack_ids
from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_SCHEDULE, HOUR_MS, OUTCOMES, Alert, Schedule, Settings
from loadtest.simulation.connection import simulated_client, simulated_links
from loadtest.simulation.oracle import Oracle
from loadtest.simulation.world import Actor, Process, World

EARTH_RADIUS_KM = 6371.0088
MINUTE_MS = 60_000
CLAIM_AFTER_S = 4.0
LATE_PARTNER = "late"
PLACES = ((30.0, 114.0), (39.9, 116.4), (-0.01, 179.98), (89.95, 20.0), (58.28, 11.25))
"""Two cities, the antimeridian, a pole, and a pentagon of H3's."""
TAIL_ID = "phone-whose-id-needs-the-heap-"
EDGE_OFFSETS_KM = (-1.0, -0.1, -3e-5, 3e-5, 0.1, 1.0)
"""From a ring's edge. Nearer than 1 mm two right formulas may disagree; a location's grid is 1.1 cm."""


def _schedule(*steps: tuple[float | None, float]) -> Schedule:
    """Steps in seconds."""
    return tuple((None if seconds is None else seconds * 1000 / HOUR_MS, km) for seconds, km in steps)


SCHEDULES: tuple[Schedule, ...] = (
    _schedule((20, 1.0), (60, 2.0), (180, 3.0), (None, 5.0)),
    _schedule((3, 0.5), (10, 1.0), (None, 40.0)),
    _schedule((45, 0.2), (3600, 1.0), (None, 2.0)),
    _schedule((None, 2.0)),
    DEFAULT_SCHEDULE,
)


def travel(lat: float, lng: float, bearing: float, distance_km: float) -> tuple[float, float]:
    """Where one gets along a great circle; degrees, bearing in radians.

    Ed Williams, "Aviation Formulary", section "Lat/lon given radial and distance".
    """
    phi, arc = math.radians(lat), distance_km / EARTH_RADIUS_KM
    sine = math.sin(phi) * math.cos(arc) + math.cos(phi) * math.sin(arc) * math.cos(bearing)
    end = math.asin(max(-1.0, min(1.0, sine)))
    east = math.atan2(math.sin(bearing) * math.sin(arc) * math.cos(phi), math.cos(arc) - math.sin(phi) * sine)
    return math.degrees(end), (lng + math.degrees(east) + 180) % 360 - 180


class Map:
    """Where things happen: what phones and officers know of each other's places."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.base = rng.choice(PLACES)
        self.alerts: list[Alert] = []
        """The last revisions that were published or tried, for phones to be near to."""
        self.alert_ids: list[str] = []
        """The last that were published, or tried."""

    def centre(self) -> tuple[float, float]:
        rng = self._rng
        return travel(*self.base, rng.uniform(0, 2 * math.pi), rng.choice((0.0, 0.3, 2.0, 8.0)) * rng.random())

    def place(self) -> tuple[float, float]:
        """Anywhere around: often right at a ring's edge."""
        rng = self._rng
        bearing = rng.uniform(0, 2 * math.pi)
        if self.alerts and rng.random() < 0.7:
            alert = rng.choice(self.alerts[-4:])
            radius_km = rng.choice(alert.schedule)[1]
            if rng.random() < 0.6:
                return travel(alert.lat, alert.lng, bearing, max(0.0, radius_km + rng.choice(EDGE_OFFSETS_KM)))
            return travel(alert.lat, alert.lng, bearing, radius_km * rng.random() * 1.3)
        return travel(*self.base, bearing, rng.random() * 6)


class Sender(Process):
    """A gateway that appends pings, and sends again what was not acknowledged."""

    def __init__(self, world: World, oracle: Oracle, settings: Settings, place: Map) -> None:
        super().__init__(world, "sender", mortal=False)
        rng = world.rng
        self._oracle, self._map = oracle, place
        self._client = simulated_client(self.route)
        self._writer = LogWriter(simulated_links(self._client, self.clock), settings)
        count = rng.randint(6, 26)
        self._phones = [
            (rng.randrange(len(settings.partners)), f"{TAIL_ID if number % 4 == 0 else 'p'}{number % (count - 2)}号")
            for number in range(count)
        ]
        self._last: dict[tuple[int, str], tuple[float, float]] = {}
        self._to_send: deque[PingBatch] = deque()
        self._sent: deque[PingBatch] = deque(maxlen=6)
        self._live_window_ms = settings.live_window_ms
        world.actors.append(Actor(self, "sender", self._step, 3))

    def _step(self) -> None:
        rng, world = self.world.rng, self.world
        if rng.random() < 0.03 and LATE_PARTNER not in self._writer.settings.partners:
            self._learn_partner()
        chance = rng.random()
        if chance < 0.12 and self._sent:
            world.faults["duplicated_batches"] += 1
            self._to_send.append(rng.choice(self._sent))
        elif chance < 0.2:
            world.faults["delayed_batches"] += 1
            self._to_send.append(self._batch())
            return  # it goes with whatever is sent next
        else:
            self._to_send.append(self._batch())
        if rng.random() < 0.2 and len(self._to_send) > 1:
            self._to_send.rotate(1)
        while self._to_send:
            batch = self._to_send[0]
            try:
                for appended in self._writer.append_pings(batch):
                    self._oracle.acknowledged(log_key(appended.shard).encode(), appended.log_id)
            except (redis.RedisError, ServerRefused):
                world.faults["batches_sent_again"] += 1
                return
            self._sent.append(self._to_send.popleft())

    def _learn_partner(self) -> None:
        try:
            add_partner(self._client, [LATE_PARTNER])
            settings = read_settings(self._client)
        except (redis.RedisError, SettingsMismatch):
            return
        if settings is not None and LATE_PARTNER in settings.partners:
            self._writer.settings = settings
            index = settings.partners.index(LATE_PARTNER)
            self._phones += [(index, f"late-{number}") for number in range(3)]

    def _batch(self) -> PingBatch:
        rng, now_ms = self.world.rng, self.world.server.clock_ms
        rows = rng.choices(self._phones, k=rng.randint(1, 10))
        places = []
        observed = []
        for phone in rows:
            known = self._last.get(phone)
            if known is None or rng.random() < 0.6:
                known = self._map.place()
            elif rng.random() < 0.5:
                known = travel(*known, rng.uniform(0, 6.3), rng.choice((0.001, 0.05, 0.5)))
            self._last[phone] = known
            places.append(known)
            observed.append(now_ms + self._age_ms())
        id_bytes, id_end = pack_ids([device_id for _, device_id in rows])
        return PingBatch(
            np.array([partner for partner, _ in rows], np.uint16),
            id_bytes,
            id_end,
            np.array([round(lat * E7) for lat, _ in places], np.int32),
            np.array([round(lng * E7) for _, lng in places], np.int32),
            np.array(observed, np.int64),
        )

    def _age_ms(self) -> int:
        """From now, by the server's clock: mostly just now, at times late, ahead, or beyond the limits of rule 2."""
        rng = self.world.rng
        chance = rng.random()
        if chance < 0.7:
            return -rng.randrange(2000)
        if chance < 0.85:
            return -rng.randrange(min(10 * MINUTE_MS, self._live_window_ms))
        return rng.choice(
            (
                -self._live_window_ms + rng.randrange(-2000, 2000),
                -self._live_window_ms,
                rng.randrange(5 * MINUTE_MS),
                5 * MINUTE_MS + rng.randrange(-2, 2000),
                24 * HOUR_MS,
                -24 * HOUR_MS,
            )
        )


class Officer(Process):
    """Publishes, edits and closes; two of them may be at the same alert."""

    def __init__(self, world: World, oracle: Oracle, name: str, place: Map, partners: tuple[str, ...]) -> None:
        super().__init__(world, name, mortal=False)
        self._oracle, self._map, self._partners = oracle, place, partners
        client = simulated_client(self.route)
        self.desk = Desk(client)
        self._relay = Relay(client, is_cluster=world.seed % 2 == 1)
        self._published = 0
        self.closes_all = False
        """Every search has ended: nothing else is done any more."""
        world.actors.append(Actor(self, "officer", self._step, 1))

    def _step(self) -> None:
        rng = self.world.rng
        try:
            if self.closes_all:
                for one in self.desk.list(only_open=True):
                    self._act(lambda alert_id=one.alert.alert_id: self.desk.close(alert_id, "found"))
                self.closes_all = False
                return
            if rng.random() < 0.4:
                return
            recent = self._map.alert_ids[-4:]
            shown = [self.desk.show(alert_id) for alert_id in rng.sample(recent, min(2, len(recent)))]
        except redis.RedisError:
            return
        known = [alert for alert in shown if alert is not None and alert.outcome is None]
        chance = rng.random()
        if not known or chance < 0.3:
            self._published += 1
            alert = self._alert(f"{self.name}-{self._published}")
            self._map.alerts.append(alert)
            self._map.alert_ids.append(alert.alert_id)
            self._act(lambda: self.desk.publish(alert))
            return
        chosen = rng.choice(known).alert
        expected = rng.choice((None, chosen.revision, chosen.revision))
        if chance < 0.75:
            changes = self._changes(chosen)
            self._act(lambda: self.desk.update(chosen.alert_id, changes, expected))
        else:
            outcome = rng.choice(OUTCOMES)
            self._act(lambda: self.desk.close(chosen.alert_id, outcome, expected))

    def _act(self, act: Any) -> None:
        """One thing that an officer does: on the desk once if it is answered, not at all if it is refused."""
        world, oracle = self.world, self._oracle
        before = oracle.desk_events[self.name]
        try:
            answer = act()
        except (AlertRefused, RevisionConflict) as refusal:
            written = oracle.desk_events[self.name] - before
            if written:
                world.violate("a refused edit is not made", f"{self.name}: {refusal}, and {written} events on the desk")
            return
        except redis.RedisError:
            written = oracle.desk_events[self.name] - before
            if written > 1:
                world.violate("an edit is made once", f"{self.name}: {written} events on the desk, and no answer")
            return
        written = oracle.desk_events[self.name] - before
        if written != 1:
            world.violate("an edit is made once", f"{self.name}: {written} events on the desk for one edit")
        oracle.acknowledged(b"desk", answer.desk_id)
        with contextlib.suppress(redis.RedisError, SettingsMismatch):
            self._relay.copy_pending()  # else the flows copy it

    def _alert(self, alert_id: str) -> Alert:
        rng, now_ms = self.world.rng, self.world.server.clock_ms
        lat, lng = self._map.centre()
        missing_since_ms = now_ms - rng.choice((0, 1000, 15_000, 60_000, HOUR_MS, -5000))
        lasts_ms = rng.choice((20_000, 120_000, HOUR_MS, 72 * HOUR_MS))
        status, audience = self._reach()
        expires_at_ms = max(missing_since_ms, now_ms) + lasts_ms
        return Alert(alert_id, 1, lat, lng, missing_since_ms, rng.choice(SCHEDULES), expires_at_ms, status, audience)

    def _reach(self) -> tuple[str, tuple[str, ...] | None]:
        rng = self.world.rng
        if rng.random() < 0.6:
            return "actual", None
        audience = tuple(sorted({rng.choice((*self._partners, LATE_PARTNER)) for _ in range(2)}))
        return rng.choice((("exercise", audience), ("actual", audience)))

    def _changes(self, alert: Alert) -> dict[str, Any]:
        rng, now_ms = self.world.rng, self.world.server.clock_ms
        changes: dict[str, Any] = {}
        what = rng.random()
        if what < 0.4:
            changes["lat"], changes["lng"] = self._map.centre()
            self._map.alerts.append(replace(alert, **changes))
        elif what < 0.6:
            changes["schedule"] = rng.choice(SCHEDULES)
        elif what < 0.8:
            soonest_ms = max(alert.missing_since_ms + 1, now_ms - AUTO_CLOSE_MS // 2)
            changes["expires_at_ms"] = max(soonest_ms, now_ms + rng.choice((-1000, 0, 30_000, HOUR_MS)))
        elif alert.audience is not None or alert.status == "actual":
            changes["audience"] = tuple(sorted({rng.choice((*self._partners, LATE_PARTNER)) for _ in range(2)}))
        return changes


class Partner(Process):
    """A consumer of one partner's queues, who dies at times before it acknowledges."""

    def __init__(self, world: World, oracle: Oracle, name: str, shard_count: int) -> None:
        super().__init__(world, f"partner {name}", mortal=False)
        self._oracle, self._name, self._shard_count = oracle, name, shard_count
        self._client = simulated_client(self.route)
        self._lives = 0
        self._consumer = self._born()
        world.actors.append(Actor(self, "consumer", self._step, 1))

    def _born(self) -> Consumer:
        """The same consumer again, or another of the group."""
        self._lives += 1
        name = f"consumer-{self._lives % 2}"
        return Consumer(self._client, self._name, self._shard_count, "group", name, CLAIM_AFTER_S, clock=self.clock)

    def _step(self) -> None:
        rng, world = self.world.rng, self.world
        tails_lost = self._oracle.tails_lost
        try:
            deliveries = self._consumer.read(rng.randint(1, 20), 0)
            if self._oracle.tails_lost != tails_lost:
                return  # what was read may never have been
            for delivery in deliveries:
                queue = world.server.stream(delivery.stream.encode())
                place = queue.place_of(delivery.entry_id)
                if place is None:
                    world.violate("what is delivered is in the queue", f"{delivery}")
                    continue
                self._oracle.delivered(delivery, tuple(queue.fields[place]))
            if deliveries and world.is_hostile and rng.random() < 0.2:
                world.faults["consumers_died"] += 1
                self._consumer = self._born()
                return
            self._consumer.acknowledge(deliveries)
        except redis.RedisError:
            pass  # reading again later loses nothing
