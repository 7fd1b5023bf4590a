"""One sampler of a gateway process, shared by all who look: figures each second, alerts, maps, 24 hours of history.

    "view" thread   every 5 s, and every second while somebody looks:
                    stats of all processes ─> figures ─> bytes ─┐
                    desk, tallies ─> alerts by jurisdiction ────┼─> latest ─> listeners: coroutines that send it
                    density, twice a minute ─> map ─────────────┘

While nobody looks, a step of the history is made every 5 s, and the map is kept going (16 ms a minute: else whoever
opens the page would see none for a minute). A listener has no queue: it sends the newest of each kind, so one that is
slow misses some, and holds nothing up.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
import redis

from flows.alarms import Alarm
from flows.density import read_density
from flows.metrics import Stats, read_stats_at
from flows.server import worth_a_line
from flows.view_figures import WINDOW_S, ViewFigures, view_figures
from gateway.errors import Problem
from gateway.runtime import Gateway
from gateway.view_alerts import OpenAlerts
from gateway.view_history import STEP_MS, History, HistoryView, write_step
from gateway.view_map import LOOK_S, DelayedMaps, Document
from gateway.view_metrics import CounterSums

logger = logging.getLogger(__name__)

SAMPLE_S = 1.0
ALERTS_EVERY_S = 2.0
"""While somebody looks."""
ALERTS_SENT_EVERY_S = 10.0
"""Also when nothing has changed."""
HISTORY_FRESH_S = 2.0
"""Whoever asks for the same span within this time gets the same bytes."""
DOCUMENTS_MAX = 20
LISTENERS_MAX = 100
"""Of one gateway."""
LISTENERS_OF_ONE_MAX = 8
"""Of one account."""


@dataclass(slots=True, eq=False)
class Listener:
    """One who looks: set whenever there is something new."""

    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Latest:
    """What stands to be sent; each kind with a number that grows with it."""

    figures: bytes = b""
    figures_of_parts: bytes = b""
    """For those whose jurisdiction is a part of the country: without alarms that name an alert."""
    figures_at_ms: int = 0
    figures_number: int = 0
    alerts: list[tuple[str, bytes]] = field(default_factory=list)
    """Division and JSON object of each."""
    alerts_at_ms: int = 0
    alerts_number: int = 0
    map_at_ms: int | None = None
    map_number: int = 0


class ViewHub:
    """The sampler and its listeners. `step` is one look; the thread calls it."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._client = gateway.client
        self._clock = gateway.clock
        self._alerts = OpenAlerts(gateway.client, gateway.desk)
        self.maps = DelayedMaps()
        self.history = History(gateway.client)
        self.counters = CounterSums()
        self.latest = Latest()
        self.figures: ViewFigures | None = None
        self._samples: deque[tuple[int, Stats]] = deque()
        self._step_ms = 0
        self._looked_s = 0.0
        self._documents_lock = threading.Lock()
        self._documents: dict[int, tuple[float, Document]] = {}
        self._alerts_due_s = self._alerts_sent_due_s = self._density_due_s = float("-inf")
        self._lock = threading.Lock()
        self._listeners: dict[Listener, str] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="view", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End it; whoever still looks is woken, and sees that the gateway is stopping."""
        self._stopping = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(10)
        self._tell()

    # --- listeners --------------------------------------------------------------------------------------------------

    def listen(self, actor: str, loop: asyncio.AbstractEventLoop) -> Listener:
        """Be told of what is new, until `leave`. Raises Problem 429, 503 if there are too many."""
        listener = Listener(loop)
        with self._lock:
            if sum(name == actor for name in self._listeners.values()) >= LISTENERS_OF_ONE_MAX:
                raise Problem(
                    429,
                    "too-many-streams",
                    f"at most {LISTENERS_OF_ONE_MAX} streams of one account at a gateway: close one",
                    headers={"Retry-After": "5"},
                )
            if len(self._listeners) >= LISTENERS_MAX:
                raise Problem(
                    503,
                    "too-many-streams",
                    f"at most {LISTENERS_MAX} streams at a gateway: take another one",
                    headers={"Retry-After": "10"},
                )
            self._listeners[listener] = actor
            self._gateway.metrics.gauge("view_listeners", len(self._listeners))
        self._wake.set()
        return listener

    def leave(self, listener: Listener) -> None:
        """The end of one who looked."""
        with self._lock:
            self._listeners.pop(listener, None)
            self._gateway.metrics.gauge("view_listeners", len(self._listeners))

    def _tell(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            try:
                listener.loop.call_soon_threadsafe(listener.changed.set)
            except RuntimeError:
                logger.debug("the loop has ended before its listener")

    def now_ms(self) -> int:
        """The server's clock, as far as it can be told without asking; this machine's before the first look."""
        figures, now_s = self.figures, self._clock.monotonic_s()
        if figures is None:
            return round(self._clock.now_ms())
        return figures.at_ms + round(1000 * (now_s - self._looked_s))

    def history_document(self, minutes: int) -> Document:
        """The history of so many minutes. Raises redis.RedisError."""
        with self._documents_lock:
            now_s = self._clock.monotonic_s()
            known = self._documents.get(minutes)
            if known is not None and now_s - known[0] < HISTORY_FRESH_S:
                return known[1]
            document = history_document(self.history.view(minutes, self.now_ms()))
            if len(self._documents) >= DOCUMENTS_MAX:
                self._documents.clear()
            self._documents[minutes] = now_s, document
            return document

    # --- looking ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One look. Raises redis.RedisError: what was found before it stands."""
        started_s = time.perf_counter()
        with self._lock:
            is_watched = bool(self._listeners)
        stats, at_ms = read_stats_at(self._client)
        self._looked_s = self._clock.monotonic_s()
        self.counters.add(stats)
        figures = self.figures = view_figures(self._before(at_ms), stats, at_ms)
        self._samples.append((at_ms, stats))
        latest = self.latest
        latest.figures = figures_json(figures)
        latest.figures_of_parts = figures_json(without_alerts(figures))
        latest.figures_at_ms = at_ms
        latest.figures_number += 1
        self._tell()
        step_ms = at_ms // STEP_MS * STEP_MS
        is_step = step_ms > self._step_ms
        now_s = self._clock.monotonic_s()
        if is_step or (is_watched and now_s >= self._alerts_due_s):
            self._look_at_alerts(at_ms, now_s)
        if is_step:
            self._step_ms = step_ms
            write_step(self._client, step_ms, figures.figures)
            self._alerts.record(step_ms)
        self._look_at_map(at_ms, now_s)
        self._tell()
        self._gateway.metrics.observe("view_sample_ms", 1000 * (time.perf_counter() - started_s))

    def _before(self, at_ms: int) -> Stats:
        """The look to compare with: WINDOW_S ago, or the first one since; nothing at the very first."""
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= at_ms - 1000 * WINDOW_S + 200:
            samples.popleft()
        if samples and not 0 <= at_ms - samples[0][0] <= 4000 * WINDOW_S:
            samples.clear()  # the server was away, or its clock was set
        return samples[0][1] if samples else Stats()

    def _look_at_alerts(self, at_ms: int, now_s: float) -> None:
        self._alerts_due_s = now_s + ALERTS_EVERY_S
        try:
            settings = self._gateway.settings()
        except Problem:
            return  # there are no logs yet
        self._alerts.look(at_ms)
        self._alerts.count(settings, now_s)
        found = self._alerts.alerts_json(at_ms)
        latest = self.latest
        latest.alerts_at_ms = at_ms
        if found != latest.alerts or now_s >= self._alerts_sent_due_s:
            latest.alerts = found
            latest.alerts_number += 1
            self._alerts_sent_due_s = now_s + ALERTS_SENT_EVERY_S

    def _look_at_map(self, at_ms: int, now_s: float) -> None:
        if now_s >= self._density_due_s:
            self._density_due_s = now_s + LOOK_S
            try:
                self.maps.add(read_density(self._client, self._gateway.settings().shard_count))
            except Problem:
                return  # there are no logs yet
        map_at_ms = self.maps.shown(at_ms).at_ms
        if map_at_ms != self.latest.map_at_ms:
            self.latest.map_at_ms = map_at_ms
            self.latest.map_number += 1

    def _run(self) -> None:
        failures = 0
        while not self._stopping:
            try:
                self.step()
                failures = 0
            except redis.RedisError as error:
                failures += 1
                self._gateway.metrics.count("view_errors_total")
                if worth_a_line(failures):
                    logger.warning("the view cannot be kept up (try %d): %s", failures, error)
            except Exception:
                failures += 1
                self._gateway.metrics.count("view_errors_total")
                if worth_a_line(failures):
                    logger.exception("the view cannot be made (try %d)", failures)
            with self._lock:
                is_watched = bool(self._listeners)
            self._wake.wait(SAMPLE_S if is_watched or failures else self._until_step_s())
            self._wake.clear()

    def _until_step_s(self) -> float:
        """Until the next step of the history has begun, by this machine's clock: which is the server's, or nearly."""
        return (STEP_MS - self._clock.now_ms() % STEP_MS) / 1000 + 0.05


def figures_json(figures: ViewFigures) -> bytes:
    """The event `figures`, as `gateway.view_models.FiguresEvent` describes it."""
    return orjson.dumps(
        {
            "at_ms": figures.at_ms,
            "figures": {name: rounded(value) for name, value in figures.figures.items()},
            "alarms": [alarm_json(alarm) for alarm in figures.alarms],
        }
    )


def without_alerts(figures: ViewFigures) -> ViewFigures:
    """Figures for whoever may not see every alert: the others' are not named to them."""
    return replace(figures, alarms=tuple(alarm for alarm in figures.alarms if alarm.kind != "alert_moved"))


def alarm_json(alarm: Alarm) -> Mapping[str, Any]:
    """An alarm's kind, source and words."""
    return {"kind": alarm.kind, "source": alarm.source, "words": alarm.words}


def history_document(view: HistoryView) -> Document:
    """The bytes of `gateway.view_models.HistoryAnswer`; numbers to 4 digits, which is what a chart shows."""
    series = {name: [_point(value) for value in values.tolist()] for name, values in view.series.items()}
    return Document.of(orjson.dumps({"step_s": view.step_s, "at_ms": view.at_ms.tolist(), "series": series}))


def _point(value: float) -> float | None:
    return None if value != value else float(f"{value:.4g}")


def rounded(value: float) -> float:
    """To 6 digits: what is measured is not known better."""
    return float(f"{value:.6g}")


def start(gateway: Gateway) -> ViewHub:
    """Sample from now on."""
    hub = ViewHub(gateway)
    hub.start()
    return hub
