"""Partners that read: take pushes, tell their owners (nobody), acknowledge. Some are slow, some die over them.

A reader stands for one partner's program. What it was given is known by its id, so that a second delivery is counted
as one, and by the ids of probes, so that a push is measured from the moment at which its ping was due.
"""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from typing import Any

import gevent
import msgpack
import orjson

from loadtest.load.http import ANSWER_TIMEOUT_S, Connection, NoAnswer, Refused
from loadtest.load.probes import due_ms_of
from loadtest.load.traffic import Traffic

ENTRIES_MAX = 500
WAIT_S = 5.0
ACK_IDS_MAX = 500
REMEMBERED = 200_000
SLOW_ENTRIES, SLOW_S = 5, 1.0
"""A slow program: so few at a time, and so long over them."""
TROUBLE_S = 1.0
HOUR_SLACK_S = 0.005
"""A ring grows at the hour itself; the hour is written in ms."""


class Reader:
    """One partner's program."""

    def __init__(self, traffic: Traffic, partner: str, key: str, seed: int) -> None:
        self._traffic, self._partner, self._key = traffic, partner, key
        self._chance = random.Random(seed)
        self._http = self._opened()
        self._is_slow = partner in traffic.spec.plays.slow_partners
        self._dies = partner in traffic.spec.plays.dying_partners
        hours = [wave.hour_at for wave in traffic.spec.plays.waves if wave.hour_at is not None]
        self._hour_s = hours[0] * traffic.spec.seconds if hours else None
        """When rings grow, on the run's clock."""
        self._seen: OrderedDict[str, None] = OrderedDict()

    def _opened(self) -> Connection:
        return Connection(self._traffic.deployment.gateway, self._key, WAIT_S + ANSWER_TIMEOUT_S)

    def run(self) -> None:
        """Read until the run ends."""
        self._traffic.begun.wait()
        while not self._traffic.ended.is_set():
            try:
                self._round()
            except (Refused, NoAnswer) as problem:
                self._traffic.fire("GET", "/v1/pushes", 0.0, self._traffic.now_s(), problem)
                gevent.sleep(max(TROUBLE_S, getattr(problem, "retry_after_s", None) or 0.0))
        self._http.close()

    def _round(self) -> None:
        traffic = self._traffic
        most = SLOW_ENTRIES if self._is_slow else ENTRIES_MAX
        path = f"/v1/pushes?max={most}&wait={WAIT_S:g}"
        answer = self._http.ask("GET", path, headers={"Accept": "application/msgpack"})
        if not answer.body:
            return
        pushes = msgpack.unpackb(answer.body)["pushes"]
        now_ms = time.time() * 1000
        for push in pushes:
            self._taken(push, now_ms)
        if not pushes:
            return
        if self._dies and self._chance.random() < traffic.spec.plays.dying:
            self._http.close()
            self._http = self._opened()  # the next one
            return
        if self._is_slow:
            gevent.sleep(SLOW_S)
        self._acknowledge([push["id"] for push in pushes])

    def _taken(self, push: dict[str, Any], now_ms: float) -> None:
        traffic, devices = self._traffic, push["device_ids"]
        at_s = (now_ms - traffic.begin_ms) / 1000
        if push["id"] in self._seen:
            traffic.recorder.count("delivered again", 1, at_s)
            return
        self._seen[push["id"]] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        traffic.recorder.count("devices told", len(devices), at_s)
        shard, _, entry = push["id"].split(":")
        entry_ms, _, sequence = entry.partition("-")
        cause = int(entry_ms), int(sequence) >> 24
        if self._is_slow:
            return  # its own slowness is no news
        traffic.recorder.pushed((push["alert_id"], push["kind"], int(shard[1:])), cause, len(devices), now_ms)
        decided_s = (push["at"] - traffic.begin_ms) / 1000
        traffic.fire("E2E", "decided to taken", now_ms - push["at"], decided_s)
        if self._hour_s is not None and abs(decided_s - self._hour_s) < HOUR_SLACK_S:
            traffic.fire("E2E", "hour to push", now_ms - push["at"], decided_s)
        if push["kind"] == "alert":
            for device_id in devices:
                if due_ms := due_ms_of(device_id):
                    due_s = (due_ms - traffic.begin_ms) / 1000
                    traffic.fire("E2E", "ping to push", now_ms - due_ms, due_s)

    def _acknowledge(self, ids: list[str]) -> None:
        traffic = self._traffic
        for start in range(0, len(ids), ACK_IDS_MAX):
            asked_s = traffic.now_s()
            body = orjson.dumps({"ids": ids[start : start + ACK_IDS_MAX]})
            try:
                self._http.ask("POST", "/v1/pushes/ack", body, {"Content-Type": "application/json"})
                failure: Exception | None = None
            except (Refused, NoAnswer) as problem:
                failure = problem  # they come again, under ids that are known
            traffic.fire("POST", "/v1/pushes/ack", 1000 * (traffic.now_s() - asked_s), asked_s, failure)


def read_all(traffic: Traffic, seed: int) -> None:
    """One program for every partner, until the run ends."""
    readers = [
        gevent.spawn(Reader(traffic, partner, key, seed * 1000 + number).run)
        for number, (partner, key) in enumerate(traffic.deployment.partners.items())
    ]
    try:
        gevent.joinall(readers, raise_error=True)
    finally:
        gevent.killall(readers)
