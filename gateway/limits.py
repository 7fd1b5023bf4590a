"""Token buckets: so much at once, so much in the long run. In this process alone; of two gateways each has its own.

bucket fills with `rate_per_s` up to `burst`; a request takes its cost, or is told when it may come again
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from flows.clock import CLOCK, Clock
from gateway.errors import Problem

BUCKETS_MAX = 100_000
"""About 20 MB. When there are more, the one that was asked least recently is forgotten: it is full again."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a bucket said."""

    allowed: bool
    limit: float
    """Its burst."""
    left: float
    wait_s: float
    """Until what was asked for is there; 0 if it was."""
    full_s: float
    """Until it is full again."""
    window_s: float
    """From empty to full."""

    def headers(self, name: str) -> dict[str, str]:
        """RateLimit-Policy and RateLimit (draft-ietf-httpapi-ratelimit-headers), and Retry-After if it was refused."""
        headers = {
            "RateLimit-Policy": f'"{name}";q={int(self.limit)};w={max(1, round(self.window_s))}',
            "RateLimit": f'"{name}";r={max(0, int(self.left))};t={max(0, round(self.full_s))}',
        }
        if not self.allowed:
            headers["Retry-After"] = str(max(1, -(-int(self.wait_s * 1000) // 1000)))
        return headers


class Buckets:
    """Many buckets by name. Thread-safe."""

    def __init__(self, clock: Clock = CLOCK, buckets_max: int = BUCKETS_MAX) -> None:
        self._clock = clock
        self._buckets_max = buckets_max
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Name -> what was left, and when."""

    def take(self, name: str, rate_per_s: float, burst: float, cost: float = 1.0) -> Taken:
        """Take `cost` if it is there. A cost above the burst passes when the bucket is full, and leaves a debt."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            left, at_s = self._buckets.get(name, (burst, now_s))
            left = min(burst, left + (now_s - at_s) * rate_per_s)
            needed = min(cost, burst)
            allowed = left >= needed
            if allowed:
                left -= cost
            self._buckets[name] = (left, now_s)
            self._buckets.move_to_end(name)
            if len(self._buckets) > self._buckets_max:
                self._buckets.popitem(last=False)
        wait_s = 0.0 if allowed else (needed - left) / rate_per_s
        return Taken(allowed, burst, left, wait_s, (burst - left) / rate_per_s, burst / rate_per_s)

    def check(self, name: str, shown: str, rate_per_s: float, burst: float, cost: float = 1.0) -> Taken:
        """`take`, or raises Problem 429. `shown`: the bucket's kind, as the caller sees it."""
        taken = self.take(name, rate_per_s, burst, cost)
        if not taken.allowed:
            raise Problem(
                429,
                "rate-limit",
                f"more than the {shown} limit of {rate_per_s:g}/s: come again in {taken.wait_s:.1f} s",
                headers=taken.headers(shown),
            )
        return taken


def address_bucket(address: str) -> str:
    """One bucket for what one subscriber can choose among: an IPv4 address, or an IPv6 /64."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "address:unknown"
    if isinstance(parsed, IPv6Address):
        if parsed.ipv4_mapped is not None:
            return f"address:{parsed.ipv4_mapped}"
        return f"address:{int(parsed) >> 64:x}/64"
    return f"address:{parsed}"
