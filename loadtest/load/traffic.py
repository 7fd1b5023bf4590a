"""A worker's end of the load: its feeder, the requests it has made ahead, the run's clock, what has been seen.

    feeder ──socket──> due (a heap by time) ──> whoever of the senders is free takes the next one

One `Traffic` per Locust process that has users.
"""

from __future__ import annotations

import logging
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gevent
import psutil
from gevent.event import Event
from gevent.queue import PriorityQueue

from loadtest.load.deployment import Deployment
from loadtest.load.frames import Request, receive, send
from loadtest.load.processes import Process
from loadtest.load.recorder import Recorder
from loadtest.load.spec import RunSpec

logger = logging.getLogger(__name__)

LOAD_EVERY_S = 1.0
FEEDER_END_S = 5.0
FEEDER_DESCRIPTOR = 3
"""Of its socket, as it sees it."""


@dataclass(frozen=True, slots=True, order=True)
class Turn:
    """A request that is to be sent at a moment; of equal moments the one that came first."""

    at_s: float
    """On the run's clock: when it is due, or may be tried again."""
    number: int
    request: Request
    tries: int = 0


class Traffic:
    """Made when a run is prepared; `begin` starts its clock; `end` stops everything."""

    def __init__(self, environment: Any, spec: RunSpec, deployment: Deployment, index: int, count: int) -> None:
        self.environment, self.spec, self.deployment = environment, spec, deployment
        self.index, self.count = index, count
        self.recorder = Recorder()
        self.begun, self.ended, self.filled = Event(), Event(), Event()
        self.begin_ms = 0.0
        self.problem: str | None = None
        self.known = 0
        """Phones filled in so far."""
        self.turns: PriorityQueue[Turn] = PriorityQueue()
        self.waiting = 0
        """Requests made and not yet taken; those that wait for another try included."""
        self.on_way = 0
        self.all_made = False
        self.senders = 0
        self.desk_busy = False
        """Officers have not done all that they have to."""
        self._number = 0
        self.ceased = Event()
        self._feeder_load: dict[str, Any] = {}
        self._process, self._peer = self._start_feeder()
        self._greenlets = [gevent.spawn(self._listen), gevent.spawn(self._watch_self)]

    # ---- the clock

    def now_s(self) -> float:
        """Since the run began; negative before."""
        return time.time() - self.begin_ms / 1000

    def sleep_until(self, at_s: float) -> None:
        gevent.sleep(max(0.0, at_s - self.now_s()))

    def begin(self, begin_ms: float) -> None:
        """The moment, ms since 1970, at which the run's clock shows 0: the same for all workers."""
        self.begin_ms = begin_ms
        send(self._peer, {"begin_ms": begin_ms})
        self.begun.set()

    def cease(self) -> None:
        """No more pings are sent, whatever was due; officers close what they have published."""
        self.all_made = True
        self.ceased.set()
        while not self.turns.empty():
            self._drop(self.turns.get().request)
            self.waiting -= 1

    @property
    def idle(self) -> bool:
        """Everything that was due has been sent and answered, or given up."""
        return self.all_made and not (self.waiting or self.on_way or self.desk_busy)

    # ---- events

    def fire(
        self,
        kind: str,
        name: str,
        latency_ms: float,
        due_s: float,
        failure: BaseException | None = None,
        length: int = 0,
    ) -> None:
        """One request or end-to-end time, to Locust and to the record."""
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=latency_ms,
            response_length=length,
            exception=failure,
            context={},
            start_time=self.begin_ms / 1000 + due_s,
            url=None,
            response=None,
        )
        self.recorder.request(f"{kind} {name}", latency_ms, due_s, None if failure is None else str(failure))

    # ---- requests

    def put(self, request: Request, at_s: float, tries: int = 0) -> None:
        """To be sent at that moment; not after `cease`."""
        if self.ceased.is_set():
            self._drop(request)
            return
        self._number += 1
        self.waiting += 1
        self.turns.put(Turn(at_s, self._number, request, tries))

    def _drop(self, request: Request) -> None:
        """It is not due any more."""
        self.recorder.count("pings due", -request.pings, request.due_s)

    def fail(self, problem: str) -> None:
        """The run has not shown what it should; the first reason counts, and ends it."""
        self.problem = self.problem or problem

    def play(self, name: str, part: Callable[[Traffic], None]) -> None:
        """A user's part. Locust would only count what it raises, and begin the part anew."""
        try:
            part(self)
        except Exception as error:
            logger.exception("%s has failed", name)
            self.fail(f"{name}: {error!r}")

    # ---- the feeder

    def _start_feeder(self) -> tuple[Process, socket.socket]:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "loadtest.load.feeder", str(FEEDER_DESCRIPTOR)]
        process = Process(command, {FEEDER_DESCRIPTOR: theirs.fileno()})
        theirs.close()
        wanted = {
            "spec": self.spec.to_json(),
            "deployment": self.deployment.to_json(),
            "index": self.index,
            "count": self.count,
        }
        send(ours, wanted)
        return process, ours

    def _listen(self) -> None:
        try:
            while (frame := receive(self._peer)) is not None:
                self._heard(frame)
        except OSError as error:
            logger.debug("the feeder's socket: %s", error)
        except Exception as error:
            logger.exception("what the feeder says is not understood")
            self.fail(f"what the feeder says is not understood: {error!r}")
        if not self.all_made and not self.ended.is_set():
            self.fail("the process that makes requests has ended")
            self.all_made = True
            self.filled.set()

    def _heard(self, frame: dict[str, Any]) -> None:
        if "b" in frame:
            request = Request.of_frame(frame)
            self.recorder.count("pings due", request.pings, request.due_s)
            self.put(request, request.due_s)
        elif "problem" in frame:
            self.fail(str(frame["problem"]))
        elif "end" in frame:
            self.all_made = True
        elif "cpu_s" in frame:
            self._feeder_load = frame
        else:
            self.known = frame["known"]
            if "ready" in frame:
                self.filled.set()

    # ---- ourselves

    def _watch_self(self) -> None:
        own, feeder = psutil.Process(), psutil.Process(self._process.pid)
        before_s, before = time.monotonic(), _cpu_s(own, feeder)
        while not self.ended.wait(LOAD_EVERY_S):
            now_s, now = time.monotonic(), _cpu_s(own, feeder)
            if now is None or before is None:
                continue
            took_s = max(1e-3, now_s - before_s)
            self.recorder.loads.append(
                {
                    "at_s": round(self.now_s(), 2) if self.begun.is_set() else -1.0,
                    "cores": (now[0] - before[0]) / took_s,
                    "feeder_cores": max(0.0, now[1] - before[1]) / took_s,
                    "rss": own.memory_info().rss,
                    "ahead_s": float(self._feeder_load.get("ahead_s", 0.0)),
                    "waiting": self.waiting,
                }
            )
            before_s, before = now_s, now

    def end(self) -> None:
        """Stop: users, feeder, greenlets."""
        self.ended.set()
        self._peer.close()
        self._process.end(FEEDER_END_S)
        gevent.killall(self._greenlets)


def _cpu_s(own: psutil.Process, feeder: psutil.Process) -> tuple[float, float] | None:
    """CPU time of both, so far; a feeder that has ended used none. None: nothing can be read."""
    try:
        times = own.cpu_times()
        used_s = times.user + times.system
    except psutil.Error:
        return None
    try:
        times = feeder.cpu_times()
        return used_s, times.user + times.system
    except psutil.Error:
        return used_s, 0.0
