"""Officers: publish, edit and close alerts, each at its moment, whether the last answer has come or not."""

from __future__ import annotations

import random
import time
from datetime import UTC, datetime
from typing import Any

import gevent
import orjson

from loadtest.load.http import Connection, NoAnswer, Refused
from loadtest.load.plan import Action
from loadtest.load.probes import WATCH_KM, WATCH_LAT, WATCH_LNG, WATCH_S
from loadtest.load.traffic import Traffic
from loadtest.places import Places, load_places

TRIES_MAX = 30
TRY_AGAIN_S = 1.0
WATCH = -1
"""Number of the alert whose ring the probes come into."""
CLOSED_BY = 0.97
"""Part of the run at which the watch alert is closed."""
DENSE_KM = 100.0


class Officers:
    """All officers of a run. `run` until their last action is answered."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._places: Places = load_places()
        self._chance = random.Random(traffic.spec.seed)
        self._alert_ids: dict[int, str] = {}
        self._closed_ids: set[str] = set()
        self._refused: set[int] = set()
        self._spots: dict[int, tuple[float, float]] = {}
        self._densest = self._places.densest_place(DENSE_KM)

    def run(self) -> None:
        """Everything that is planned; each action in a greenlet of its own, at its time."""
        traffic = self._traffic
        actions = [*traffic.spec.actions(), *self._watch_actions()]
        for number in sorted({action.number for action in actions}):
            self._spots[number] = self._spot(next(one for one in actions if one.number == number))
        traffic.begun.wait()
        traffic.desk_busy = True
        running = []
        for action in sorted(actions, key=lambda one: one.due_s):
            if traffic.ceased.wait(max(0.0, action.due_s - traffic.now_s())):
                break
            running.append(gevent.spawn(self._do, action))
        gevent.joinall(running, raise_error=True)
        # A run that was broken off leaves no alert open.
        now_s = traffic.now_s()
        closing = [gevent.spawn(self._close, alert_id, now_s) for alert_id in self._open_ids()]
        gevent.joinall(closing, raise_error=True)
        traffic.desk_busy = False

    def _open_ids(self) -> list[str]:
        return [alert_id for alert_id in self._alert_ids.values() if alert_id not in self._closed_ids]

    def _watch_actions(self) -> list[Action]:
        seconds = self._traffic.spec.seconds
        publish_s = min(WATCH_S, seconds / 20)
        return [
            Action(publish_s, "publish", WATCH, 0, publish_s, False),
            Action(CLOSED_BY * seconds, "close", WATCH, 0, publish_s, False),
        ]

    def _spot(self, action: Action) -> tuple[float, float]:
        if action.number == WATCH:
            return WATCH_LAT, WATCH_LNG
        if action.in_densest or self._traffic.spec.plays.in_one_city:
            return self._densest.lat, self._densest.lng
        (index,) = self._chance.choices(range(len(self._places)), weights=self._places.people.tolist())
        return float(self._places.lat[index]), float(self._places.lng[index])

    # ---- what they do

    def _do(self, action: Action) -> None:
        lat, lng = self._spots[action.number]
        if action.kind == "publish":
            self._publish(action, lat, lng)
            return
        while action.number not in self._alert_ids:  # its publish is still on its way
            if action.number in self._refused or self._traffic.ended.is_set() or self._traffic.ceased.is_set():
                return
            gevent.sleep(0.05)
        alert_id = self._alert_ids[action.number]
        if action.kind == "edit":
            body: dict[str, Any] = {"location": {"lat": lat + 0.05, "lng": lng}, "place": "东站"}
            self._ask("PATCH", f"/v1/alerts/{alert_id}", "/v1/alerts/{id}", body, action.due_s, (200, 202))
        else:
            self._close(alert_id, action.due_s)

    def _close(self, alert_id: str, due_s: float) -> None:
        body = {"outcome": "found", "category": "lost"}
        path, name = f"/v1/alerts/{alert_id}/close", "/v1/alerts/{id}/close"
        if self._ask("POST", path, name, body, due_s, (200, 202)) is not None:
            self._closed_ids.add(alert_id)
            self._know(alert_id, close_due_ms=self._ms(due_s), closed_ms=time.time() * 1000)

    def _publish(self, action: Action, lat: float, lng: float) -> None:
        missing_ms = self._ms(action.missing_since_s)
        body: dict[str, Any] = {
            "location": {"lat": lat, "lng": lng},
            "missing_since": datetime.fromtimestamp(missing_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "child": {"name": f"小明{action.number}", "sex": "male", "age": 6, "clothes": "红色外套"},
            "contact": "028-00000000",
        }
        if action.number == WATCH:
            body["schedule"] = [[None, WATCH_KM]]
        found = self._ask("POST", "/v1/alerts", "/v1/alerts", body, action.due_s, (201, 202))
        if found is None:
            self._refused.add(action.number)
        else:
            alert_id = str(found["alert_id"])
            self._know(
                alert_id,
                number=action.number,
                due_ms=self._ms(action.due_s),
                answered_ms=time.time() * 1000,
                is_watch=action.number == WATCH,
            )
            self._alert_ids[action.number] = alert_id

    def _know(self, alert_id: str, **facts: Any) -> None:
        self._traffic.recorder.published.setdefault(alert_id, {}).update(facts)

    def _ms(self, at_s: float) -> float:
        return self._traffic.begin_ms + at_s * 1000

    def _ask(
        self, method: str, path: str, name: str, body: dict[str, Any], due_s: float, good: tuple[int, ...]
    ) -> dict[str, Any] | None:
        """As an officer does: again until there is an answer, under one Idempotency-Key. None: it was not taken."""
        traffic = self._traffic
        assert traffic.deployment.officer is not None
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": f"{traffic.begin_ms:.0f}-{method}-{path}-{due_s:.6f}".replace("/", "."),
        }
        http = Connection(traffic.deployment.gateway, traffic.deployment.officer)
        try:
            for _ in range(TRIES_MAX):
                asked_s = traffic.now_s()
                try:
                    answer = http.ask(method, path, orjson.dumps(body), headers)
                except (Refused, NoAnswer) as problem:
                    traffic.fire(method, name, 1000 * (traffic.now_s() - asked_s), due_s, problem)
                    if isinstance(problem, Refused) and problem.status < 500 and problem.status != 429:
                        break
                    gevent.sleep(min(5.0, getattr(problem, "retry_after_s", None) or TRY_AGAIN_S))
                else:
                    assert answer.status in good, f"{method} {name} answered {answer.status}"
                    traffic.fire(method, name, 1000 * (traffic.now_s() - due_s), due_s, None, len(answer.body))
                    found: dict[str, Any] = orjson.loads(answer.body)
                    return found
            traffic.recorder.count("actions not taken", 1, due_s)
            return None
        finally:
            http.close()
