"""Waiting for what another thread or process does, without sleeping longer than it takes."""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Return as soon as `holds()` is true. Fails after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"did not come true within {timeout_s} s"
        time.sleep(0.002)
