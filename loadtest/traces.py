"""Recorded pings as a stream: what phones once sent, sent again, at its own pace or `warp` times as fast.

    trace = Trace.read(Path("pings.csv.gz"), partners=("amap", "ditu"))
    stream = trace.replay(start_ms=now_ms, warp=60, loop=True)       # a minute of the file in a second, over and over
    for batch in stream.pings(now_ms, now_ms + 1_000):               # what arrives in that second
        ...

    device_id,lat,lng,observed_at[,partner][,at]                     CSV with a header, in any order; gzip if `.gz`

Times are epoch milliseconds or ISO 8601 (without an offset: UTC), coordinates WGS-84 degrees. A row arrives at its
`at`, or, in a file without that column, at the latest `observed_at` so far: the clock that an offline run gives the
file. Rows arrive in the order of the file. What is not a ping stops the reading: a load test should know what it sends.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO

import numpy as np

from geoindex.columns import E7, I32, I64, ID_BYTES_MAX, U8, U16, U32, PingBatch

REQUIRED = ("device_id", "lat", "lng", "observed_at")
DEFAULT_PARTNER = "default"
"""Of a file without that column, as in an offline run."""
BATCH_PINGS = 8_192
TIME_MS_MAX = 253_402_300_799_999
"""The last millisecond of the year 9999."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_WHOLE_NUMBER = re.compile(r"[0-9]{1,15}")


class UnreadableTrace(ValueError):
    """The file cannot be replayed; says where and why."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording in columns, in file order. `arrived_ms` i64[n] never falls; the others as in `PingBatch`."""

    partner_names: tuple[str, ...]
    partner: U16
    id_bytes: U8
    id_end: U32
    lat_e7: I32
    lng_e7: I32
    observed_at_ms: I64
    arrived_ms: I64

    def __len__(self) -> int:
        return len(self.partner)

    @property
    def duration_ms(self) -> int:
        """From the first row to the last, and one row's share more: when a loop begins again. At least a second."""
        span_ms = int(self.arrived_ms[-1] - self.arrived_ms[0])
        return max(1_000, span_ms + (round(span_ms / (len(self) - 1)) if span_ms else 0))

    @classmethod
    def read(cls, path: Path, partners: Sequence[str] | None = None) -> Trace:
        """A whole file. `partners`: the names that its rows may hold, in the order of the logs' settings; None: those
        of the file, in order of appearance.

        Raises `UnreadableTrace` with file and line for what is no recording, `OSError` for what cannot be opened.
        """
        reader = _Reader(path, partners)
        with path.open("rb") as raw:
            stream: IO[bytes] = raw
            if path.suffix == ".gz":
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                return reader.read(text)

    def replay(self, start_ms: int, warp: float = 1.0, loop: bool = False) -> Replay:
        """The trace as a stream whose first row arrives at `start_ms`, `warp` times as fast as it once did."""
        return Replay(self, start_ms, warp, loop)


@dataclass(frozen=True, slots=True)
class Replay:
    """A trace on another clock. Arrival and observation are moved and warped alike, so that what was late stays late.

    A row's new arrival is `start_ms` + (arrival - first arrival) / `warp`, rounded down; its new observation likewise.
    With `loop`, pass after pass, each `trace.duration_ms` / `warp` later.
    """

    trace: Trace
    start_ms: int
    warp: float
    loop: bool

    def __post_init__(self) -> None:
        if not (self.warp > 0 and math.isfinite(self.warp)):
            raise ValueError(f"warp: required more than 0, got {self.warp}")
        if self.start_ms < 0:
            raise ValueError(f"start_ms: required at least 0, got {self.start_ms}")

    @property
    def partner_names(self) -> tuple[str, ...]:
        return self.trace.partner_names

    @property
    def pings_per_s(self) -> float:
        """The mean rate of a pass."""
        return len(self.trace) * self.warp * 1_000.0 / self.trace.duration_ms

    @property
    def end_ms(self) -> int | None:
        """Just behind the last arrival; None if it loops."""
        return None if self.loop else int(self._moved(self.trace.arrived_ms[-1:], 0)[0]) + 1

    def pings(
        self,
        from_ms: int,
        until_ms: int,
        share: tuple[int, int] = (0, 1),
        batch_size: int = BATCH_PINGS,
        *,
        timed: bool = False,
    ) -> Iterator[PingBatch]:
        """Every ping that arrives in [from_ms, until_ms), in file order; as `Life.pings`, also for `share` and `timed`.

        Slices and workers put together give each ping of each pass once.
        """
        worker, workers = share
        if not 0 <= worker < workers:
            raise ValueError(f"share: required (k, n) with 0 <= k < n, got {share}")
        if from_ms > until_ms:
            raise ValueError(f"required from_ms <= until_ms, got {from_ms} and {until_ms}")
        if batch_size < 1:
            raise ValueError(f"batch_size: required at least 1, got {batch_size}")
        return self._batches(from_ms, until_ms, worker, workers, batch_size, timed)

    def _batches(
        self, from_ms: int, until_ms: int, worker: int, workers: int, batch_size: int, timed: bool
    ) -> Iterator[PingBatch]:
        for turn in self._turns(from_ms, until_ms):
            arrived_ms = self._moved(self.trace.arrived_ms, turn)
            first, stop = np.searchsorted(arrived_ms, (from_ms, until_ms)).tolist()
            # Rows are numbered through all passes, so that every worker gets every row in some pass.
            first += (worker - first - turn * len(self.trace)) % workers
            rows = np.arange(first, stop, workers)
            for start in range(0, len(rows), batch_size):
                yield self._batch(rows[start : start + batch_size], arrived_ms, turn, timed)

    def _turns(self, from_ms: int, until_ms: int) -> range:
        """The passes that have rows in a slice, and maybe one before and behind."""
        if not self.loop:
            return range(1)
        turn_ms = self.trace.duration_ms / self.warp
        first = max(0, int((from_ms - self.start_ms) / turn_ms) - 1)
        return range(first, max(first, int((until_ms - self.start_ms) / turn_ms) + 1))

    def _moved(self, times_ms: I64, turn: int) -> I64:
        """Times of the file -> on the new clock, in a pass."""
        since_ms = times_ms - self.trace.arrived_ms[0] + turn * self.trace.duration_ms
        moved: I64 = self.start_ms + np.floor(since_ms / self.warp).astype(np.int64)
        return moved

    def _batch(self, rows: I64, arrived_ms: I64, turn: int, timed: bool) -> PingBatch:
        trace = self.trace
        starts = np.where(rows > 0, trace.id_end[rows - 1], 0).astype(np.int64)
        lengths = trace.id_end[rows].astype(np.int64) - starts
        ends = np.cumsum(lengths)
        # Byte b of the batch is byte b - (where its id starts here) + (where it starts in the trace).
        sources = np.arange(int(ends[-1])) + np.repeat(starts - (ends - lengths), lengths)
        return PingBatch(
            partner=trace.partner[rows],
            id_bytes=trace.id_bytes[sources],
            id_end=ends.astype(np.uint32),
            lat_e7=trace.lat_e7[rows],
            lng_e7=trace.lng_e7[rows],
            observed_at_ms=np.maximum(0, self._moved(trace.observed_at_ms[rows], turn)),
            at_ms=arrived_ms[rows] if timed else None,
        )


class _Reader:
    """One reading of one file."""

    def __init__(self, path: Path, partners: Sequence[str] | None) -> None:
        self._path = path
        self._names: dict[str, int] = {name: i for i, name in enumerate(partners or ())}
        self._grows = partners is None
        self._line = 1

    def read(self, text: IO[str]) -> Trace:
        rows = csv.reader(text)
        ids, partner = bytearray(), list[int]()
        id_end, lat_e7, lng_e7 = list[int](), list[int](), list[int]()
        observed_at_ms, arrived_ms = list[int](), list[int]()
        try:
            header = next(rows, [])
            where = self._columns(header)
            clock_ms = 0
            for row in rows:
                self._line = rows.line_num
                if not row:
                    continue
                if len(row) != len(header):
                    raise self._wrong(f"must have {len(header)} fields as the header, got {len(row)}")
                ids += self._id(row[where["device_id"]])
                id_end.append(len(ids))
                partner.append(self._partner(row[where["partner"]] if "partner" in where else DEFAULT_PARTNER))
                lat_e7.append(self._degrees(row[where["lat"]], "lat", 90))
                lng_e7.append(self._degrees(row[where["lng"]], "lng", 180))
                observed_at_ms.append(self._time(row[where["observed_at"]], "observed_at"))
                at_ms = self._time(row[where["at"]], "at") if "at" in where else observed_at_ms[-1]
                if "at" in where and at_ms < clock_ms:
                    raise self._wrong(f"at must not fall, got {row[where['at']]} after {clock_ms}")
                clock_ms = max(clock_ms, at_ms)
                arrived_ms.append(clock_ms)
        except (csv.Error, OSError, EOFError, zlib.error, UnicodeDecodeError) as problem:
            raise UnreadableTrace(f"{self._path}: after line {rows.line_num}: {problem}") from problem
        if not ids:
            raise UnreadableTrace(f"{self._path}: must hold a ping at least, got a header alone")
        return Trace(
            partner_names=tuple(self._names),
            partner=np.array(partner, np.uint16),
            id_bytes=np.frombuffer(bytes(ids), np.uint8),
            id_end=np.array(id_end, np.uint32),
            lat_e7=np.array(lat_e7, np.int32),
            lng_e7=np.array(lng_e7, np.int32),
            observed_at_ms=np.array(observed_at_ms, np.int64),
            arrived_ms=np.array(arrived_ms, np.int64),
        )

    def _wrong(self, words: str) -> UnreadableTrace:
        return UnreadableTrace(f"{self._path}:{self._line}: {words}")

    def _columns(self, header: list[str]) -> dict[str, int]:
        columns = {name.strip(): position for position, name in enumerate(header)}
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise self._wrong(
                f"the first line must name the columns {', '.join(REQUIRED)} (and may name partner, at); "
                f"missing {', '.join(missing)}, got {','.join(header)[:200]!r}"
            )
        return columns

    def _id(self, text: str) -> bytes:
        raw = text.encode()
        if not 0 < len(raw) <= ID_BYTES_MAX:
            raise self._wrong(f"device_id must be 1 to {ID_BYTES_MAX} bytes, got {len(raw)}")
        return raw

    def _partner(self, name: str) -> int:
        found = self._names.get(name)
        if found is None:
            if not self._grows:
                raise self._wrong(f"partner must be one of {', '.join(self._names)}, got {name[:64]!r}")
            if not 0 < len(name.encode()) <= ID_BYTES_MAX:
                raise self._wrong(f"partner must be 1 to {ID_BYTES_MAX} bytes, got {name[:80]!r}")
            found = self._names[name] = len(self._names)
        return found

    def _degrees(self, text: str, column: str, limit: int) -> int:
        try:
            degrees = math.nan if "_" in text else float(text)
        except ValueError:
            degrees = math.nan
        if not abs(degrees) <= limit:
            raise self._wrong(f"{column} must be a number from -{limit} to {limit}, got {text[:40]!r}")
        return round(degrees * E7)

    def _time(self, text: str, column: str) -> int:
        text = text.strip()
        if _WHOLE_NUMBER.fullmatch(text):
            at_ms = int(text)
        else:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                raise self._wrong(f"{column} must be ms since 1970 or an ISO 8601 time, got {text[:40]!r}") from None
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
            at_ms = (moment - _EPOCH) // timedelta(milliseconds=1)
        if not 0 <= at_ms <= TIME_MS_MAX:
            raise self._wrong(f"{column} must be from 1970 to 9999, got {text[:40]!r}")
        return at_ms
