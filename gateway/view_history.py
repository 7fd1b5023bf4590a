"""24 hours of figures, a step of 5 seconds each: written by whichever gateway comes first, read by all.

    history:{view}          stream: <ms of the step>-1 -> digest of the names, f32 of each
    history-names:{view}    hash: digest -> names, for names hardly ever change

The server refuses a step that another gateway has written. A gateway that is asked keeps what it has read, 7 MB for
100 figures, and next time reads only what came since: so 24 hours cost 0.3 s once, and then some ms.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import numpy as np
import numpy.typing as npt
import redis

STEP_MS = 5_000
KEPT_MS = 24 * 3_600_000
MINUTES_MIN, MINUTES_MAX = 15, 1_440
POINTS_MAX = 300
HISTORY_KEY = "history:{view}"
NAMES_KEY = "history-names:{view}"
READ_AT_ONCE = 2_000
NAMES_MAX = 10_000
"""Names of one step: above, somebody has a great many partners or shards; what comes last is left out."""

F32 = npt.NDArray[np.float32]
TOO_SMALL = "equal or smaller"


def write_step(client: redis.Redis, step_ms: int, figures: Mapping[str, float]) -> bool:
    """Write a step, unless another gateway has; whether it was written. Raises redis.RedisError."""
    assert step_ms % STEP_MS == 0, f"a step begins at a multiple of {STEP_MS} ms, got {step_ms}"
    names = sorted(figures)[:NAMES_MAX]
    packed_names = cast(bytes, msgpack.packb(names))
    digest = hashlib.sha256(packed_names).digest()[:12]
    values = np.array([figures[name] for name in names], "<f4").tobytes()
    with client.pipeline(transaction=True) as pipeline:
        pipeline.hsetnx(NAMES_KEY, cast(Any, digest), cast(Any, packed_names))
        fields = {b"n": digest, b"v": values}
        pipeline.xadd(HISTORY_KEY, cast(Any, fields), id=f"{step_ms}-1", minid=step_ms - KEPT_MS, approximate=False)
        _, written = pipeline.execute(raise_on_error=False)
    if isinstance(written, redis.RedisError):
        if TOO_SMALL in str(written):
            return False
        raise written
    return True


@dataclass(frozen=True, slots=True)
class HistoryView:
    """Points at even distances, the oldest first; NaN where nothing is known."""

    step_s: int
    at_ms: npt.NDArray[np.int64]
    """Beginning of each point's span of time."""
    series: Mapping[str, F32]


def step_s_of(minutes: int) -> int:
    """Seconds between points, so that there are at most POINTS_MAX (and one that has begun)."""
    return STEP_MS // 1000 * max(1, -(-minutes * 60_000 // STEP_MS // POINTS_MAX))


class History:
    """What was read of the history. Thread-safe."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._lock = threading.Lock()
        self._last_id = "-"
        self._at_ms: list[int] = []
        self._rows: list[tuple[bytes, F32]] = []
        self._names: dict[bytes, list[str]] = {}

    def view(self, minutes: int, now_ms: int) -> HistoryView:
        """The last so many minutes. Raises redis.RedisError."""
        with self._lock:
            self._catch_up(now_ms)
            return self._view(minutes, now_ms)

    def _catch_up(self, now_ms: int) -> None:
        head = self._client.xrevrange(HISTORY_KEY, count=1)
        newest = cast("list[tuple[bytes, Any]]", head)
        if self._at_ms and (not newest or int(newest[0][0].partition(b"-")[0]) < self._at_ms[-1]):
            # Another server, or one that lost its end.
            self._at_ms, self._rows, self._last_id = [], [], "-"
        while True:
            entries = cast(
                "list[tuple[bytes, dict[bytes, bytes]]]",
                self._client.xrange(HISTORY_KEY, self._last_id, count=READ_AT_ONCE),
            )
            for entry_id, fields in entries:
                row = np.frombuffer(fields[b"v"], "<f4").astype(np.float32)
                if len(self._names_of(fields[b"n"])) == len(row):
                    self._at_ms.append(int(entry_id.partition(b"-")[0]))
                    self._rows.append((fields[b"n"], row))
            if entries:
                self._last_id = f"({entries[-1][0].decode()}"
            if len(entries) < READ_AT_ONCE:
                break
        kept_from_ms = now_ms - KEPT_MS - STEP_MS
        gone = int(np.searchsorted(np.array(self._at_ms, np.int64), kept_from_ms))
        if gone:
            del self._at_ms[:gone], self._rows[:gone]

    def _names_of(self, digest: bytes) -> list[str]:
        names = self._names.get(digest)
        if names is None:
            packed = cast("bytes | None", self._client.hget(NAMES_KEY, cast(Any, digest)))
            names = self._names[digest] = [] if packed is None else msgpack.unpackb(packed)
        return names

    def _view(self, minutes: int, now_ms: int) -> HistoryView:
        step_ms = 1000 * step_s_of(minutes)
        first_ms = (now_ms - minutes * 60_000) // step_ms * step_ms
        points = int((now_ms - first_ms) // step_ms) + 1
        at_ms = first_ms + step_ms * np.arange(points, dtype=np.int64)
        known_at = np.array(self._at_ms, np.int64)
        start, stop = np.searchsorted(known_at, [first_ms, now_ms + 1]).tolist()
        largest: dict[str, F32] = {}
        sums: dict[str, npt.NDArray[np.float64]] = {}
        counts: dict[str, npt.NDArray[np.int64]] = {}
        for digest in dict.fromkeys(digest for digest, _ in self._rows[start:stop]):
            rows = [index for index in range(start, stop) if self._rows[index][0] == digest]
            values = np.stack([self._rows[index][1] for index in rows])
            place, begins, inside = np.unique(
                (known_at[rows] - first_ms) // step_ms, return_index=True, return_counts=True
            )
            maxima = np.maximum.reduceat(values, begins, axis=0)
            totals = np.add.reduceat(values.astype(np.float64), begins, axis=0)
            for column, name in enumerate(self._names[digest]):
                if "_per_s" in name:
                    sums.setdefault(name, np.zeros(points))[place] += totals[:, column]
                    counts.setdefault(name, np.zeros(points, np.int64))[place] += inside
                else:
                    known = largest.setdefault(name, np.full(points, np.nan, np.float32))
                    known[place] = np.fmax(known[place], maxima[:, column])
        for name, total in sums.items():
            count = counts[name]
            mean = np.full(points, np.nan)
            np.divide(total, count, out=mean, where=count > 0)
            largest[name] = mean.astype(np.float32)
        return HistoryView(step_ms // 1000, at_ms, dict(sorted(largest.items())))
