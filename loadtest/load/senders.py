"""Partners that send: whoever is free takes the next request that is due, and its latency counts from when it was due.

    due ──────── taken ── sent ─────────── answered
     │<────────────── latency ──────────────────>│      what a phone's owner waits for
     │           │<>│ late                              ours: we were slow, not the deployment

`late` counts from the later of *due* and *a connection became free*: that all connections were busy is the
deployment's doing (or there are too few of them: `connections busy` says so), and stays in the latency.
"""

from __future__ import annotations

import random
from queue import Empty

import gevent
import redis

from flows.log import LogWriter, read_settings
from flows.server import ServerRefused, connect, link_opener
from flows.wire import batch_of, decode_pings
from loadtest.load.frames import MEDIA_TYPES, Request
from loadtest.load.http import Connection, NoAnswer, Refused
from loadtest.load.traffic import Traffic, Turn

GIVE_UP_S = 45.0
"""A request that could not be brought in so long after it was due is given up, and its pings are counted as unsent."""
RETRY_FIRST_S, RETRY_S_MAX = 0.2, 5.0
LATE = "generator late"
END_POLL_S = 0.5
RESERVE = 4


class GivenUp(Exception):
    """A request was not taken in time."""


class Sender:
    """One connection, to the gateway and to the logs. `run` until the traffic ends."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._http = Connection(traffic.deployment.gateway)
        self._writer: LogWriter | None = None

    def run(self) -> None:
        """Send what is due, until the run ends."""
        traffic = self._traffic
        traffic.senders += 1
        try:
            traffic.begun.wait()
            while not traffic.ended.is_set():
                self._next()
        finally:
            traffic.senders -= 1
            self._http.close()
            self._close_writer()

    def _next(self) -> None:
        traffic = self._traffic
        free_s = traffic.now_s()
        try:
            turn = traffic.turns.get(timeout=END_POLL_S)
        except Empty:
            return
        traffic.waiting -= 1
        traffic.on_way += 1
        try:
            traffic.sleep_until(turn.at_s)
            sent_s = traffic.now_s()
            if turn.tries == 0:
                late_ms = 1000 * max(0.0, sent_s - max(turn.at_s, free_s))
                traffic.recorder.request(LATE, late_ms, turn.request.due_s)
                if free_s > turn.at_s:
                    traffic.recorder.count("connections busy", 1, turn.request.due_s)
            self._send(turn, sent_s)
        finally:
            traffic.on_way -= 1

    def _send(self, turn: Turn, sent_s: float) -> None:
        traffic, request = self._traffic, turn.request
        kind, name = ("LOG", request.name) if request.format == "log" else ("POST", request.name.removeprefix("POST "))
        try:
            (self._append if request.format == "log" else self._post)(request)
        except (Refused, NoAnswer) as problem:
            answered_s = traffic.now_s()
            traffic.fire(kind, name, 1000 * (answered_s - sent_s), request.due_s, problem)
            self._again(turn, problem, kind, name)
            return
        answered_s = traffic.now_s()
        traffic.fire(kind, name, 1000 * (answered_s - request.due_s), request.due_s, None, len(request.body))
        traffic.recorder.count("pings accepted", request.pings, answered_s)
        traffic.recorder.count("bytes sent", len(request.body), answered_s)

    def _again(self, turn: Turn, problem: Refused | NoAnswer, kind: str, name: str) -> None:
        """Try it again when it may be; or give it up."""
        traffic, request = self._traffic, turn.request
        refusal = isinstance(problem, Refused) and problem.status not in (408, 425, 429) and problem.status < 500
        pause_s = min(RETRY_S_MAX, RETRY_FIRST_S * 2.0**turn.tries)
        if isinstance(problem, Refused) and problem.retry_after_s is not None:
            pause_s = problem.retry_after_s
        again_s = traffic.now_s() + pause_s * random.uniform(1.0, 1.2)
        if refusal or again_s - request.due_s > GIVE_UP_S:
            waited_s = traffic.now_s() - request.due_s
            traffic.fire(kind, name, 1000 * waited_s, request.due_s, GivenUp(f"given up: {problem}"))
            return
        traffic.put(request, again_s, turn.tries + 1)

    # ---- the two ways

    def _post(self, request: Request) -> None:
        headers = {"Content-Type": MEDIA_TYPES[request.format]}
        if request.encoding is not None:
            headers["Content-Encoding"] = request.encoding
        key = self._traffic.deployment.partners[request.partner]
        self._http.ask("POST", "/v1/pings", request.body, headers, key)

    def _append(self, request: Request) -> None:
        """As a partner's program inside the network does. Raises NoAnswer, Refused."""
        try:
            self._opened_writer().append_pings(batch_of(decode_pings(request.body)))
        except redis.OutOfMemoryError:
            raise Refused(503, "server full") from None
        except (redis.RedisError, ServerRefused, OSError) as problem:
            self._close_writer()
            raise NoAnswer(f"no answer: {type(problem).__name__}") from problem

    def _opened_writer(self) -> LogWriter:
        if self._writer is None:
            assert self._traffic.deployment.valkey is not None, "the feeder makes log entries only where there is one"
            client = connect(self._traffic.deployment.valkey)
            settings = read_settings(client)
            assert settings is not None, "the feeder has read them"
            self._writer = LogWriter(link_opener(client, unsafe=True), settings)
        return self._writer

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def reserve(traffic: Traffic) -> None:
    """Senders of a worker that Locust has given none: its feeder's requests must go out all the same."""
    for _ in range(0 if traffic.senders else RESERVE):
        gevent.spawn(traffic.play, "a sender", lambda traffic: Sender(traffic).run())
