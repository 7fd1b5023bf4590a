"""How many live phones there are in each zone, by partner: counted from a device table, row by row.

    keys    u64[2^k]  zone << 16 | partner, plus 1; 0: free     open addressing, at most half full
    counts  u32[2^k]

A table of counts is as large as there are pairs of zone and partner with phones in them (a country has some 40,000
zones), not as there are zones on Earth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geoindex import figure_kernels as kernels
from geoindex.columns import U16, U32
from geoindex.devices import DeviceTable
from geoindex.figure_kernels import PARTNER_BITS

PLACES_MIN = 1 << 12


@dataclass(frozen=True, slots=True)
class PhoneColumns:
    """Phones by zone and partner, ascending, each pair once.

    zone     u32[n]  index of a zone (resolution 5; `cells`)
    partner  u16[n]  index into the settings' list
    count    u32[n]  phones, at least 1
    """

    zone: U32
    partner: U16
    count: U32


class PhoneCounts:
    """A count that is under way. `places`: how large the table was at the end of one before it."""

    def __init__(self, places: int = PLACES_MIN) -> None:
        self._keys = np.zeros(places, np.uint64)
        self._counts = np.zeros(places, np.uint32)
        self._used = 0

    @property
    def places(self) -> int:
        """Size of the table: a power of two."""
        return len(self._keys)

    def add_rows(self, table: DeviceTable, first: int, stop: int, live_from_ms: int) -> None:
        """Count the devices of these rows whose location was observed at that time or later."""
        columns = table.columns
        while True:
            first, self._used = kernels.count_phones(
                columns.cell, columns.records, first, stop, live_from_ms, self._keys, self._counts, self._used
            )
            if first == stop:
                return
            keys, counts = np.zeros(2 * self.places, np.uint64), np.zeros(2 * self.places, np.uint32)
            kernels.move_counts(self._keys, self._counts, keys, counts)
            self._keys, self._counts = keys, counts

    def columns(self) -> PhoneColumns:
        """What has been counted."""
        places = np.flatnonzero(self._keys)
        places = places[np.argsort(self._keys[places])]
        keys = self._keys[places] - np.uint64(1)
        return PhoneColumns(
            zone=(keys >> np.uint64(PARTNER_BITS)).astype(np.uint32),
            partner=(keys & np.uint64((1 << PARTNER_BITS) - 1)).astype(np.uint16),
            count=self._counts[places],
        )
