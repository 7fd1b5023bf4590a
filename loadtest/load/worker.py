"""A Locust process that has users: hears from the conductor, holds the traffic, sends what it has seen.

    prepare {spec, deployment, index, count} -> Traffic; begin {begin_ms}; cease {}; finish {}
    every second: seen {record, filled, known, idle, problem}

Locust calls listeners of messages from its own greenlets; alone (no workers), it hands them over in the process.
"""

from __future__ import annotations

import logging
from typing import Any

import gevent
from gevent.event import Event

from loadtest.load.deployment import Deployment
from loadtest.load.senders import reserve
from loadtest.load.spec import RunSpec
from loadtest.load.traffic import Traffic

logger = logging.getLogger(__name__)

PREPARE, BEGIN, CEASE, FINISH, SEEN = (f"tuanyuan-{name}" for name in ("prepare", "begin", "cease", "finish", "seen"))
SEEN_EVERY_S = 1.0


class Worker:
    """Of one process; lives as long as it does, through any number of runs."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment
        self.traffic: Traffic | None = None
        self._ready = Event()
        self._telling: Any = None
        for kind, listener in (
            (PREPARE, self._prepare),
            (BEGIN, self._begin),
            (CEASE, self._cease),
            (FINISH, self._finish),
        ):
            environment.runner.register_message(kind, listener)

    def wait(self) -> Traffic:
        """For users: the traffic of the run that begins, or goes on."""
        self._ready.wait()
        assert self.traffic is not None
        return self.traffic

    def _prepare(self, environment: Any, msg: Any, **_: object) -> None:
        self.end()
        fields = msg.data
        spec, deployment = RunSpec.from_json(fields["spec"]), Deployment.from_json(fields["deployment"])
        self.traffic = Traffic(environment, spec, deployment, fields["index"], fields["count"])
        self._ready.set()
        self._telling = gevent.spawn(self._tell)

    def _begin(self, environment: Any, msg: Any, **_: object) -> None:
        if self.traffic is not None:
            self.traffic.begin(msg.data["begin_ms"])
            reserve(self.traffic)

    def _cease(self, environment: Any, msg: Any, **_: object) -> None:
        """No more requests; those that are on their way are waited for."""
        if self.traffic is not None:
            self.traffic.cease()

    def _finish(self, environment: Any, msg: Any, **_: object) -> None:
        """Say the last, and stop."""
        traffic = self.traffic
        if traffic is not None and not traffic.ended.is_set():
            traffic.end()
            self._say(traffic, True)

    def end(self) -> None:
        """The run is over, whoever says so."""
        if self.traffic is not None and not self.traffic.ended.is_set():
            self.traffic.end()
        self._ready.clear()
        if self._telling is not None:
            self._telling.kill()
            self._telling = None

    def _tell(self) -> None:
        traffic = self.traffic
        assert traffic is not None
        while not traffic.ended.wait(SEEN_EVERY_S):
            self._say(traffic, False)

    def _say(self, traffic: Traffic, is_last: bool) -> None:
        seen = {
            "index": traffic.index,
            "record": traffic.recorder.take(),
            "filled": traffic.filled.is_set(),
            "known": traffic.known,
            "idle": traffic.idle,
            "problem": traffic.problem,
            "last": is_last,
        }
        self._environment.runner.send_message(SEEN, seen)
