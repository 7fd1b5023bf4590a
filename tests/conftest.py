"""For all tests: where compiled kernels are kept, examples that are the same on every run, and the longest files first.

`HYPOTHESIS_PROFILE=explore` draws new examples instead: for looking for trouble, not for a suite that must not flake.
"""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from tuanyuan import kernel_cache

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that runs this in the background lets it ignore Ctrl-C, and the programs that tests start would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
kernel_cache.use()  # before anything of geoindex is imported

settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

LONGEST = [
    "tests/loadtest/test_locust_runs.py",
    "tests/page/test_page.py",
    "tests/loadtest/test_bench.py",
    "tests/loadtest/test_soak.py",
    "tests/flows/test_live.py",
    "tests/flows/test_recovery.py",
]
"""Files of a minute or so each: begun last, one of them would go on alone when all other workers have ended."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Longest files first; within a file, and for all others, the order stays."""
    place = {config.rootpath / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
