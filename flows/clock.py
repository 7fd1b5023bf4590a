"""The time as a process sees it: reader, writer and checkpointer are given it, so that a simulator can give another."""

from __future__ import annotations

import threading
import time


class Clock:
    """This machine's clocks."""

    def monotonic_s(self) -> float:
        """Seconds that never run backwards; from when is open."""
        return time.monotonic()

    def now_ms(self) -> float:
        """Milliseconds since 1970 (UTC), as far as this machine knows."""
        return time.time() * 1000

    def sleep(self, duration_s: float) -> None:
        """Let time pass."""
        time.sleep(duration_s)

    def wait(self, condition: threading.Condition, timeout_s: float) -> None:
        """Until the condition is notified, or for so long. The caller holds its lock."""
        condition.wait(timeout_s)


CLOCK = Clock()
