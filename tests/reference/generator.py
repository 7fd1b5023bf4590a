"""Adversarial logs: few phones, few alerts, and time that stops where it hurts.

    generate_log(np.random.default_rng(seed))     a log from a seed
    logs()                                        a Hypothesis strategy of logs, which shrinks

Every log is legal: partners are known when their devices ping, alerts are complete and valid, the clock never falls.
No ping lies within 1 mm of any circle that any alert of the log can draw. Left out on purpose, because the rules leave
it open: a live window that widens, an expiry set so long past that the automatic close is overdue, an exercise without
audience, schedule hours that are not whole milliseconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from hypothesis import strategies as st

from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, HOUR_MS, OUTCOMES, Alert, Schedule
from tests.reference.choices import Choices, from_hypothesis, from_numpy
from tests.reference.events import AlertClose, AlertRevision, Event, Log, PingEvent, Settings, Tick
from tests.reference.matcher import growth_moments_ms, ring_km
from tests.reference.places import PENTAGONS, PLACES, LocationE7, edges_of, nudged_clear_of, to_e7, travel

START_MS = 1_700_000_000_000
SECOND_MS, MINUTE_MS, DAY_MS = 1000, 60_000, 24 * HOUR_MS
PARTNERS = ("amap", "baidu")
LATE_PARTNER = "meituan"
"""Joins by a settings change."""

DEVICE_IDS = [
    "a",
    "a\0",
    "团圆",
    "手机" * 10 + "号" + "1",  # 64 bytes
    "手机" * 10 + "号" + "2",
    "x" * 7,
    "x" * 8,
    "x" * 9,
    "x" * 16,
    "x" * 17,
    "x" * 63,
    "x" * 64,
    "x" * 63 + "y",
    "y" + "x" * 63,
    "phone-00000001",
    "phone-00000002",
    "caf\u00e9",
    "cafe\u0301",
    "📱" * 16,
    ' ",;\n',
]
BAD_IDS = ["", "x" * 65, "号" * 22]

SCHEDULES: list[Schedule] = [
    DEFAULT_SCHEDULE,
    ((None, 10.0),),
    ((0.001, 1.0), (0.002, 2.5), (None, 3.0)),
    ((0.1, 0.05), (0.25, 1.0), (1.1, 10.0), (None, 1000.0)),
    ((0.57, 100.0), (1.1, 100.001), (None, 100.002)),
    ((2.0, 5.0), (None, 999.9995)),
    ((None, 0.01),),
    ((None, 1000.0),),
]

HORIZONS_MS = [10 * MINUTE_MS, DAY_MS, 40 * DAY_MS]
"""A busy hour or two (many alerts open at once); some weeks; the better part of a year."""
EDGE_OFFSETS_MM = [-1000, 1000, -100, 100, -20, 20]


@dataclass
class _Draft:
    """A log being written, and what its writer remembers of it."""

    choices: Choices
    settings: Settings
    places: list[tuple[float, float]]
    devices: list[tuple[str, str]]
    alert_count_max: int
    horizon_ms: int
    """How far time may jump."""
    clock_ms: int = START_MS
    events: list[tuple[int, Event]] = field(default_factory=list)
    alerts: dict[str, Alert] = field(default_factory=dict)
    closed_ids: list[str] = field(default_factory=list)
    last_pings: dict[tuple[str, str], PingEvent] = field(default_factory=dict)

    def write(self, event: Event) -> None:
        self.events.append((self.clock_ms, event))

    # ---- time

    def let_time_pass(self) -> None:
        """Often no time at all; at times to the very moment when something falls due, or far beyond all of it."""
        whole = self.choices.whole
        steps = [(30, "none"), (8, "ms"), (30, "seconds"), (12, "due")]
        if self.horizon_ms >= DAY_MS:
            steps += [(8, "minutes"), (6, "due"), (1, "window")]
        if self.horizon_ms > AUTO_CLOSE_MS:
            steps += [(1, "month")]
        step = self.choices.weighted(steps)
        if step == "ms":
            self.clock_ms += 1
        elif step == "seconds":
            self.clock_ms += whole(1, 20 * SECOND_MS)
        elif step == "minutes":
            self.clock_ms += whole(1, 40) * MINUTE_MS
        elif step == "due":
            due_ms = self.choices.whole(-1, 1) + self.choices.pick(self._moments_ms() or [self.clock_ms])
            self.clock_ms = max(self.clock_ms, due_ms)
        elif step == "window":
            self.clock_ms += self.settings.live_window_ms + whole(-1, 2 * HOUR_MS)
        elif step == "month":
            self.clock_ms += AUTO_CLOSE_MS + whole(0, 4) * DAY_MS

    def _moments_ms(self) -> list[int]:
        """When something falls due within the horizon, soonest first; later than in a day only if nothing else is."""
        moments_ms = [moment for alert in self.alerts.values() for moment in growth_moments_ms(alert)]
        moments_ms += [alert.expires_at_ms for alert in self.alerts.values()]
        moments_ms += [ping.observed_at_ms + self.settings.live_window_ms for ping in self.last_pings.values()]
        moments_ms += [alert.expires_at_ms + AUTO_CLOSE_MS for alert in self.alerts.values()]
        coming = sorted(moment for moment in moments_ms if self.clock_ms < moment < self.clock_ms + self.horizon_ms)
        return [moment for moment in coming if moment < self.clock_ms + DAY_MS] or coming

    # ---- pings

    def add_ping(self) -> None:
        device = self.choices.pick([device for device in self.devices if device[0] in self.settings.partners])
        last = self.last_pings.get(device)
        if last is not None and self.choices.one_in(12):
            self.write(last)
            return
        lat_e7, lng_e7 = self._location(last)
        ping = PingEvent(*device, lat_e7, lng_e7, self._observed_at_ms(last))
        if self.choices.one_in(20):
            ping = self._spoilt(ping)
        else:
            self.last_pings[device] = ping
        self.write(ping)

    def _location(self, last: PingEvent | None) -> LocationE7:
        whole = self.choices.whole
        alert = self.choices.pick(list(self.alerts.values())) if self.alerts else None
        where = self.choices.weighted(
            [(10, "place"), (20, "disc"), (35, "edge"), (15, "creep"), (10, "pentagon"), (5, "anywhere"), (5, "corner")]
        )
        if where == "creep" and last is not None:  # around where it was: centimetres, metres, streets
            reach_e7 = self.choices.pick([3, 100, 5000])
            lat_e7, lng_e7 = last.lat_e7 + whole(-reach_e7, reach_e7), last.lng_e7 + whole(-reach_e7, reach_e7)
            return min(max(lat_e7, -900_000_000), 900_000_000), min(max(lng_e7, -1_800_000_000), 1_800_000_000)
        if where == "edge" and alert is not None:
            coming_km = [km for _, km in alert.schedule if km >= ring_km(alert, self.clock_ms)]
            radius_km = self.choices.pick(coming_km) + self.choices.pick(EDGE_OFFSETS_MM) / 1e6
            return to_e7(*travel((alert.lat, alert.lng), self._bearing(), radius_km))
        if where == "disc" and alert is not None:
            radius_km = ring_km(alert, self.clock_ms) * whole(0, 1200) / 1000
            return to_e7(*travel((alert.lat, alert.lng), self._bearing(), radius_km))
        if where == "pentagon":
            return to_e7(*travel(self.choices.pick(PENTAGONS), self._bearing(), whole(0, 20_000) / 1000))
        if where == "anywhere":
            return whole(-900_000_000, 900_000_000), whole(-1_800_000_000, 1_800_000_000)
        if where == "corner":
            return 900_000_000 * whole(-1, 1), 1_800_000_000 * whole(-1, 1)
        return to_e7(*self.choices.pick(self.places))

    def _bearing(self) -> float:
        return self.choices.whole(0, 3600) / 10

    def _observed_at_ms(self, last: PingEvent | None) -> int:
        """Mostly just now; else late, tied with the ping before, or at (and 1 ms beyond) the limits of rule 2."""
        clock_ms, settings = self.clock_ms, self.settings
        when = self.choices.weighted(
            [(50, "now"), (15, "just"), (10, "late"), (8, "tie"), (5, "old"), (5, "ahead"), (3, "limit"), (2, "beyond")]
        )
        if when == "just":
            return clock_ms - self.choices.whole(0, 30 * SECOND_MS)
        if when == "late":
            return clock_ms - self.choices.whole(0, 5 * HOUR_MS)
        if when == "tie" and last is not None:
            return last.observed_at_ms
        if when == "old":
            return clock_ms - settings.live_window_ms + self.choices.whole(-1, 2)
        if when == "ahead":
            return clock_ms + self.choices.whole(0, settings.future_tolerance_ms)
        if when == "limit":
            return clock_ms + settings.future_tolerance_ms + self.choices.whole(-1, 1)
        if when == "beyond":
            return clock_ms + settings.future_tolerance_ms + self.choices.pick([HOUR_MS, 400 * DAY_MS, 1 << 45])
        return clock_ms

    def _spoilt(self, ping: PingEvent) -> PingEvent:
        """The same ping, with something that rule 2 refuses."""
        return self.choices.pick(
            [
                *(replace(ping, device_id=bad_id) for bad_id in BAD_IDS),
                *(replace(ping, lat_e7=lat_e7) for lat_e7 in (900_000_001, -900_000_001, -(1 << 31))),
                *(replace(ping, lng_e7=lng_e7) for lng_e7 in (1_800_000_001, -1_800_000_001, (1 << 31) - 1)),
                replace(ping, observed_at_ms=self.clock_ms - self.settings.live_window_ms - 1),
                replace(ping, observed_at_ms=0),
            ]
        )

    # ---- alerts

    def add_publish(self) -> None:
        """A new alert, or a new revision under an id that is known or closed."""
        number = len(self.alerts) + len(self.closed_ids)
        if number >= self.alert_count_max or self.choices.one_in(6):
            if self.alerts or self.closed_ids:
                alert_id = self.choices.pick([*self.alerts, *self.closed_ids])
                known = self.alerts.get(alert_id)
                self._write_revision("publish", self._edited(known) if known else self._new_alert(alert_id))
            return
        self._write_revision("publish", self._new_alert(f"走失-{number}" if number % 3 == 2 else f"alert-{number}"))

    def add_update(self) -> None:
        """An edit of a known alert; rarely an update of one that is closed or was never published."""
        if self.choices.one_in(15):
            self.write(AlertRevision("update", self._new_alert(self.choices.pick(["never", *self.closed_ids])), (0, 0)))
        elif self.alerts:
            alert = self.alerts[self.choices.pick(list(self.alerts))]
            self._write_revision("update", self._edited(alert))

    def add_close(self) -> None:
        alert_ids = list(self.alerts) or ["unheard-of"]
        alert_id = self.choices.pick(alert_ids)
        if self.choices.one_in(10):
            alert_id = self.choices.pick([*self.closed_ids, "unheard-of", "never"])
        known = self.alerts[alert_id].revision if alert_id in self.alerts else 1
        revision = self.choices.pick([None, known + 1, known, known - 1, None])
        self.write(AlertClose(alert_id, revision, self.choices.pick(OUTCOMES), (0, 0)))
        if revision is None or revision > known:
            self.alerts.pop(alert_id, None)
            if alert_id not in self.closed_ids:
                self.closed_ids.append(alert_id)

    def _write_revision(self, event: str, alert: Alert) -> None:
        self.write(AlertRevision(event, alert, (0, 0)))
        known = self.alerts.get(alert.alert_id)
        if alert.alert_id not in self.closed_ids and (known is None or alert.revision > known.revision):
            self.alerts[alert.alert_id] = alert

    def _new_alert(self, alert_id: str) -> Alert:
        lat, lng = self.choices.pick(self.places)
        missing_since_ms = self._missing_since_ms()
        status, audience = self.choices.weighted(
            [
                (6, ("actual", None)),
                (1, ("actual", ("amap",))),
                (1, ("actual", ("baidu", LATE_PARTNER))),
                (1, ("exercise", ("amap",))),
                (1, ("exercise", ("amap", "baidu", LATE_PARTNER))),
            ]
        )
        revision = self.choices.weighted([(9, 1), (1, 4)])
        schedule = self._schedule()
        expires_at_ms = self._expires_at_ms(missing_since_ms)
        return Alert(alert_id, revision, lat, lng, missing_since_ms, schedule, expires_at_ms, status, audience)

    def _schedule(self) -> Schedule:
        return DEFAULT_SCHEDULE if self.choices.whole(0, 1) == 0 else self.choices.pick(SCHEDULES)

    def _missing_since_ms(self) -> int:
        age_ms = self.choices.weighted(
            [
                (3, 0),
                (3, self.choices.whole(0, 4 * HOUR_MS)),
                (2, self.choices.whole(1, 3) * HOUR_MS + self.choices.whole(-1, 1)),
                (1, -self.choices.whole(1, 90) * MINUTE_MS),
            ]
        )
        return self.clock_ms - age_ms

    def _expires_at_ms(self, missing_since_ms: int) -> int:
        from_now_ms = self.choices.pick([-DAY_MS, -1, 0, 1, MINUTE_MS, HOUR_MS, 2 * HOUR_MS])
        return self.choices.weighted(
            [
                (7, missing_since_ms + DEFAULT_EXPIRY_MS),
                (2, self.clock_ms + from_now_ms),
                (1, missing_since_ms + HOUR_MS),
            ]
        )

    def _edited(self, alert: Alert) -> Alert:
        """The next revision (or a stale one), with one or two things changed."""
        step = self.choices.weighted([(12, 1), (2, 3), (2, 0), (1, -1)])
        edited = replace(alert, revision=alert.revision + step)
        for _ in range(self.choices.whole(1, 2)):
            edited = self._with_a_change(edited)
        return replace(edited, expires_at_ms=max(edited.expires_at_ms, self.clock_ms - 29 * DAY_MS))

    def _with_a_change(self, alert: Alert) -> Alert:
        what = self.choices.pick(["move", "audience", "expiry", "schedule", "missing_since", "status", "nothing"])
        if what == "move":
            place = self.choices.pick(self.places)
            if self.choices.whole(0, 1):
                place = travel((alert.lat, alert.lng), self._bearing(), self.choices.whole(0, 300_000) / 1000)
            return replace(alert, lat=place[0], lng=place[1])
        if what == "audience":
            options: list[tuple[str, ...] | None] = [("amap",), ("baidu",), PARTNERS, (LATE_PARTNER, "amap")]
            return replace(
                alert, audience=self.choices.pick(options if alert.status == "exercise" else [None, *options])
            )
        if what == "expiry":
            extended_ms = max(alert.expires_at_ms, self.clock_ms) + DAY_MS
            expires_at_ms = self.choices.pick([extended_ms, self._expires_at_ms(alert.missing_since_ms)])
            return replace(alert, expires_at_ms=expires_at_ms)
        if what == "schedule":
            return replace(alert, schedule=self._schedule())
        if what == "missing_since":
            return replace(alert, missing_since_ms=self._missing_since_ms())
        if what == "status" and alert.audience is not None and self.choices.one_in(4):
            return replace(alert, status="actual" if alert.status == "exercise" else "exercise")
        return alert

    # ---- the rest

    def add_settings(self) -> None:
        """The late partner joins; after that, the same settings again."""
        if LATE_PARTNER not in self.settings.partners:
            self.settings = replace(self.settings, partners=(*self.settings.partners, LATE_PARTNER))
        self.write(self.settings)

    def add_tick(self) -> None:
        self.write(Tick())


def draft_log(
    choices: Choices,
    settings: Settings,
    *,
    event_count: int,
    device_count: int,
    alert_count_max: int,
    horizon_ms: int | None,
) -> Log:
    """A log from a source of decisions; `horizon_ms` None: one of HORIZONS_MS."""
    if horizon_ms is None:
        horizon_ms = choices.pick(HORIZONS_MS)
    places = [choices.pick(PLACES) for _ in range(choices.whole(1, 3))]
    devices = [(partner, device_id) for device_id in DEVICE_IDS for partner in (*PARTNERS, LATE_PARTNER)]
    while len(devices) < device_count:
        devices.append((PARTNERS[len(devices) % 2], f"phone-{len(devices):08d}"))
    devices = [devices[(choices.whole(0, 59) + 7 * index) % len(devices)] for index in range(device_count)]
    devices.append((PARTNERS[0], DEVICE_IDS[0]))  # so that there is always one that may ping
    draft = _Draft(choices, settings, places, devices, alert_count_max, horizon_ms)
    kinds = [
        (70, draft.add_ping),
        (10, draft.add_publish),
        (8, draft.add_update),
        (3, draft.add_close),
        (7, draft.add_tick),
        (2, draft.add_settings),
    ]
    for _ in range(event_count):
        draft.let_time_pass()
        choices.weighted(kinds)()
    return _finished(draft.events, settings)


def _finished(events: list[tuple[int, Event]], settings: Settings) -> Log:
    """Desk ids numbered in log order; pings moved off the edges of all circles."""
    edges = edges_of(event.alert for _, event in events if isinstance(event, AlertRevision))
    finished: list[tuple[int, Event]] = []
    for index, (at_ms, event) in enumerate(events):
        if isinstance(event, PingEvent):
            if abs(event.lat_e7) <= 900_000_000 and abs(event.lng_e7) <= 1_800_000_000:
                lat_e7, lng_e7 = nudged_clear_of(edges, (event.lat_e7, event.lng_e7))
                event = replace(event, lat_e7=lat_e7, lng_e7=lng_e7)
        elif isinstance(event, AlertRevision | AlertClose):
            event = replace(event, desk_id=(at_ms, index))
        finished.append((at_ms, event))
    return Log(settings, tuple(finished))


def generate_log(
    rng: np.random.Generator,
    *,
    event_count: int = 300,
    device_count: int = 12,
    alert_count_max: int = 12,
    horizon_ms: int | None = None,
    settings: Settings | None = None,
) -> Log:
    """An adversarial log from a seeded generator: the same seed gives the same log.

    `horizon_ms` is how far time may jump at once (None: one of HORIZONS_MS). For more open alerts than bits in a
    machine word: `event_count=3000, alert_count_max=300, horizon_ms=HORIZONS_MS[0]`.
    """
    return draft_log(
        from_numpy(rng),
        Settings(shard_count=4, partners=PARTNERS) if settings is None else settings,
        event_count=event_count,
        device_count=device_count,
        alert_count_max=alert_count_max,
        horizon_ms=horizon_ms,
    )


@st.composite
def logs(draw: st.DrawFn, event_count_max: int = 40, device_count: int = 5, alert_count_max: int = 4) -> Log:
    """Adversarial logs for Hypothesis, small enough to shrink."""
    return draft_log(
        from_hypothesis(draw),
        Settings(shard_count=4, partners=PARTNERS),
        event_count=draw(st.integers(1, event_count_max)),
        device_count=device_count,
        alert_count_max=alert_count_max,
        horizon_ms=None,
    )
