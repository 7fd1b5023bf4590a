"""The device table of one shard: columns that grow in place, and what is asked of them.

Every array is reserved at its largest size as address space that costs nothing until it is touched, so a table
grows without copying and without a pause. Only the index is rebuilt as it fills; its layout is not state.
"""

from __future__ import annotations

import logging
import mmap
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt

from geoindex import device_kernels as kernels
from geoindex.columns import I64, U8, U16, U32, U64
from geoindex.device_kernels import (
    COUNTS,
    FREE,
    HEAP_UNITS,
    LOCATED,
    RECORD,
    ROWS,
    ROWS_MAX,
    TAIL_UNIT_BYTES,
    TAIL_UNITS_MAX,
    DeviceColumns,
)
from geoindex.figure_kernels import count_told
from geoindex.snapshot import Column, Fill

_log = logging.getLogger(__name__)

INDEX_SLOTS_MIN = 1024
INDEX_LOAD_MAX = 0.75
"""Used share of the index beyond which it is rebuilt. Then 19 % of its lines are full, and a search for a device that
is there reads 1.03 lines (by a simulation of random home lines); at 0.8 it is 28 %, and 1.05."""
INDEX_GROWTH = 1.2
"""An index takes 5.3 to 6.4 bytes a device, and growth from few to many places each device five to six times."""
WORD_ALERTS = 64
ROWS_MAX_MIN = 1 << 20
SMALL_PAGES_BYTES = 2 << 20
"""Of each column; a multiple of every page size."""
TOLD_BYTES_AT_ONCE, TOLD_PAUSE_S = 256 << 10, 0.01
"""Memory for more told bits is had in such steps: *measured*, 10 MB took a virtual machine 1 to 20 ms, and eight shards
that want it at once would take the processor from whoever else needs it."""

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40


def _reserve(shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
    """Zeroed address space of that size, backed by memory only where it is touched, in 2-MB pages where offered.

    Not its first part: a small table would wait for whole pages to be zeroed, and keep them.
    """
    size_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    region = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    if hasattr(mmap, "MADV_HUGEPAGE") and size_bytes > SMALL_PAGES_BYTES:
        region.madvise(mmap.MADV_HUGEPAGE, SMALL_PAGES_BYTES)
    return np.frombuffer(region, dtype=dtype).reshape(shape)


class _WiderTold:
    """Told bits of nobody, with memory behind them, made by a thread that others hardly notice until it must hurry."""

    def __init__(self, row_count: int, words: int, rows_max: int) -> None:
        self._hurry = threading.Event()
        self._made: Future[U64] = Future()
        # It may be thrown away with its table before it has ended, and keeps no process from ending.
        threading.Thread(target=self._make, args=(row_count, words, rows_max), name="told-bits", daemon=True).start()

    def now(self) -> U64:
        """The array, u64[rows_max, words]; waits for what is left. Raises OSError if there is no address space."""
        self._hurry.set()
        return self._made.result()

    def _make(self, row_count: int, words: int, rows_max: int) -> None:
        try:
            told: U64 = _reserve((rows_max, words), np.uint64)  # type: ignore[assignment]
            flat = told[:row_count].reshape(-1)
            at_once = TOLD_BYTES_AT_ONCE // told.itemsize
            for first in range(0, len(flat), at_once):
                flat[first : first + at_once : mmap.PAGESIZE // told.itemsize] = 0
                self._hurry.wait(TOLD_PAUSE_S)
            self._made.set_result(told)
        except BaseException as problem:
            self._made.set_exception(problem)


@dataclass(frozen=True, slots=True)
class TableSize:
    """What a table holds and what it costs."""

    device_count: int
    located_count: int
    memory_bytes: int


class DeviceTable:
    """Devices of one shard, by row. `rows_max`: the most devices it can ever hold (at most 2^27 - 1)."""

    def __init__(self, rows_max: int = ROWS_MAX) -> None:
        assert 0 < rows_max <= ROWS_MAX, f"rows_max must be 1 to {ROWS_MAX}, got {rows_max}"
        while True:
            try:
                self._reserve_all(rows_max)
                break
            except OSError:
                # Strict overcommit, or a limit on address space: a smaller table is better than none.
                if rows_max <= ROWS_MAX_MIN:
                    raise
                rows_max //= 2
                _log.warning("address space for the device table is short: at most %d devices in this shard", rows_max)

    def _reserve_all(self, rows_max: int) -> None:
        self.rows_max = rows_max
        self._told_words = 1
        self._wider_told: _WiderTold | None = None
        self.columns = DeviceColumns(
            index=_reserve((INDEX_SLOTS_MIN,), np.uint32),  # type: ignore[arg-type]
            records=_reserve((rows_max,), RECORD),  # type: ignore[arg-type]
            cell=_reserve((rows_max,), np.uint32),  # type: ignore[arg-type]
            told=_reserve((rows_max, 1), np.uint64),  # type: ignore[arg-type]
            heap=_reserve((rows_max * TAIL_UNITS_MAX * TAIL_UNIT_BYTES,), np.uint8),  # type: ignore[arg-type]
            free_rows=_reserve((rows_max,), np.uint32),  # type: ignore[arg-type]
            counts=np.zeros(COUNTS, np.int64),
        )

    @classmethod
    def restored(cls, counts: Sequence[int], told_words: int, fill: Fill, rows_max: int = ROWS_MAX) -> DeviceTable:
        """A table with the rows, free lists and told bits of another: its counts, and its columns through `fill`.

        Raises ValueError for counts of another layout, MemoryError for more devices than it can hold; whatever `fill`
        raises.
        """
        table = cls(rows_max)
        if len(counts) != COUNTS:
            raise ValueError(f"a device table must have {COUNTS} counts, got {len(counts)}")
        if counts[ROWS] > table.rows_max:
            raise MemoryError(f"device table: at most {table.rows_max} devices in a shard, got {counts[ROWS]}")
        table.columns.counts[:] = counts
        table.make_alert_room(told_words * WORD_ALERTS)
        for name, column in table.columns_in_use().items():
            fill(name, column)
        # As full as an index is on the average, so that it is not built again for the next new device.
        table._make_index(int(table.size.device_count * INDEX_GROWTH**0.5 / INDEX_LOAD_MAX))
        return table

    def columns_in_use(self) -> dict[str, Column]:
        """Every column that is state, by name: flat views, up to the last row in use."""
        columns = self.columns
        counts, rows = columns.counts, self.row_count
        return {
            "records": columns.records[:rows],
            "cell": columns.cell[:rows],
            "told": columns.told[:rows].reshape(-1),
            "heap": columns.heap[: int(counts[HEAP_UNITS]) * TAIL_UNIT_BYTES],
            "free_rows": columns.free_rows[: int(counts[FREE])],
        }

    @property
    def told_words(self) -> int:
        """Words of told bits a row: room for 64 alerts each."""
        return self._told_words

    @property
    def row_count(self) -> int:
        """Rows ever given: where scans end."""
        return int(self.columns.counts[ROWS])

    @property
    def size(self) -> TableSize:
        counts = self.columns.counts
        rows = int(counts[ROWS])
        row_bytes = RECORD.itemsize + 4 + 8 * self._told_words
        return TableSize(
            device_count=rows - int(counts[FREE]),
            located_count=int(counts[LOCATED]),
            memory_bytes=rows * row_bytes + self.columns.index.nbytes + int(counts[HEAP_UNITS]) * TAIL_UNIT_BYTES,
        )

    def make_room(self, device_count: int) -> None:
        """Make sure that so many new devices fit.

        Raises MemoryError if the shard would hold more than `rows_max`: nothing is dropped in silence.
        """
        counts = self.columns.counts
        needed = int(counts[ROWS] - counts[FREE]) + device_count
        if needed > self.rows_max:
            raise MemoryError(
                f"device table: at most {self.rows_max} devices in a shard, got {needed}; use more shards"
            )
        slots = len(self.columns.index)
        if needed > slots * INDEX_LOAD_MAX:
            self._make_index(int(max(slots * INDEX_GROWTH, needed / INDEX_LOAD_MAX + 1)))

    def _make_index(self, slots: int) -> None:
        slots = -(-max(INDEX_SLOTS_MIN, slots) // kernels.LINE_SLOTS) * kernels.LINE_SLOTS
        # The old one's memory first. Pages begin at multiples of 64, as lines must.
        self.columns = self.columns._replace(index=np.zeros(0, np.uint32))
        self.columns = self.columns._replace(index=_reserve((slots,), np.uint32))  # type: ignore[arg-type]
        kernels.place_all(self.columns.index, self.columns.records, self.columns.counts)

    def make_alert_room(self, alert_count: int) -> None:
        """Make sure that `told` has a bit for so many alerts."""
        while alert_count > self._told_words * WORD_ALERTS:
            self.expect_alerts(alert_count)
            wider, self._wider_told = cast(_WiderTold, self._wider_told), None
            told = wider.now()
            told[: self.row_count, : self._told_words] = self.columns.told[: self.row_count]
            self._told_words = told.shape[1]
            self.columns = self.columns._replace(told=told)

    def expect_alerts(self, alert_count: int) -> None:
        """Have memory made for so many alerts, on another thread: nobody waits for it but `make_alert_room`.

        *Measured* on a virtual machine, 1.25 million devices: 40 ms for memory new to it, 4 for the copy.
        """
        words = -(-alert_count // WORD_ALERTS)
        if words > self._told_words and self._wider_told is None:
            self._wider_told = _WiderTold(self.row_count, words, self.rows_max)

    def sweep(self, expired_before_ms: int) -> None:
        """Wipe locations observed before that time; free devices that no open alert has told."""
        kernels.sweep(self.columns, expired_before_ms)

    def rows_told(self, alert_slot: int) -> U32:
        """Rows told of an alert, ascending, u32[n]."""
        rows = np.empty(self.row_count + 1, np.uint32)
        word, bit = divmod(alert_slot, WORD_ALERTS)
        found = kernels.rows_told(self.columns.told, word, np.uint64(bit), self.row_count, rows)
        return rows[:found]

    def told_counts(self, partner_count: int) -> I64:
        """Devices told, by alert slot and partner, i64[slots, partners]."""
        counts = np.zeros((self._told_words * WORD_ALERTS, partner_count), np.int64)
        count_told(self.columns.records, self.columns.told, self.row_count, counts)
        return counts

    def forget_told(self, alert_slot: int) -> None:
        """Clear an alert's bit of every row."""
        word, bit = divmod(alert_slot, WORD_ALERTS)
        kernels.forget_told(self.columns.told, word, np.uint64(bit), self.row_count)

    def partners_of(self, rows: U32) -> U16:
        """Partner index of each row, u16[n]."""
        partner = np.empty(len(rows), np.uint16)
        kernels.partners_of(self.columns.records, rows, partner)
        return partner

    def ids_of(self, rows: U32) -> tuple[U8, U32]:
        """Ids of rows: (`id_bytes` u8[total], `id_end` u32[n])."""
        id_end = np.empty(len(rows), np.uint32)
        kernels.id_ends(self.columns.records, rows, id_end)
        id_bytes = np.empty(int(id_end[-1]) if len(rows) else 0, np.uint8)
        kernels.gather_ids(self.columns.records, self.columns.heap, rows, id_bytes)
        return id_bytes, id_end
