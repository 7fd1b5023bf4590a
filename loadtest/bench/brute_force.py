"""Who should have been told what: every phone against every alert, by unit vectors and nothing else.

No cells, no covers, no table, no stay boxes, nothing of `geoindex` but the columns: a phone is inside where the cosine
of its angle to the alert is at least the ring's. Phones are the world's indices, so no id is looked at either. Rings
stay as they are, and a late ping moves nothing (matching rules 1, 5, 6 and 7).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from geoindex.columns import E7, F64, I64, U8, U32
from loadtest.bench.traffic import ActiveAlert, SentPings

EARTH_RADIUS_KM = 6371.0088
CHUNK_ROWS = 512
"""Small enough for OpenBLAS to stay in this thread: its other ones go on spinning, into what is measured next."""
NO_TIME = np.iinfo(np.int64).min

PackedRows = npt.NDArray[np.uint8]
"""u8[n, bytes]: bit a % 8 of byte a // 8 of a row is alert a."""


class BruteForce:
    """Told sets of all phones, or of a sample of them.

    `phones`: the sample, ascending; None: all. Rows of `told` follow it.
    """

    def __init__(self, alerts: Sequence[ActiveAlert], phone_count: int, phones: U32 | None = None) -> None:
        self.phones = phones
        self._is_published = False
        rows = phone_count if phones is None else len(phones)
        self.told: PackedRows = np.zeros((rows, -(-len(alerts) // 8)), np.uint8)
        self.lat_e7 = np.zeros(rows, np.int32)
        self.lng_e7 = np.zeros(rows, np.int32)
        self._observed_at_ms: I64 = np.full(rows, NO_TIME, np.int64)
        self._centres = unit_vectors(
            np.array([active.alert.lat for active in alerts]), np.array([active.alert.lng for active in alerts])
        ).T.copy()
        self._cosine_min: F64 = np.array([math.cos(active.ring_km / EARTH_RADIUS_KM) for active in alerts])

    def publish(self) -> int:
        """All alerts meet every phone; how many devices are told, each counted for each alert."""
        self._is_published = True
        located = np.flatnonzero(self._observed_at_ms != NO_TIME)
        return sum(
            len(self._meet(located[start : start + CHUNK_ROWS])[0]) for start in range(0, len(located), CHUNK_ROWS)
        )

    def apply(self, sent: SentPings) -> tuple[U32, I64]:
        """Pings in order; returns who is newly told what: phones u32[n] and alert positions i64[n]."""
        rows, positions = self._rows(sent.phone)
        found: list[tuple[U32, I64]] = []
        while len(positions):
            # One ping of each phone at a time, in order: a phone may ping twice in a batch.
            _, first = np.unique(rows[positions], return_index=True)
            now = positions[np.sort(first)]
            positions = np.setdiff1d(positions, now, assume_unique=True)
            observed_at_ms = sent.pings.observed_at_ms[now]
            moves = observed_at_ms >= self._observed_at_ms[rows[now]]
            now = now[moves]
            moved = rows[now]
            self._observed_at_ms[moved] = observed_at_ms[moves]
            self.lat_e7[moved] = sent.pings.lat_e7[now]
            self.lng_e7[moved] = sent.pings.lng_e7[now]
            if self._is_published:
                found += [self._meet(moved[start : start + CHUNK_ROWS]) for start in range(0, len(moved), CHUNK_ROWS)]
        if not found:
            return np.empty(0, np.uint32), np.empty(0, np.int64)
        return np.concatenate([phones for phones, _ in found]), np.concatenate([alerts for _, alerts in found])

    def _rows(self, phone: U32) -> tuple[I64, I64]:
        """Row of each ping's phone (0 where it is not in the sample), and the positions of those that are."""
        if self.phones is None:
            return phone.astype(np.int64), np.arange(len(phone))
        rows = np.minimum(np.searchsorted(self.phones, phone), len(self.phones) - 1)
        return rows, np.flatnonzero(self.phones[rows] == phone)

    def _meet(self, rows: I64) -> tuple[U32, I64]:
        """Tell distinct phones of every alert they are inside of; returns those newly told, as `apply` does."""
        vectors = unit_vectors(self.lat_e7[rows] / E7, self.lng_e7[rows] / E7)
        inside = np.packbits(vectors @ self._centres >= self._cosine_min, axis=1, bitorder="little")
        new = inside & ~self.told[rows]
        self.told[rows] |= new
        changed = np.flatnonzero(new.any(axis=1))
        position, alert = np.nonzero(np.unpackbits(new[changed], axis=1, bitorder="little"))
        told = rows[changed[position]]
        return (told.astype(np.uint32) if self.phones is None else self.phones[told]), alert


def unit_vectors(lat: F64, lng: F64) -> F64:
    """Degrees -> unit vectors, f64[n, 3]."""
    phi, theta = np.radians(lat), np.radians(lng)
    cosine = np.cos(phi)
    return np.stack((cosine * np.cos(theta), cosine * np.sin(theta), np.sin(phi)), axis=1)


def distance_km(lat: float, lng: float, lats: F64, lngs: F64) -> F64:
    """Great-circle distances from one place, degrees, by the haversine formula: good at short ranges too."""
    half_lat, half_lng = np.radians(lats - lat) / 2, np.radians(lngs - lng) / 2
    square = np.sin(half_lat) ** 2 + math.cos(math.radians(lat)) * np.cos(np.radians(lats)) * np.sin(half_lng) ** 2
    return np.asarray(2 * EARTH_RADIUS_KM * np.arcsin(np.sqrt(np.minimum(square, 1.0))))


def count_bits(packed: U8) -> int:
    """Bits set in all of it."""
    return int(np.bitwise_count(packed).sum(dtype=np.int64))
