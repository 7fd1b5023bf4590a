"""The time of a simulated process: it moves when the world says so, and never by itself."""

from __future__ import annotations

import threading
from collections.abc import Callable

from flows.clock import Clock


class SimulatedClock(Clock):
    """`now_ms`: the world's time. `let_others_run(ms)`: this process waits so long; others run meanwhile."""

    def __init__(self, now_ms: Callable[[], int], let_others_run: Callable[[float], None], ahead_ms: int = 0) -> None:
        self._now_ms = now_ms
        self._let_others_run = let_others_run
        self._ahead_ms = ahead_ms
        """What this machine's clock is off."""

    def monotonic_s(self) -> float:
        return self._now_ms() / 1000

    def now_ms(self) -> float:
        return self._now_ms() + self._ahead_ms

    def sleep(self, duration_s: float) -> None:
        if duration_s > 0:
            self._let_others_run(1000 * duration_s)

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        # Nobody else holds the lock: a wait would give it up, and one thread plays all.
        if timeout_s > 0:
            self._let_others_run(1000 * timeout_s)
