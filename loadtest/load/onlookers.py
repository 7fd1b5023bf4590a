"""Those who only look: operators with the page open, map apps that poll the public feed, each at moments of its own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import gevent

from loadtest.load.http import Connection, NoAnswer, Refused
from loadtest.load.plan import arrivals
from loadtest.load.traffic import Traffic

HEALTH_PER_S = 0.5
FEED_PER_S = 0.3
FEEDS = ("/feed/alerts.json", "/feed/alerts.geojson", "/feed/alerts.atom")
STREAM = "/v1/view/stream"
STREAM_AGAIN_S = 2.0
STREAM_TIMEOUT_S = 30.0
EVENT_END = b"\n\n"


def events(response: Any) -> Iterator[bytes]:
    """Server-Sent Events as they come: each as soon as it is whole. (`read` would wait for as many bytes as it may.)"""
    while event := bytes(response.readline(EVENT_END)):
        yield event


class Operator:
    """Watches the live view's stream, if there is one, and asks for health and readiness."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self._traffic, self._chance = traffic, random.Random(seed)

    def run(self) -> None:
        """Until the run ends."""
        self._traffic.begun.wait()
        watching = gevent.spawn(self._watch) if self._traffic.deployment.operator else None
        try:
            _poll(self._traffic, self._chance, HEALTH_PER_S, ("/healthz", "/readyz"))
        finally:
            if watching is not None:
                watching.kill()

    def _watch(self) -> None:
        traffic = self._traffic
        while not traffic.ended.is_set():
            http = Connection(traffic.deployment.gateway, traffic.deployment.operator, STREAM_TIMEOUT_S)
            asked_s = traffic.now_s()
            try:
                response = http.open("GET", STREAM, headers={"Accept": "text/event-stream"})
                is_first = True
                for chunk in events(response):
                    now_s = traffic.now_s()
                    if is_first:
                        traffic.fire(
                            "GET", f"{STREAM} (first event)", 1000 * (now_s - asked_s), asked_s, None, len(chunk)
                        )
                        is_first = False
                    traffic.recorder.count("view bytes", len(chunk), now_s)
            except Refused as problem:
                if problem.status == 404:
                    return  # a gateway without a live view
                traffic.fire("GET", STREAM, 1000 * (traffic.now_s() - asked_s), asked_s, problem)
            except Exception as problem:
                traffic.fire(
                    "GET", STREAM, 1000 * (traffic.now_s() - asked_s), asked_s, NoAnswer(type(problem).__name__)
                )
            finally:
                http.close()
            gevent.sleep(STREAM_AGAIN_S)


class MapApp:
    """Polls the feeds as they ask for it: with the ETag of the last answer."""

    def __init__(self, traffic: Traffic, seed: int) -> None:
        self._traffic, self._chance = traffic, random.Random(seed)

    def run(self) -> None:
        """Until the run ends."""
        self._traffic.begun.wait()
        _poll(self._traffic, self._chance, FEED_PER_S, FEEDS)


def _poll(traffic: Traffic, chance: random.Random, per_s: float, paths: tuple[str, ...]) -> None:
    """Ask for the paths in turn, at moments drawn beforehand; latencies count from those."""
    http = Connection(traffic.deployment.gateway)
    etags: dict[str, str] = {}
    try:
        for number, due_s in enumerate(arrivals(chance, per_s, 0.0, traffic.spec.seconds)):
            traffic.sleep_until(due_s)
            if traffic.ended.is_set():
                return
            path = paths[number % len(paths)]
            headers = {"If-None-Match": etags[path]} if path in etags else {}
            failure: Exception | None = None
            length = 0
            try:
                answer = http.ask("GET", path, headers=headers)
                length = len(answer.body)
                if etag := answer.headers.get("etag"):
                    etags[path] = etag
            except (Refused, NoAnswer) as problem:
                failure = problem
            traffic.fire("GET", path, 1000 * (traffic.now_s() - due_s), due_s, failure, length)
        traffic.ended.wait()
    finally:
        http.close()
