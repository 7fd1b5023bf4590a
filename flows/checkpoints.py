"""Checkpoints on disk: the state of a shard machine behind one log entry, two a shard, each in a file of its own.

    var/checkpoints/<deployment>/s003/
        1700000060000-7.checkpoint           the machine as it was behind log entry 1700000060000-7
        1700000120000-0.checkpoint           the newest; no more than these two are kept
        1700000180000-3.4711-1.writing       being written, or waiting until its pushes are in the queues

    file     magic · header length u32 · CRC-32 of the header u32 · header (msgpack) · blocks
    block    up to 4 MiB of one column · CRC-32 u32, going on from the block before

A file gets its final name only when `done` has passed its log position, so whoever starts from it pushes nothing that
was not pushed, and skips nothing. Columns are read straight into a machine's own memory. A flipped byte, a block in
another's place or a missing end does not pass: every byte is under a checksum that begins with the header's.
`zlib.crc32` does 3.5 GB/s here and lets other threads work meanwhile (docs/decisions/0005-checkpoints.md).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import logging
import os
import re
import struct
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import msgpack
import numpy as np

from flows.clock import CLOCK, Clock
from flows.disk import DISK, Disk
from flows.log import LogId, format_id, parse_id
from geoindex.columns import U8
from geoindex.entries import Alert, Settings
from geoindex.shard import SettingsRefused, ShardCounters, ShardMachine
from geoindex.snapshot import AlertState, Column, Columns, EndedAlert, Fill, MachineState, fits, put

logger = logging.getLogger(__name__)

MAGIC = b"TYSHARD\n"
CHECKPOINT_VERSION = 1
"""Of header and blocks, and of what `MachineState` means. Raise it with every change that an older program would not
read, or would read as something else."""
HEADER_BYTES_MAX = 1 << 30
KEPT_COUNT = 2
BLOCK_BYTES = 4 << 20
"""Also what is written between two fdatasyncs: the server fsyncs its log on the same disk, and must not wait for much
of ours."""

_FINAL, _WRITING = ".checkpoint", ".writing"
_FINAL_NAME = re.compile(r"(\d+-\d+)\.checkpoint")
_FRAME = struct.Struct("<II")
_CRC = struct.Struct("<I")


class CheckpointUnusable(Exception):
    """A checkpoint cannot be started from. The message says why, and names the file."""


class CheckpointAbandoned(Exception):
    """Writing was given up, because nobody wants the checkpoint any more."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A final checkpoint. `position`: the last log entry that its machine has seen."""

    shard: int
    position: LogId
    path: Path


@dataclass(frozen=True, slots=True)
class WrittenCheckpoint:
    """On disk, whole, and not final yet."""

    shard: int
    position: LogId
    path: Path
    size_bytes: int
    descriptor: int
    """Open and locked: others see that the file has an owner."""


class CheckpointStore:
    """The checkpoints of one deployment, in a folder that every process which may own a shard can read and write.

    Several processes may use it at once, also for one shard by mistake. Methods raise OSError.
    """

    def __init__(self, directory: Path, settings: Settings, disk: Disk = DISK, clock: Clock = CLOCK) -> None:
        """`directory`: for all deployments; `settings`: what tells this one apart."""
        self._disk = disk
        self._clock = clock
        identity = hashlib.blake2b(f"{settings.hash_key} {settings.shard_count}".encode(), digest_size=6).hexdigest()
        self.directory = directory / identity
        self._numbers = itertools.count(1)

    def finals(self, shard: int) -> list[Checkpoint]:
        """The shard's final checkpoints, the newest first."""
        folder = self._folder(shard)
        found = [
            Checkpoint(shard, parse_id(match[1]), folder / name)
            for name in self._disk.names(folder)
            if (match := _FINAL_NAME.fullmatch(name))
        ]
        return sorted(found, key=lambda checkpoint: checkpoint.position, reverse=True)

    def final(self, shard: int, position: LogId) -> Checkpoint:
        """The shard's final checkpoint behind that log entry, whether there is one or not."""
        return Checkpoint(shard, position, self._folder(shard) / f"{format_id(position)}{_FINAL}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(
        self,
        shard: int,
        position: LogId,
        state: MachineState,
        columns: Columns,
        wanted: Callable[[], bool] = lambda: True,
        bytes_per_s: float = float("inf"),
    ) -> WrittenCheckpoint:
        """Write a checkpoint under a temporary name, down to the disk. To be finalised, or given up.

        `wanted` is asked before each block; `bytes_per_s`: no faster than that, for the sake of others on the disk.
        Raises CheckpointAbandoned, OSError; nothing is left behind then.
        """
        disk, started_s = self._disk, self._clock.monotonic_s()
        folder = self._folder(shard)
        if folder.name not in disk.names(self.directory):
            disk.make_folder(self.directory, parents=True)
            disk.make_folder(folder)
            for above in (self.directory, self.directory.parent, self.directory.parent.parent):
                disk.sync_folder(above)
        path = folder / f"{format_id(position)}.{os.getpid()}-{next(self._numbers)}{_WRITING}"
        descriptor = disk.create(path)
        try:
            header = _pack_header(shard, position, state, columns)
            header_crc = zlib.crc32(header)
            size_bytes = _write_all(disk, descriptor, [MAGIC + _FRAME.pack(len(header), header_crc), header])
            synced_bytes = 0
            for name, column in columns.items():
                for block, crc in _blocks(name, column, header_crc):
                    if not wanted():
                        raise CheckpointAbandoned(f"{path}: nobody wants it any more")
                    size_bytes += _write_all(disk, descriptor, [block, crc])
                    if size_bytes - synced_bytes >= BLOCK_BYTES:
                        disk.sync_bytes(descriptor)
                        synced_bytes = size_bytes
                    behind_s = size_bytes / bytes_per_s - (self._clock.monotonic_s() - started_s)
                    self._clock.sleep(max(0.0, behind_s))
            disk.sync(descriptor)
        except BaseException:
            disk.remove(path)
            disk.close(descriptor)
            raise
        return WrittenCheckpoint(shard, position, path, size_bytes, descriptor)

    def finalise(self, written: WrittenCheckpoint, unusable: Collection[LogId] = ()) -> Checkpoint:
        """Make it one that may be started from, durably, and delete all but the two latest.

        The caller has seen `done` at its position, or beyond. `unusable`: positions of finals that do not count as one
        of the two, and have stayed until now: better a damaged checkpoint than none.
        """
        try:
            self._disk.rename(written.path, self.final(written.shard, written.position).path)
            self._disk.sync_folder(self._folder(written.shard))
        finally:
            self._disk.close(written.descriptor)
        finals = self.finals(written.shard)
        usable = [final for final in finals if final.position not in unusable or final.position == written.position]
        for final in finals:
            if final not in usable[:KEPT_COUNT]:
                self._disk.remove(final.path)
        return self.final(written.shard, written.position)

    def give_up(self, written: WrittenCheckpoint) -> None:
        """Delete a checkpoint that will never be final."""
        self._disk.remove(written.path)
        self._disk.close(written.descriptor)

    def sweep(self, shard: int) -> int:
        """Delete what processes that are gone did not finish; how many files."""
        swept = 0
        folder = self._folder(shard)
        for path in [folder / name for name in self._disk.names(folder) if name.endswith(_WRITING)]:
            with contextlib.suppress(FileNotFoundError):
                descriptor = self._disk.open(path)
                try:
                    if self._disk.lock_if_free(descriptor):
                        self._disk.remove(path)
                        swept += 1
                finally:
                    self._disk.close(descriptor)
        return swept

    # --- reading ----------------------------------------------------------------------------------------------------

    def load(self, checkpoint: Checkpoint) -> ShardMachine:
        """The machine of a checkpoint. Raises as `OpenCheckpoint`."""
        with contextlib.closing(self.open(checkpoint)) as opened:
            return opened.load()

    def open(self, checkpoint: Checkpoint) -> OpenCheckpoint:
        """A checkpoint to read. Raises as `OpenCheckpoint`."""
        return OpenCheckpoint(checkpoint, self._disk)

    def _folder(self, shard: int) -> Path:
        return self.directory / f"s{shard:03d}"


class OpenCheckpoint:
    """A checkpoint that can be read, also when it was deleted meanwhile.

    Opening, `verify` and `load` raise CheckpointUnusable; the latter two also SettingsRefused, if this program does not
    follow its settings, and MemoryError.
    """

    def __init__(self, checkpoint: Checkpoint, disk: Disk = DISK) -> None:
        self.checkpoint = checkpoint
        self._disk = disk
        try:
            self._descriptor = disk.open(checkpoint.path)
        except OSError as error:
            self._refuse(f"it cannot be opened: {error.strerror}")
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def load(self) -> ShardMachine:
        """The machine as it was behind the checkpoint's log entry."""
        return self._machine(self._fill)

    def verify(self) -> None:
        """Make sure that `load` would succeed: read and check everything, and keep nothing."""
        self._machine(self._check)

    def close(self) -> None:
        """May be called again."""
        if self._descriptor >= 0:
            self._disk.close(self._descriptor)
            self._descriptor = -1

    def _read_header(self) -> None:
        checkpoint, descriptor = self.checkpoint, self._descriptor
        prefix = self._disk.read_at(descriptor, len(MAGIC) + _FRAME.size, 0)
        if len(prefix) < len(MAGIC) + _FRAME.size or not prefix.startswith(MAGIC):
            self._refuse("it does not begin as a checkpoint does")
        length, self._header_crc = _FRAME.unpack_from(prefix, len(MAGIC))
        if length > HEADER_BYTES_MAX:
            self._refuse("its header is damaged")
        header = self._disk.read_at(descriptor, length, len(prefix))
        if len(header) < length or zlib.crc32(header) != self._header_crc:
            self._refuse("its header is damaged")
        fields = msgpack.unpackb(header)
        if fields["version"] != CHECKPOINT_VERSION:
            self._refuse(f"it has version {fields['version']}, this program reads version {CHECKPOINT_VERSION}")
        if (fields["shard"], tuple(fields["position"])) != (checkpoint.shard, checkpoint.position):
            self._refuse(f"it holds log entry {fields['position']} of shard {fields['shard']}")
        try:
            self._state = _unpack_state(fields)
        except (KeyError, TypeError, ValueError) as problem:
            self._refuse(f"this program does not read its header: {problem}")
        self._columns: dict[str, tuple[np.dtype[Any], int, int]] = {}
        """Type, rows and offset in the file, by name."""
        offset = len(prefix) + length
        for name, words, rows in fields["columns"]:
            dtype = _unpack_dtype(words)
            self._columns[name] = dtype, rows, offset
            column_bytes = rows * dtype.itemsize
            offset += column_bytes + _CRC.size * -(-column_bytes // BLOCK_BYTES)
        size_bytes = self._disk.size_bytes(descriptor)
        if size_bytes != offset:
            self._refuse(f"it must have {offset} bytes, and has {size_bytes}")

    def _machine(self, fill: Fill) -> ShardMachine:
        """The machine, with its columns read by `fill` or `check`."""
        left = set(self._columns)

        def tracked(name: str, target: Column) -> None:
            left.discard(name)
            fill(name, target)

        try:
            machine = ShardMachine.restored(self._state, tracked)
        except SettingsRefused:
            raise
        except OSError as error:
            self._refuse(f"it cannot be read: {error}")
        except ValueError as problem:
            self._refuse(str(problem))
        if left:
            # State that would be lost.
            self._refuse(f"this program does not know the column {min(left)!r}")
        return machine

    def _fill(self, name: str, target: Column) -> None:
        """Read a column into a machine's memory, checking every block."""
        dtype, offset = self._found(name, target)
        if dtype == target.dtype:
            self._read(name, offset, target.view(np.uint8))
            return
        stored = np.empty(len(target), dtype)
        self._read(name, offset, stored.view(np.uint8))
        put(stored, target)

    def _check(self, name: str, target: Column) -> None:
        """Read a column into nothing, checking every block."""
        dtype, offset = self._found(name, target)
        self._read(name, offset, None, len(target) * dtype.itemsize)

    def _found(self, name: str, target: Column) -> tuple[np.dtype[Any], int]:
        """Type and place of a column that fits a machine's."""
        if name not in self._columns:
            self._refuse(f"it lacks the column {name!r}")
        dtype, rows, offset = self._columns[name]
        if not fits(dtype, target.dtype) or rows != len(target):
            self._refuse(f"its column {name!r} must hold {len(target)} of {target.dtype}, and holds {rows} of {dtype}")
        return dtype, offset

    def _refuse(self, reason: str) -> NoReturn:
        raise CheckpointUnusable(f"{self.checkpoint.path}: {reason}")

    def _read(self, name: str, offset: int, target: U8 | None, size_bytes: int = 0) -> None:
        """Into `target`, or, without one, into nothing."""
        size_bytes = size_bytes if target is None else len(target)
        nowhere = np.empty(min(BLOCK_BYTES, size_bytes), np.uint8) if target is None else None
        stored_crc = bytearray(_CRC.size)
        crc = _first_crc(name, self._header_crc)
        self._disk.seek(self._descriptor, offset)
        for start in range(0, size_bytes, BLOCK_BYTES):
            stop = min(start + BLOCK_BYTES, size_bytes)
            block = memoryview(cast(Any, nowhere if target is None else target[start:stop]))[: stop - start]
            _read_all(self._disk, self._descriptor, [block, memoryview(stored_crc)])
            crc = zlib.crc32(block, crc)
            if crc != _CRC.unpack(stored_crc)[0]:
                self._refuse(f"column {name!r} is damaged between bytes {start} and {stop}")


@dataclass(frozen=True, slots=True)
class StoredRecords:
    """The device records of a checkpoint's file, as far as they are there."""

    clock_ms: int
    live_window_ms: int | None
    """None: the shard had no settings yet."""
    records: Column
    """With the fields of `geoindex.device_kernels.RECORD`."""


def read_records(path: Path) -> StoredRecords | None:
    """The device records in a file that begins as a checkpoint does, also in one that was never finished; checksums are
    not looked at. None if not even its header is whole.

    For checks of what is kept for how long, not for starting from. Raises OSError.
    """
    with path.open("rb") as file:
        prefix = file.read(len(MAGIC) + _FRAME.size)
        if len(prefix) < len(MAGIC) + _FRAME.size or not prefix.startswith(MAGIC):
            return None
        length, header_crc = _FRAME.unpack_from(prefix, len(MAGIC))
        header = file.read(length)
        if len(header) < length or zlib.crc32(header) != header_crc:
            return None
        fields = msgpack.unpackb(header)
        raw, dtype = b"", np.dtype([("observed_at_ms", "<i8")])
        for name, words, rows in fields["columns"]:
            size_bytes = rows * _unpack_dtype(words).itemsize
            if name == "records":
                dtype = _unpack_dtype(words)
                blocks = []
                for start in range(0, size_bytes, BLOCK_BYTES):
                    blocks.append(file.read(min(BLOCK_BYTES, size_bytes - start)))
                    file.seek(_CRC.size, os.SEEK_CUR)
                raw = b"".join(blocks)
                break
            file.seek(size_bytes + _CRC.size * -(-size_bytes // BLOCK_BYTES), os.SEEK_CUR)
    settings = fields["settings"]
    return StoredRecords(
        clock_ms=fields["clock_ms"],
        live_window_ms=None if settings is None else settings["live_window_ms"],
        records=np.frombuffer(raw, dtype, len(raw) // dtype.itemsize),
    )


# --- bytes ------------------------------------------------------------------------------------------------------------


def _pack_header(shard: int, position: LogId, state: MachineState, columns: Columns) -> bytes:
    fields = {
        "version": CHECKPOINT_VERSION,
        "shard": shard,
        "position": position,
        "settings": None if state.settings is None else _fields(state.settings),
        "clock_ms": state.clock_ms,
        "sweep_due_ms": state.sweep_due_ms,
        "last_desk_id": state.last_desk_id,
        "closed": sorted(state.closed),
        "alerts": [_fields(alert) | {"alert": _fields(alert.alert)} for alert in state.alerts],
        "alert_slot_count": state.alert_slot_count,
        "told_words": state.told_words,
        "table_counts": state.table_counts,
        "counters": _fields(state.counters),
        "ended": [_fields(ended) for ended in state.ended],
        "columns": [(name, _pack_dtype(column.dtype), len(column)) for name, column in columns.items()],
    }
    return cast(bytes, msgpack.packb(fields))


def _unpack_state(fields: Mapping[str, Any]) -> MachineState:
    """Raises KeyError, TypeError or ValueError for what a program of another version wrote."""
    alerts = (_tuples(alert) | {"alert": Alert(**_tuples(alert["alert"]))} for alert in fields["alerts"])
    return MachineState(
        settings=None if fields["settings"] is None else Settings(**_tuples(fields["settings"])),
        clock_ms=fields["clock_ms"],
        sweep_due_ms=fields["sweep_due_ms"],
        last_desk_id=_tuple(fields["last_desk_id"]),
        closed=frozenset(fields["closed"]),
        alerts=tuple(AlertState(**alert) for alert in alerts),
        alert_slot_count=fields["alert_slot_count"],
        told_words=fields["told_words"],
        table_counts=_tuple(fields["table_counts"]),
        counters=ShardCounters(**fields["counters"]),
        # A checkpoint of before has none: nothing but figures rests on them.
        ended=tuple(EndedAlert(**_tuples(ended)) for ended in fields.get("ended", ())),
    )


def _fields(instance: Any) -> dict[str, Any]:
    """A dataclass's values by name, not copied."""
    return {field.name: getattr(instance, field.name) for field in dataclasses.fields(instance)}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they were before msgpack made lists of tuples."""
    return {name: _tuple(value) for name, value in fields.items()}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value


def _pack_dtype(dtype: np.dtype[Any]) -> object:
    """`<u4`, or the fields of a record: [name, type, shape]."""
    if dtype.names is None:
        return dtype.str
    return [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names]


def _unpack_dtype(words: Any) -> np.dtype[Any]:
    if isinstance(words, str):
        return np.dtype(words)
    return np.dtype([(name, base, tuple(shape)) for name, base, shape in words])


def _first_crc(name: str, header_crc: int) -> int:
    return zlib.crc32(name.encode(), header_crc)


def _blocks(name: str, column: Column, header_crc: int) -> Iterator[tuple[memoryview, bytes]]:
    """A column's blocks, each with its checksum."""
    raw = memoryview(cast(Any, column.view(np.uint8)))
    crc = _first_crc(name, header_crc)
    for start in range(0, len(raw), BLOCK_BYTES):
        block = raw[start : start + BLOCK_BYTES]
        crc = zlib.crc32(block, crc)
        yield block, _CRC.pack(crc)


def _write_all(disk: Disk, descriptor: int, parts: list[Any]) -> int:
    """Write all of the parts; how many bytes. A write may take less than it is given."""
    views = [memoryview(part) for part in parts]
    total = sum(len(view) for view in views)
    while views:
        written = disk.write(descriptor, views)
        views = _after(views, written)
    return total


def _read_all(disk: Disk, descriptor: int, views: list[memoryview]) -> None:
    """Fill all of the views. Raises OSError at the end of the file."""
    while views:
        count = disk.read_into(descriptor, views)
        if count == 0:
            raise OSError("the file ends too early")
        views = _after(views, count)


def _after(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left of the views when their first bytes are done."""
    while views and count >= len(views[0]):
        count -= len(views[0])
        views = views[1:]
    if count:
        views = [views[0][count:], *views[1:]]
    return views
