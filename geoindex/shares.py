"""Work over many rows, shared out among the machine's cores."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar, cast

import numba

Result = TypeVar("Result")


def core_count() -> int:
    """Cores that this process may use, as Numba counts them when it is imported."""
    return int(cast(Any, numba.config).NUMBA_DEFAULT_NUM_THREADS)


def in_shares(work: Callable[[int, int], Result], row_count: int, share_rows_min: int) -> list[Result]:
    """`work(first, stop)` over consecutive shares of all rows, each on a core of its own; results in the rows' order.

    `work`: must not hold the interpreter's lock for long, nor touch the rows of another share. A share has at least
    `share_rows_min` rows, unless there is only one. Raises what `work` raises.
    """
    share_count = max(1, min(core_count(), row_count // share_rows_min))
    ends = [row_count * share // share_count for share in range(share_count + 1)]
    if share_count == 1:
        return [work(0, row_count)]
    with ThreadPoolExecutor(share_count - 1, "shares") as others:
        waiting = [others.submit(work, first, stop) for first, stop in pairwise(ends[1:])]
        return [work(0, ends[1]), *(share.result() for share in waiting)]
