"""What `tuanyuan top` shows, read from the server over and over, whether it answers or not.

"top" thread   once a second: figures of all processes, open alerts ──> Look     the screen draws the newest
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import redis

from flows.desk import Desk
from flows.log import SettingsMismatch, read_settings
from flows.metrics import Stats, read_stats_at
from flows.view_figures import WINDOW_S, ViewFigures, view_figures
from gateway.view_alerts import OpenAlerts
from tuanyuan.connection import NoServer

INTERVAL_S = 1.0
STALE_S = 2.5
"""What was seen this long ago is called stale."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen last, and whether it can still be seen."""

    figures: ViewFigures | None = None
    alerts: tuple[Mapping[str, Any], ...] = ()
    """As `gateway.view_models.ViewAlert`."""
    seen_s: float = float("-inf")
    """When, by the clock that never jumps."""
    problem: str | None = None
    """Why it could not be seen since."""

    def age_s(self, now_s: float) -> float:
        """How old it is; infinity if nothing was seen yet."""
        return now_s - self.seen_s

    def is_stale(self, now_s: float) -> bool:
        """Whether it may not be so any more."""
        return self.age_s(now_s) > STALE_S

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        figures = self.figures or ViewFigures(0)
        return {
            "at_ms": figures.at_ms,
            "figures": dict(figures.figures),
            "alarms": [alarm._asdict() for alarm in figures.alarms],
            "alerts": list(self.alerts),
        }


class Looker:
    """Looks by itself from `start` on, or once with `look`. A server that is away is looked for again and again."""

    def __init__(self, open_client: Callable[[], redis.Redis]) -> None:
        """`open_client` raises NoServer or redis.RedisError if there is none; it is called again after a failure."""
        self._open_client = open_client
        self._client: redis.Redis | None = None
        self._alerts: OpenAlerts | None = None
        self._samples: deque[tuple[int, Stats]] = deque()
        self.newest = Look()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="top", daemon=True)

    def start(self) -> None:
        """Look now, and once a second."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more. A look that hangs is left to itself."""
        self._stopping.set()
        self._thread.join(0.2)

    def look(self) -> None:
        """One look. Raises NoServer, redis.RedisError, SettingsMismatch."""
        if self._client is None:
            self._client = self._open_client()
            self._alerts = None
        client = self._client
        stats, at_ms = read_stats_at(client)
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= at_ms - 1000 * WINDOW_S + 200:
            samples.popleft()
        if samples and not 0 <= at_ms - samples[0][0] <= 4000 * WINDOW_S:
            samples.clear()
        figures = view_figures(samples[0][1] if samples else Stats(), stats, at_ms)
        samples.append((at_ms, stats))
        if self._alerts is None:
            self._alerts = OpenAlerts(client, Desk(client))
        settings = read_settings(client)
        if settings is not None:
            self._alerts.look(at_ms)
            self._alerts.count(settings, time.monotonic())
        alerts = tuple(view for _, view in self._alerts.views(at_ms))
        self.newest = Look(figures, alerts, time.monotonic())

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.look()
            except (NoServer, redis.RedisError, SettingsMismatch, OSError) as problem:
                last = self.newest
                self.newest = Look(last.figures, last.alerts, last.seen_s, str(problem) or type(problem).__name__)
                if self._client is not None:
                    self._client.close()
                    self._client = None
            self._stopping.wait(INTERVAL_S)
