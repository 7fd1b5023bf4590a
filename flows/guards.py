"""The guards of a process: is the server's clock ours, has it room, does it still keep what it acknowledges?

    guard thread, one link of its own, once a second
        TIME          clock     more than 2 s off: alarm; more than 30 s: no appends (a jump would grow rings early)
        INFO memory   memory    above 70 % of maxmemory: no pings, so that pushes, ticks and alert events keep room
        GET           held      no pings either while a supervisor says so, of its disk
        CONFIG GET    settings  every 5 s and at every connect: not what we demand: every link is broken, and the next
                                one refused, until it is again; or, with --unsafe-server, said in every log line

Whoever appends asks first: `check_append` (ticks, copies of alert events) or `check_pings`. Both refuse while nothing
is known: before the first answer, and when the last one is too old, say because this process itself stood still.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import cast

import redis

from flows.clock import CLOCK, Clock
from flows.log_lines import say_unsafe
from flows.metrics import METRICS, Metrics
from flows.server import Link, ServerRefused, memory_of, settings_faults, worth_a_line

logger = logging.getLogger(__name__)

CLOCK_ALARM_MS = 2_000
CLOCK_REFUSE_MS = 30_000
MEMORY_REFUSE_SHARE = 0.70
MEMORY_RESUME_SHARE = 0.65
"""Below the limit by a little, so that pings do not go on and off with every trim."""
INTERVAL_S = 1.0
SETTINGS_INTERVAL_S = 5.0
STALE_S = 10.0
"""What was known of the server this long ago is not known any more."""
GUARD_TIMEOUT_S = 3.0
"""For an answer to the guard: an alarm has to come within 10 s of its cause."""
PINGS_HELD_KEY = "pings:{held}"
"""Why pings must wait, by word of whoever knows (`flows.supervisor`, of the disk); expires by itself."""
RETRY_AFTER_S = 1.0
"""When a sender of pings may ask again: the guard looks once a second."""


class AppendsRefused(Exception):
    """Nothing may be appended now. The message says why; it goes by itself: try again later."""


class PingsRefused(AppendsRefused):
    """No pings now, so that pushes keep room. A gateway answers 503 with Retry-After: `retry_after_s`."""

    retry_after_s = RETRY_AFTER_S


class ClockGuard:
    """Compares the server's clock with ours. Plain arithmetic: all times are arguments."""

    def __init__(self) -> None:
        self.offset_ms = 0.0
        """Server's clock minus ours."""
        self._certain_ms = 0.0
        self._seen_at_s: float | None = None

    def observe(self, server_ms: float, received_ms: float, round_trip_s: float, now_s: float) -> None:
        """What the server's clock said: `received_ms` by our clock, `round_trip_s` after it was asked, at `now_s` of a
        clock that never jumps. It said so at some moment of the round trip, so half of that is uncertain.
        """
        half_ms = 500 * round_trip_s
        self.offset_ms = server_ms - (received_ms - half_ms)
        self._certain_ms = max(0.0, abs(self.offset_ms) - half_ms)
        self._seen_at_s = now_s

    def alarm(self) -> str | None:
        """What to raise an alarm about, if anything."""
        return self._words() if self._certain_ms > CLOCK_ALARM_MS else None

    def refusal(self, now_s: float) -> str | None:
        """Why nothing may be appended, or None."""
        if self._seen_at_s is None:
            return "the server's clock has not been compared with ours yet"
        if now_s - self._seen_at_s > STALE_S:
            return f"the server's clock was last compared with ours {now_s - self._seen_at_s:.0f} s ago"
        return self._words() if self._certain_ms > CLOCK_REFUSE_MS else None

    def _words(self) -> str:
        side = "ahead of" if self.offset_ms > 0 else "behind"
        return (
            f"the server's clock is {abs(self.offset_ms) / 1000:.1f} s {side} this process's; "
            f"more than {CLOCK_REFUSE_MS // 1000} s, and nothing is appended"
        )


class MemoryGuard:
    """Whether pings still have room."""

    def __init__(self) -> None:
        self._refuses = False
        self._share = 0.0

    def observe(self, used_bytes: int, max_bytes: int) -> None:
        """`max_bytes` 0: the server has no limit, and pings are never refused."""
        self._share = used_bytes / max_bytes if max_bytes else 0.0
        self._refuses = self._share > (MEMORY_RESUME_SHARE if self._refuses else MEMORY_REFUSE_SHARE)

    def refusal(self) -> str | None:
        """Why no ping may be appended, or None."""
        if not self._refuses:
            return None
        return (
            f"the server's memory is {100 * self._share:.0f} % full; pings wait above {MEMORY_REFUSE_SHARE:.0%} "
            f"until it is below {MEMORY_RESUME_SHARE:.0%}"
        )


class Guards:
    """All guards of one process, and the opener of its links. Thread-safe.

        guards = Guards(client, config.unsafe_server)
        guards.start()                       or, for a moment's question, guards.observe()
        LogReader(guards.open_link, ...)     links that are broken when the server's settings are not right any more
        guards.check_pings()                 ahead of every batch

    Alarms: server_down, clock_offset, memory, unsafe_server.
    """

    def __init__(
        self,
        client: redis.Redis,
        unsafe: bool = False,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        interval_s: float = INTERVAL_S,
    ) -> None:
        """`unsafe`: go on with a server whose settings are not what we demand, and say so in every line."""
        self._client = client
        self._unsafe = unsafe
        self._metrics = metrics
        self._clock = clock
        self._interval_s = interval_s
        self._clock_guard = ClockGuard()
        self._memory_guard = MemoryGuard()
        self._held: str | None = None
        self._faults: list[str] = []
        self._settings_at_s = float("-inf")
        self._run_id: str | None = None
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._failures = 0
        self._warned_unlimited = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="guards", daemon=True)

    # --- asked by whoever writes ------------------------------------------------------------------------------------

    def appends_refused(self) -> str | None:
        """Why nothing may be appended to a log now, or None."""
        if (reason := self._settings_refusal()) is not None:
            return reason
        return self._clock_guard.refusal(self._clock.monotonic_s())

    def check_append(self) -> None:
        """Raises AppendsRefused."""
        if (reason := self.appends_refused()) is not None:
            raise AppendsRefused(f"nothing is appended now: {reason}")

    def check_durable(self) -> None:
        """Raises AppendsRefused if the server may lose what it acknowledges.

        For the desk: what an officer is told is done must be on disk, while a clock that is off holds up only the
        copies to the logs.
        """
        if (reason := self._settings_refusal()) is not None:
            raise AppendsRefused(f"nothing is acknowledged now: {reason}")

    def _settings_refusal(self) -> str | None:
        return self._faults[0] if self._faults and not self._unsafe else None

    def check_pings(self) -> None:
        """Raises AppendsRefused; PingsRefused if only pings have to wait."""
        self.check_append()
        if (reason := self._memory_guard.refusal() or self._held) is not None:
            raise PingsRefused(f"no pings are taken now: {reason}")

    def open_link(self) -> Link:
        """A link to the server, which breaks when the server does not keep its promise any more. Raises as `Link`."""
        link = Link(self._client, self._unsafe, clock=self._clock)
        with self._lock:
            self._links.add(link)
        return link

    # --- the thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Look now, and once a second from now on."""
        self.look()
        self._thread.start()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Stop looking."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._close()

    def observe(self) -> None:
        """One look at the server. Raises redis.RedisError, ServerRefused (a server that tells no run id)."""
        if self._link is None:
            self._link = Link(self._client, unsafe=True, answer_timeout_s=GUARD_TIMEOUT_S, clock=self._clock)
            self._new_settings(self._link.faults)
            if self._link.run_id != self._run_id:
                self._metrics.count("server_runs_total")
                self._run_id = self._link.run_id
        link, clock = self._link, self._clock
        asked_s = clock.monotonic_s()
        seconds, microseconds = cast(list[bytes], link.ask("TIME"))
        received_ms, now_s = clock.now_ms(), clock.monotonic_s()
        server_ms = int(seconds) * 1000 + int(microseconds) / 1000
        self._clock_guard.observe(server_ms, received_ms, now_s - asked_s, now_s)
        self._metrics.gauge("clock_offset_ms", self._clock_guard.offset_ms)
        self._metrics.alarms.put("clock_offset", self._clock_guard.alarm())
        self._new_memory(*memory_of(link))
        held = cast("bytes | None", link.ask("GET", PINGS_HELD_KEY))
        self._held = None if held is None else held.decode(errors="replace")
        if now_s - self._settings_at_s >= SETTINGS_INTERVAL_S:
            self._new_settings(settings_faults(link))
        self._failures = 0
        self._metrics.alarms.clear("server_down")

    def _new_memory(self, used_bytes: int, max_bytes: int) -> None:
        self._memory_guard.observe(used_bytes, max_bytes)
        self._metrics.gauge("server_memory_bytes", used_bytes)
        self._metrics.gauge("server_memory_max_bytes", max_bytes)
        self._metrics.alarms.put("memory", self._memory_guard.refusal())
        if not max_bytes and not self._warned_unlimited:
            self._warned_unlimited = True
            logger.warning("the server has no maxmemory: pings are not held back before the machine's memory is full")

    def _new_settings(self, faults: list[str]) -> None:
        self._settings_at_s = self._clock.monotonic_s()
        had_faults, self._faults = bool(self._faults), faults
        self._metrics.gauge("unsafe_server", int(bool(faults)))
        if self._unsafe:
            say_unsafe(bool(faults))
            if faults and not had_faults:
                logger.warning("goes on with a server that may lose what it acknowledged: %s", "; ".join(faults))
            return
        self._metrics.alarms.put("unsafe_server", "; ".join(faults) or None)
        if faults:
            with self._lock:
                links = list(self._links)
            for link in links:
                link.close()  # whoever uses it opens another one, which is refused for as long as this lasts

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            self.look()

    def look(self) -> None:
        """One look, whether the server answers or not. Public for simulators, which call it instead of `start`."""
        try:
            self.observe()
        except (redis.RedisError, ServerRefused) as error:
            self._close()
            if self._stopping.is_set():
                return
            self._failures += 1
            self._metrics.alarms.set("server_down", f"the server does not answer: {error}")
            if worth_a_line(self._failures):
                logger.warning("the server cannot be looked at (try %d): %s", self._failures, error)

    def _close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


def refused_now(client: redis.Redis) -> str | None:
    """Why nothing may be appended to a log at this moment; for commands that append once and end.

    The server's settings are left to the flow. Raises redis.RedisError, ServerRefused.
    """
    guards = Guards(client, unsafe=True, metrics=Metrics())
    try:
        guards.observe()
        return guards.appends_refused()
    finally:
        guards.stop()
