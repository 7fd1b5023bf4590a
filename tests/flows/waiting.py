"""Waiting for what another thread or process does, without sleeping longer than it takes; a server that is full."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import redis


def eventually(holds: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Return as soon as `holds()` is true. Fails after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"did not come true within {timeout_s} s"
        time.sleep(0.002)


@contextmanager
def memory_limit(client: redis.Redis, limit_bytes: int) -> Iterator[None]:
    """Another `maxmemory` of the server, for a while."""
    before = cast(str, client.config_get("maxmemory")["maxmemory"])
    client.config_set("maxmemory", limit_bytes)
    try:
        yield
    finally:
        client.config_set("maxmemory", before)
