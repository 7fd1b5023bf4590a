"""Counts of phones as people may see them: none below 20, and no two of them that differ by one phone.

    0 .. 19     "<20"          nothing, one phone, nineteen: all the same
    20 .. 99    20, 30, ...    tens
    100 ..      two significant digits

Rounded down, so that a count that grows is never shown before it is there; sums are made of what is shown, so that no
hidden count is the difference between a sum and its parts.
"""

from __future__ import annotations

from typing import Literal

SHOWN_MIN = 20
FEWER: Literal["<20"] = "<20"

ShownCount = int | Literal["<20"]


def shown_count(count: float) -> ShownCount:
    """A count of phones, or an estimate of one, as it may be shown."""
    whole = int(count)
    if whole < SHOWN_MIN:
        return FEWER
    step: int = max(10, 10 ** (len(str(whole)) - 2))
    return whole // step * step
