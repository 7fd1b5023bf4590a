"""The state of a shard machine apart from the machine: what a checkpoint holds, and nothing that can be made anew.

    MachineState   settings, clock, open alerts, closed ids, counts of the device table: values, a few KB
    columns        the device table's arrays by name, each up to its last row in use: 80 to 130 bytes a device

Rows, alert slots, the stack of free rows and the heap's free lists come back bit for bit: where a device sits decides
the order of its pushes, and with it their ids. Not state, and derived again on restoring: the index over fingerprints,
the alerts' covers as masks per zone, buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from geoindex.columns import U8
from geoindex.entries import Alert, Settings

if TYPE_CHECKING:
    from geoindex.shard import ShardCounters

Column = npt.NDArray[Any]
Columns = Mapping[str, Column]

Fill = Callable[[str, Column], None]
"""Writes the stored column of that name into all of the given array, which is contiguous and has the right length.

May raise whatever says that the column cannot be had; the machine that was being restored is then of no use.
"""

_ALIGN_BYTES = 64
"""Where a copied column begins: at a cache line, as its original does."""


@dataclass(frozen=True, slots=True)
class AlertState:
    """An open alert as its machine knows it."""

    alert: Alert
    slot: int
    ring_km: float
    """The ring that was last drawn, not that of any later time."""
    covered: bool
    """Whether its ring matches devices; not while it is expired."""
    due_ms: int


@dataclass(frozen=True, slots=True)
class EndedAlert:
    """Whom a closed alert had told, and so sent `resolved`: the told bits themselves are gone."""

    alert_id: str
    closed_ms: int
    told: tuple[int, ...]
    """Devices by partner index; the partners of that time."""


@dataclass(frozen=True, slots=True)
class MachineState:
    """Everything of a shard machine but its columns. Times in ms since 1970, by the shard clock."""

    settings: Settings | None
    """None before the log's first entry."""
    clock_ms: int
    sweep_due_ms: int
    last_desk_id: tuple[int, int]
    closed: frozenset[str]
    """Ids of closed alerts."""
    alerts: tuple[AlertState, ...]
    """In the order of their publishing."""
    alert_slot_count: int
    """Slots there are bits for, used or not: they bound how many pings are matched at once, and so cut the pushes."""
    told_words: int
    table_counts: tuple[int, ...]
    """`counts` of the device table (`device_kernels`)."""
    counters: ShardCounters
    ended: tuple[EndedAlert, ...] = ()
    """Alerts closed within the last day, for counts of who was told; no push rests on them."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A machine's state at one moment: a copy that later entries leave alone."""

    state: MachineState
    columns: Columns


def room_bytes(columns: Columns) -> int:
    """How large a room `copied` needs."""
    return sum(_aligned(column.nbytes) for column in columns.values())


def copied(columns: Columns, room: U8 | None = None) -> dict[str, Column]:
    """Copies of contiguous columns, one after the other in `room` if they fit there, else in memory of their own.

    Copying into memory that was written to before takes a tenth of the time (docs/decisions/0005-checkpoints.md).
    """
    needed = room_bytes(columns)
    if room is None or len(room) < needed:
        room = np.empty(needed, np.uint8)
    copies: dict[str, Column] = {}
    start = 0
    for name, column in columns.items():
        place = room[start : start + column.nbytes]
        # As bytes: numpy copies records one by one, bytes all at once.
        place[:] = column.view(np.uint8)
        copies[name] = place.view(column.dtype)
        start += _aligned(column.nbytes)
    return copies


def fill_from(columns: Columns) -> Fill:
    """Restores from columns in memory."""
    return lambda name, target: put(columns[name], target)


def put(stored: Column, target: Column) -> None:
    """Write a stored column into a machine's; records of another layout field by field.

    Raises ValueError if a field that the machine has is missing, has another type, or the length differs.
    """
    if stored.shape != target.shape:
        raise ValueError(f"a stored column must have the shape {target.shape}, got {stored.shape}")
    if stored.dtype == target.dtype:
        target.view(np.uint8)[:] = stored.view(np.uint8)
        return
    if not fits(stored.dtype, target.dtype):
        raise ValueError(f"a stored column must have the fields of {target.dtype}, got {stored.dtype}")
    for name in _field_types(target.dtype):
        target[name] = stored[name]


def fits(stored: np.dtype[Any], wanted: np.dtype[Any]) -> bool:
    """Whether a column can be taken over: the same type, or records with the same fields in another arrangement."""
    if stored == wanted:
        return True
    fields = _field_types(wanted)
    return bool(fields) and fields == _field_types(stored)


def _field_types(dtype: np.dtype[Any]) -> dict[str, np.dtype[Any]]:
    """Fields by name, but for those that only fill up a record."""
    return {name: dtype[name] for name in dtype.names or () if not name.startswith("spare")}


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
