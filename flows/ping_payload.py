"""The bytes of a ping batch: columns -> the payload that `flows.wire` reads back.

Apart from the rest of the wire, because partners encode their pings with it: it needs NumPy and msgpack alone, while
the decoders are compiled kernels (`gateway.client` loads in a third of the time: `docs/partners.md`).
"""

from __future__ import annotations

from typing import Any, cast

import msgpack
import numpy as np
import numpy.typing as npt

from geoindex.columns import U32, PingBatch
from geoindex.entries import FORMAT_VERSION


def ping_payload(batch: PingBatch, width: int) -> bytes:
    """A ping batch -> payload. `width`: bytes of every id, then their ends are left out, 4 bytes less a ping; or 0."""
    columns: list[npt.NDArray[Any]] = [batch.observed_at_ms]
    if batch.at_ms is not None:
        columns.append(batch.at_ms)
    columns += [batch.lat_e7, batch.lng_e7]
    if not width:
        columns.append(batch.id_end)
    columns += [batch.partner, batch.id_bytes]
    total_bytes = sum(column.nbytes for column in columns)
    head = (
        b"\x86"
        + _pack("v")
        + _pack(FORMAT_VERSION)
        + _pack("n")
        + _pack(len(batch))
        + _pack("width")
        + _pack(width or None)
        + _pack("at")
        + _pack(batch.at_ms is not None)
        + _pack("pad")
    )
    tail = _pack("columns") + b"\xc6" + total_bytes.to_bytes(4, "big")
    pad_bytes = -(len(head) + 2 + len(tail)) % 8
    return b"".join(
        [head, b"\xc4", bytes([pad_bytes]), bytes(pad_bytes), tail, *(_little_endian(column) for column in columns)]
    )


def common_width(id_end: U32) -> int:
    """The length all ids share, in bytes, or 0 when they share none: the plain form of the wire's kernel."""
    widths = np.diff(id_end, prepend=np.uint32(0))
    return int(widths[0]) if len(widths) and bool((widths == widths[0]).all()) else 0


def _pack(value: object) -> bytes:
    return cast(bytes, msgpack.packb(value))


def _little_endian(column: npt.NDArray[Any]) -> bytes:
    # A view on every machine we run on; astype says what the format is. join() takes any buffer.
    return cast(bytes, column.astype(column.dtype.newbyteorder("<"), copy=False).data)
