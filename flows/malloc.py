"""glibc's malloc, told to keep what is freed: log entries and batches of pings come and go by the megabyte.

By default such memory goes back to the kernel each time, to be cleared and mapped again for the next one
(docs/decisions/0016-memory.md has what that costs). Elsewhere than under glibc nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""glibc's malloc.h."""
_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": (_M_MMAP_THRESHOLD, 32 << 20),
    "MALLOC_TRIM_THRESHOLD_": (_M_TRIM_THRESHOLD, 1 << 30),
    "MALLOC_TOP_PAD_": (_M_TOP_PAD, 64 << 20),
}
"""Environment variable (mallopt(3)) -> parameter, bytes."""

KEEPS_FREED_MEMORY = {name: str(size) for name, (_, size) in _SETTINGS.items()}
"""Environment of a process that keeps what it frees; what somebody has set should stay."""

LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment of a process whose heap is in 2-MB pages where the kernel offers them (glibc 2.35): a fork then copies
one entry for what would be 512."""


def keep_freed_memory() -> None:
    """Have this process keep what it frees from now on, but for what its environment says otherwise."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name, (parameter, size) in _SETTINGS.items():
        if name not in os.environ:
            libc.mallopt(parameter, size)


def give_back_freed_memory() -> None:
    """Have this process give what it freed back to the kernel, once: what is resident then is in use."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
