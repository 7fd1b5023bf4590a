"""Every column that crosses a boundary, declared once.

A batch is a frozen dataclass of parallel arrays ("columns"). Row `i` of each column belongs together.
Validation of *values* happens at the edge (`flows.wire`); here lengths and dtypes are asserted, so
that a kernel never meets a column of the wrong kind.

    ping batch            row i                       unit
    ----------            -----                       ----
    partner        u16    index into settings' list
    id_bytes       u8     all ids, end to end         UTF-8
    id_end         u32    end of id i in id_bytes     bytes
    lat_e7         i32    latitude                    1e-7 degree (1.1 cm), WGS-84
    lng_e7         i32    longitude                   1e-7 degree, WGS-84
    observed_at_ms i64    when the phone was there    ms since 1970, UTC
    at_ms          i64    clock of the row (recordings only; otherwise the log entry's own time)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U16 = npt.NDArray[np.uint16]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

ID_BYTES_MIN = 1
ID_BYTES_MAX = 64
E7 = 10_000_000
"""Coordinate units per degree."""
LAT_E7_MAX = 90 * E7
LNG_E7_MAX = 180 * E7
PARTNER_COUNT_MAX = 1 << 16


def _column(name: str, column: npt.NDArray[np.generic], dtype: type[np.generic], rows: int) -> None:
    assert column.dtype == dtype, f"{name}: dtype must be {np.dtype(dtype)}, got {column.dtype}"
    assert column.shape == (rows,), f"{name}: shape must be ({rows},), got {column.shape}"
    assert column.flags.c_contiguous, f"{name}: must be contiguous"


@dataclass(frozen=True, slots=True)
class PingBatch:
    """Location pings of many devices and partners, in the order they arrived."""

    partner: U16
    id_bytes: U8
    id_end: U32
    lat_e7: I32
    lng_e7: I32
    observed_at_ms: I64
    at_ms: I64 | None = None

    def __post_init__(self) -> None:
        rows = len(self.partner)
        _column("partner", self.partner, np.uint16, rows)
        _column("id_bytes", self.id_bytes, np.uint8, len(self.id_bytes))
        _column("id_end", self.id_end, np.uint32, rows)
        _column("lat_e7", self.lat_e7, np.int32, rows)
        _column("lng_e7", self.lng_e7, np.int32, rows)
        _column("observed_at_ms", self.observed_at_ms, np.int64, rows)
        if self.at_ms is not None:
            _column("at_ms", self.at_ms, np.int64, rows)
        id_bytes_total = int(self.id_end[-1]) if rows else 0
        assert id_bytes_total == len(self.id_bytes), (
            f"id_bytes: length must be id_end[-1] = {id_bytes_total}, got {len(self.id_bytes)}"
        )

    def __len__(self) -> int:
        return len(self.partner)

    def device_id(self, row_index: int) -> str:
        """The id of one row (slow: for messages and tests)."""
        start = int(self.id_end[row_index - 1]) if row_index else 0
        return bytes(self.id_bytes[start : int(self.id_end[row_index])]).decode()


def pack_ids(ids: list[str]) -> tuple[U8, U32]:
    """Python strings -> (`id_bytes` u8[total], `id_end` u32[n])."""
    encoded = [device_id.encode() for device_id in ids]
    ends = np.cumsum([len(raw) for raw in encoded], dtype=np.uint32)
    return np.frombuffer(b"".join(encoded), dtype=np.uint8).copy(), ends.astype(np.uint32)


class Push(NamedTuple):
    """One queue entry: at most `push_ids_max` devices of one partner, told one thing at one moment.

    `id_bytes`, `id_end`: as in `PingBatch`. `at_ms`: the shard clock. `ring_km`: the ring at `at_ms`. A named tuple:
    most pushes of a busy shard hold one device, and a frozen dataclass takes four times as long to make.
    """

    partner: int
    alert_id: str
    revision: int
    kind: str
    ring_km: float
    at_ms: int
    id_bytes: U8
    id_end: U32

    def device_ids(self) -> list[str]:
        raw = self.id_bytes.tobytes()
        ends = self.id_end.tolist()
        return [raw[start:end].decode() for start, end in zip([0, *ends[:-1]], ends, strict=True)]


ToldAs = tuple[str, int, float]
"""Alert id, revision and ring in km."""


@dataclass(frozen=True, slots=True)
class PushColumns:
    """Many pushes of kind `alert` that one batch of pings caused, in queue order: most of them hold one device.

    Push i is about `alerts[alert[i]]`, to the partner `partner[i]`, at `at_ms[i]`, and holds the ids `id_stop[i - 1]`
    to `id_stop[i]` (0 before the first). As objects, one a push, they would cost a seventh of the matching.

        alerts     what is said of each alert that occurs, at its position
        alert      u32[n], partner u16[n], at_ms i64[n], id_stop u32[n]
        id_bytes   u8, id_end u32[ids]: as in `PingBatch`
    """

    alerts: tuple[ToldAs | None, ...]
    alert: U32
    partner: U16
    at_ms: I64
    id_stop: U32
    id_bytes: U8
    id_end: U32

    def __len__(self) -> int:
        return len(self.alert)

    def __iter__(self) -> Iterator[Push]:
        first_id = first_byte = 0
        rows = zip(self.alert.tolist(), self.partner.tolist(), self.at_ms.tolist(), self.id_stop.tolist(), strict=True)
        for alert, partner, at_ms, id_stop in rows:
            told_as = self.alerts[alert]
            assert told_as is not None, f"no alert stands at {alert}"
            alert_id, revision, ring_km = told_as
            id_end = self.id_end[first_id:id_stop]
            last_byte = int(id_end[-1])
            yield Push(
                partner,
                alert_id,
                revision,
                "alert",
                ring_km,
                at_ms,
                self.id_bytes[first_byte:last_byte],
                id_end - np.uint32(first_byte),
            )
            first_id, first_byte = id_stop, last_byte


class Pushes(Sequence[Push]):
    """What one log entry caused, in queue order. `segments`: the same, with many pushes as columns where there are."""

    __slots__ = ("_count", "segments")

    def __init__(self, segments: Sequence[Push | PushColumns] = ()) -> None:
        self.segments = segments
        self._count = sum(len(segment) if isinstance(segment, PushColumns) else 1 for segment in segments)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Push]:
        for segment in self.segments:
            if isinstance(segment, PushColumns):
                yield from segment
            else:
                yield segment

    @overload
    def __getitem__(self, index: int) -> Push: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Push]: ...
    def __getitem__(self, index: int | slice) -> Push | Sequence[Push]:
        return list(self)[index]

    @property
    def device_count(self) -> int:
        """Devices over all pushes."""
        return sum(len(segment.id_end) for segment in self.segments)
