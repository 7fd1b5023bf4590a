"""The clock of a recording: when each of its rows happened, as far as the file can tell.

With an `at` column (when the ping arrived) the clock is its running maximum. Without one the pings' own
`observed_at` are the only clock there is, and one phone a day ahead must not move it. So a ping ahead of the clock by
more than the tolerance is *from the future* if the file comes back: if one of the next `LOOKAHEAD_ROWS` pings is at
or behind clock + tolerance. If none is, the file has a gap (a night, the next trip) and the clock moves on.
"""

from __future__ import annotations

import numpy as np

from geoindex.columns import I64, Bool
from geoindex.numba_typing import kernel

LOOKAHEAD_ROWS = 100
"""As many phones with a wrong clock may ping in a row; as little must follow a gap for it to be one."""
NO_CLOCK = np.iinfo(np.int64).min


@kernel
def clock_of_arrivals(
    arrived_at_ms: I64, observed_at_ms: I64, clock_ms: int, tolerance_ms: int, at_ms: I64, accepted: Bool
) -> int:
    """Clock of each row by its `at` column -> `at_ms` i64[n], `accepted` bool[n]; returns the clock afterwards.

    clock_ms: the clock before. A row observed more than `tolerance_ms` after its own arrival is not accepted, and
    does not move the clock.
    """
    for row in range(len(observed_at_ms)):
        now_ms = max(clock_ms, arrived_at_ms[row])
        accepted[row] = observed_at_ms[row] <= now_ms + tolerance_ms
        if accepted[row]:
            clock_ms = now_ms
        at_ms[row] = clock_ms
    return clock_ms


@kernel
def clock_of_observations(
    observed_at_ms: I64, rows: int, clock_ms: int, tolerance_ms: int, at_ms: I64, accepted: Bool
) -> int:
    """Clock of the first `rows` rows by `observed_at` alone; later rows are only looked ahead to. Otherwise as above.

    clock_ms: NO_CLOCK before the first ping, which sets it.
    """
    for row in range(rows):
        observed = observed_at_ms[row]
        accepted[row] = True
        if clock_ms != NO_CLOCK and observed > clock_ms + tolerance_ms:
            for later in range(row + 1, min(row + 1 + LOOKAHEAD_ROWS, len(observed_at_ms))):
                if observed_at_ms[later] <= clock_ms + tolerance_ms:
                    accepted[row] = False
                    break
        if accepted[row]:
            clock_ms = max(clock_ms, observed)
        at_ms[row] = clock_ms
    return clock_ms
