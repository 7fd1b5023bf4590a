"""Recorded pings as people keep them: CSV, gzip if `.gz`, read in chunks into columns.

    device_id,lat,lng,observed_at[,partner][,at]     in any order, by header; further columns are ignored

Times are epoch milliseconds or ISO 8601 (without an offset: UTC). A row that is not a ping is set aside with its
line and reason; the rows around it are not touched.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from flows.alert_json import event_time_ms
from geoindex.columns import E7, F64, I64, ID_BYTES_MAX, Bool, PingBatch, pack_ids

REQUIRED = ("device_id", "lat", "lng", "observed_at")
OPTIONAL = ("partner", "at")
DEFAULT_PARTNER = "default"
PARTNER_BYTES_MAX = 64
EXAMPLES_PER_REASON = 5


class _CsvReader(Protocol):
    """What `csv.reader` returns."""

    line_num: int

    def __next__(self) -> list[str]: ...


class UnreadableFile(ValueError):
    """The file as a whole cannot be used."""


@dataclass(slots=True)
class SetAside:
    """Rows that were not pings: counts by reason, and the first few of each in words."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)

    def add(self, reason: str, where: str, words: str) -> None:
        self.counts[reason] = count = self.counts.get(reason, 0) + 1
        if count <= EXAMPLES_PER_REASON:
            self.examples.append(f"{where}: {words}")


@dataclass(frozen=True, slots=True)
class RecordedPings:
    """Well-formed rows of a file, in file order. `lines`: where each stood. `at_ms`: None without an `at` column."""

    partners: list[str]
    ids: list[str]
    lat: F64
    lng: F64
    observed_at_ms: I64
    at_ms: I64 | None
    lines: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: slice, partner_index: dict[str, int], at_ms: I64 | None = None) -> PingBatch:
        """Some of the rows as a batch; with `at_ms` its rows carry a clock of their own."""
        id_bytes, id_end = pack_ids(self.ids[rows])
        return PingBatch(
            partner=np.array([partner_index[name] for name in self.partners[rows]], np.uint16),
            id_bytes=id_bytes,
            id_end=id_end,
            lat_e7=np.rint(self.lat[rows] * E7).astype(np.int32),
            lng_e7=np.rint(self.lng[rows] * E7).astype(np.int32),
            observed_at_ms=self.observed_at_ms[rows].copy(),
            at_ms=None if at_ms is None else at_ms.copy(),
        )

    def keep(self, kept: Bool) -> RecordedPings:
        """The rows where `kept` bool[n] is set."""
        places = np.flatnonzero(kept).tolist()
        return RecordedPings(
            [self.partners[i] for i in places],
            [self.ids[i] for i in places],
            self.lat[kept],
            self.lng[kept],
            self.observed_at_ms[kept],
            None if self.at_ms is None else self.at_ms[kept],
            [self.lines[i] for i in places],
        )

    def followed_by(self, later: RecordedPings) -> RecordedPings:
        at_ms = None if self.at_ms is None or later.at_ms is None else np.concatenate([self.at_ms, later.at_ms])
        return RecordedPings(
            self.partners + later.partners,
            self.ids + later.ids,
            np.concatenate([self.lat, later.lat]),
            np.concatenate([self.lng, later.lng]),
            np.concatenate([self.observed_at_ms, later.observed_at_ms]),
            at_ms,
            self.lines + later.lines,
        )

    def part(self, rows: slice) -> RecordedPings:
        at_ms = None if self.at_ms is None else self.at_ms[rows]
        return RecordedPings(
            self.partners[rows],
            self.ids[rows],
            self.lat[rows],
            self.lng[rows],
            self.observed_at_ms[rows],
            at_ms,
            self.lines[rows],
        )


class PingReader:
    """One file of recorded pings. `set_aside` fills as chunks are read; `bytes_read` is for a progress bar."""

    def __init__(self, path: Path, chunk_rows: int) -> None:
        self.path = path
        self.set_aside = SetAside()
        self.size_bytes = path.stat().st_size
        self._chunk_rows = chunk_rows
        self._raw: IO[bytes] | None = None

    @property
    def bytes_read(self) -> int:
        return self._raw.tell() if self._raw and not self._raw.closed else self.size_bytes

    def chunks(self) -> Iterator[RecordedPings]:
        """Raises UnreadableFile for a file without the header, or that ends in the middle of its compression."""
        with self._open() as text:
            reader = csv.reader(text)
            try:
                header = next(reader, [])
            except (csv.Error, OSError, EOFError, zlib.error) as problem:
                raise UnreadableFile(f"{self.path}:1: {problem}") from problem
            columns = self._columns(header)
            more = True
            while more:
                rows, lines, more = self._rows(reader, len(header))
                if rows:
                    yield self._parse(rows, lines, columns)

    @contextmanager
    def _open(self) -> Iterator[IO[str]]:
        with self.path.open("rb") as raw:
            self._raw = raw
            stream: IO[bytes] = raw
            if self.path.suffix == ".gz":
                stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
            # Bytes that are not UTF-8 survive as surrogates, so that only their own row is set aside.
            yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")

    def _columns(self, header: list[str]) -> dict[str, int]:
        columns = {name.strip(): position for position, name in enumerate(header)}
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise UnreadableFile(
                f"{self.path}:1: the first line must name the columns {', '.join(REQUIRED)} "
                f"(and may name {', '.join(OPTIONAL)}); missing {', '.join(missing)}, got {','.join(header)[:200]!r}"
            )
        return columns

    def _rows(self, reader: _CsvReader, width: int) -> tuple[list[list[str]], list[int], bool]:
        rows: list[list[str]] = []
        lines: list[int] = []
        while len(rows) < self._chunk_rows:
            try:
                row = next(reader)
            except StopIteration:
                return rows, lines, False
            except csv.Error as problem:
                self.set_aside.add("columns", f"{self.path}:{reader.line_num}", f"not a CSV row: {problem}")
                continue
            except (OSError, EOFError, zlib.error) as problem:
                raise UnreadableFile(f"{self.path}: after line {reader.line_num}: {problem}") from problem
            if len(row) == width:
                rows.append(row)
                lines.append(reader.line_num)
            elif row:
                words = f"must have {width} fields as the header, got {len(row)}"
                self.set_aside.add("columns", f"{self.path}:{reader.line_num}", words)
        return rows, lines, True

    def _parse(self, rows: list[list[str]], lines: list[int], columns: dict[str, int]) -> RecordedPings:
        fields = list(zip(*rows, strict=True))
        good = np.ones(len(rows), np.bool_)

        def refuse(row_index: int, reason: str, words: str) -> None:
            if good[row_index]:
                good[row_index] = False
                self.set_aside.add(reason, f"{self.path}:{lines[row_index]}", words)

        ids = list(fields[columns["device_id"]])
        for row_index, device_id in enumerate(ids):
            problem = _id_problem(device_id, ID_BYTES_MAX)
            if problem:
                refuse(row_index, problem[0], f"device_id {problem[1]}")
        partners = list(fields[columns["partner"]]) if "partner" in columns else [DEFAULT_PARTNER] * len(rows)
        for name in set(partners):
            problem = _id_problem(name, PARTNER_BYTES_MAX)
            if problem:
                for row_index, partner in enumerate(partners):
                    if partner == name:
                        refuse(row_index, "partner", f"partner {problem[1]}")
        lat = _numbers(fields[columns["lat"]], 90.0, "latitude", refuse)
        lng = _numbers(fields[columns["lng"]], 180.0, "longitude", refuse)
        observed_at_ms = _times(fields[columns["observed_at"]], "observed_at", refuse)
        at_ms = _times(fields[columns["at"]], "at", refuse) if "at" in columns else None
        pings = RecordedPings(partners, ids, lat, lng, observed_at_ms, at_ms, lines)
        return pings if good.all() else pings.keep(good)


Refuse = Callable[[int, str, str], None]


def _id_problem(name: str, bytes_max: int) -> tuple[str, str] | None:
    """What is wrong with an id: (reason, words), or None."""
    if name.isascii() and 0 < len(name) <= bytes_max:
        return None
    try:
        size_bytes = len(name.encode())
    except UnicodeEncodeError:
        return "id_utf8", f"must be UTF-8, got {name[:40].encode(errors='surrogateescape')!r}"
    if not 0 < size_bytes <= bytes_max:
        return "id_length", f"must be 1 to {bytes_max} bytes, got {size_bytes}"
    return None


def _numbers(texts: tuple[str, ...], limit: float, reason: str, refuse: Refuse) -> F64:
    """A column of degrees within +-limit, f64[n]; 0 where refused."""
    try:
        if any("_" in text for text in texts):  # Python's own spelling of numbers, not a file's
            raise ValueError
        degrees = np.array(list(map(float, texts)), np.float64)
    except ValueError:
        degrees = np.array([_number(text) for text in texts], np.float64)
    for row_index in np.flatnonzero(~(np.abs(degrees) <= limit)).tolist():
        refuse(
            row_index, reason, f"{reason} must be a number from -{limit:g} to {limit:g}, got {texts[row_index][:40]!r}"
        )
        degrees[row_index] = 0.0
    return degrees


def _number(text: str) -> float:
    try:
        return float("nan") if "_" in text else float(text)
    except ValueError:
        return float("nan")


def _times(texts: tuple[str, ...], column: str, refuse: Refuse) -> I64:
    """A column of times in ms, i64[n]; 0 where refused."""
    if all(len(text) == 13 and text.isascii() and text.isdigit() for text in texts):
        return np.array(list(map(int, texts)), np.int64)
    times_ms = np.zeros(len(texts), np.int64)
    for row_index, text in enumerate(texts):
        try:
            times_ms[row_index] = event_time_ms(text.strip(), column)
        except ValueError as problem:
            refuse(row_index, column, str(problem))
    for row_index in np.flatnonzero(times_ms < 0).tolist():
        refuse(row_index, column, f"{column} must not be before 1970, got {texts[row_index][:40]!r}")
    return times_ms
