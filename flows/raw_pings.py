"""Raw pings in files: how old are the oldest, anywhere under a folder? (Rule 14: the live window + 1 h.)

Whatever a file is called, it is read for what it holds:

    ping batches     as commands of an append-only file, with the time of their log entry; or bare, say in a copy of
                     something, and then as old as their newest ping
    checkpoints      last locations of devices, also in one that was never finished
    recordings       CSV with the columns of pings, gzip if `.gz`
    snapshots (RDB)  compressed, so not read: said, and not taken for clean

The age of a ping in a log is how long it has been kept: since its log entry. That of a location is since it was
observed, and must also not exceed the live window by the checkpoint's own clock.
"""

from __future__ import annotations

import mmap
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flows.checkpoints import MAGIC, read_records
from flows.recording import PingReader, UnreadableFile
from flows.wire import SETTINGS, MalformedEntry, decode_entry
from geoindex.device_kernels import HEAD_BYTES, NO_TIME
from geoindex.entries import HOUR_MS, Settings

SWEEP_SLACK_MS = 60_000 + 5_000
"""Locations are wiped by the first entry of a minute of shard clock; ticks come every second."""

_BATCH_COMMAND = b"\r\n$5\r\npings\r\n$"
_SETTINGS_COMMAND = b"\r\n$8\r\nsettings\r\n$"
_ENTRY_ID = re.compile(rb"\r\n\$\d+\r\n(\d{1,16})-\d+$")
_BATCH = b"\x86\xa1v\x01\xa1n"
"""How the payload of a ping batch begins (`wire.encode_pings`), its number of pings, and where its columns begin."""
_ROWS = re.compile(_BATCH + rb"(?:([\x00-\x7f])|\xcc(.)|\xcd(..)|\xce(....))", re.DOTALL)
_COLUMNS = re.compile(rb"\xa7columns\xc6....", re.DOTALL)
_SNAPSHOTS = (b"REDIS0", b"VALKEY0")


@dataclass(frozen=True, slots=True)
class FileFinding:
    """What one file holds. Times in ms since 1970."""

    path: Path
    kind: str
    """append-only file, checkpoint, recording, snapshot, other."""
    size_bytes: int
    ping_count: int = 0
    oldest_ms: int | None = None
    """When the oldest ping came, or the oldest location was observed; None: there is none."""
    live_window_ms: int | None = None
    """As this file says; None: it does not."""
    problem: str | None = None
    """What is wrong whatever the time is now: it cannot be read, or it keeps too much by its own clock."""


def scan(folder: Path) -> Iterator[FileFinding]:
    """Every regular file under a folder, by name. A file that goes meanwhile is passed over. Raises OSError."""
    for path in sorted(folder.rglob("*")):
        try:
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                yield _look_into(path, status.st_size)
        except FileNotFoundError:
            continue


def count_id(path: Path, device_id: bytes) -> int:
    """How often a device's id stands in a file: as its bytes, and in records of a checkpoint. Raises OSError."""
    if not path.stat().st_size:
        return 0
    count = 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        is_checkpoint = content[: len(MAGIC)] == MAGIC
        at = content.find(device_id)
        while at >= 0 and not is_checkpoint:
            count += 1
            at = content.find(device_id, at + len(device_id))
    stored = read_records(path) if is_checkpoint else None
    if stored is not None:
        head = np.zeros(HEAD_BYTES, np.uint8)
        start = device_id[:HEAD_BYTES]
        head[: len(start)] = np.frombuffer(start, np.uint8)
        records = stored.records[stored.records["id_length"] == len(device_id)]
        count += int(np.count_nonzero((records["head"][:, : len(start)] == head[: len(start)]).all(axis=1)))
    return count


def limit_ms(findings: list[FileFinding], live_window_ms: int | None) -> int:
    """For how long raw pings may be kept: the live window + 1 h. Without one given, the longest that a file names."""
    if live_window_ms is None:
        named = [finding.live_window_ms for finding in findings if finding.live_window_ms is not None]
        live_window_ms = max(named, default=Settings().live_window_ms)
    return live_window_ms + HOUR_MS


def _look_into(path: Path, size_bytes: int) -> FileFinding:
    if not size_bytes:
        return FileFinding(path, "other", 0)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content[: len(MAGIC)] == MAGIC:
            return _checkpoint(path, size_bytes)
        if content[:6] in _SNAPSHOTS or content[:7] in _SNAPSHOTS:
            problem = "a snapshot (RDB) cannot be looked into; the next rewrite by the embedded server replaces it"
            return FileFinding(path, "snapshot", size_bytes, problem=problem)
        found = _batches(path, size_bytes, content)
    return found if found.ping_count else _recording(path, size_bytes) or found


def _checkpoint(path: Path, size_bytes: int) -> FileFinding:
    stored = read_records(path)
    if stored is None:
        return FileFinding(path, "checkpoint", size_bytes, problem="it begins as a checkpoint and cannot be read")
    times_ms = stored.records["observed_at_ms"]
    times_ms = times_ms[(times_ms != NO_TIME) & (times_ms != 0)]
    oldest_ms = int(times_ms.min()) if len(times_ms) else None
    problem = None
    if oldest_ms is not None and stored.live_window_ms is not None:
        too_old_ms = stored.clock_ms - stored.live_window_ms - oldest_ms
        if too_old_ms > SWEEP_SLACK_MS:
            problem = f"by its own clock it holds a location {too_old_ms / 60_000:.0f} min older than the live window"
    return FileFinding(path, "checkpoint", size_bytes, len(times_ms), oldest_ms, stored.live_window_ms, problem)


def _batches(path: Path, size_bytes: int, content: mmap.mmap) -> FileFinding:
    """Ping batches in anything: commands of an append-only file first, then batches outside of any."""
    pings, oldest_ms, commands = 0, None, 0
    covered: list[tuple[int, int]] = []
    at = content.find(_BATCH_COMMAND)
    while at >= 0:
        start = at + len(_BATCH_COMMAND)
        size = re.match(rb"(\d{1,9})\r\n", content[start : start + 16])
        entry_id = _ENTRY_ID.search(content[max(0, at - 64) : at])
        if size is not None and entry_id is not None:
            commands += 1
            start += size.end()
            stop = start + int(size[1])
            pings += _row_count(content, start) or 1
            oldest_ms = min(int(entry_id[1]), oldest_ms or int(entry_id[1]))
            covered.append((start, stop))
            start = stop
        at = content.find(_BATCH_COMMAND, start)
    for start, stop in _gaps(covered, size_bytes):
        at = content.find(_BATCH, start, stop)
        while at >= 0:
            newest_ms = _newest_ms(content, at)
            if newest_ms is not None:
                pings += 1
                oldest_ms = min(newest_ms, oldest_ms or newest_ms)
            at = content.find(_BATCH, at + 1, stop)
    kind = "append-only file" if commands or path.suffix == ".aof" else "other"
    return FileFinding(path, kind, size_bytes, pings, oldest_ms, _live_window_ms(content))


def _gaps(covered: list[tuple[int, int]], size_bytes: int) -> Iterator[tuple[int, int]]:
    """What lies between ascending ranges."""
    at = 0
    for start, stop in covered:
        yield at, start
        at = stop
    yield at, size_bytes


def _row_count(content: mmap.mmap, at: int) -> int | None:
    """How many pings the batch says that it has whose payload begins there; None: it is none of ours."""
    rows = _ROWS.match(content[at : at + 16])
    return None if rows is None else int.from_bytes(next(raw for raw in rows.groups() if raw is not None), "big")


def _newest_ms(content: mmap.mmap, at: int) -> int | None:
    """The newest time in a bare batch whose payload begins there, however little of it is left; None: it has none."""
    row_count = _row_count(content, at)
    header = _COLUMNS.search(content[at : at + 128])
    if row_count is None or header is None:
        return None
    start = at + header.end()
    raw = content[start : start + 8 * row_count]  # the first column
    times_ms = np.frombuffer(raw, "<i8", len(raw) // 8)
    return int(times_ms.max()) if len(times_ms) else None


def _live_window_ms(content: mmap.mmap) -> int | None:
    """The longest live window that settings entries in an append-only file name."""
    longest_ms: int | None = None
    at = content.find(_SETTINGS_COMMAND)
    while at >= 0:
        start = at + len(_SETTINGS_COMMAND)
        size = re.match(rb"(\d{1,7})\r\n", content[start : start + 16])
        if size is not None:
            start += size.end()
            try:
                settings = decode_entry(SETTINGS, content[start : start + int(size[1])])
            except MalformedEntry:
                settings = None
            if isinstance(settings, Settings):
                longest_ms = max(settings.live_window_ms, longest_ms or 0)
        at = content.find(_SETTINGS_COMMAND, start)
    return longest_ms


def _recording(path: Path, size_bytes: int) -> FileFinding | None:
    """A CSV of pings; None if it is none."""
    if not {".csv", ".gz"} & set(path.suffixes):
        return None
    try:
        pings, oldest_ms = 0, None
        for chunk in PingReader(path, 65_536).chunks():
            if len(chunk):
                pings += len(chunk)
                first_ms = int(chunk.observed_at_ms.min())
                oldest_ms = min(first_ms, oldest_ms if oldest_ms is not None else first_ms)
    except UnreadableFile as problem:
        return FileFinding(path, "other", size_bytes, problem=str(problem) if path.suffix == ".gz" else None)
    return FileFinding(path, "recording", size_bytes, pings, oldest_ms)
