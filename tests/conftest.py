"""For all tests: where compiled kernels are kept, and examples that are the same on every run.

`HYPOTHESIS_PROFILE=explore` draws new examples instead: for looking for trouble, not for a suite that must not flake.
"""

from __future__ import annotations

import os

from hypothesis import settings

from tuanyuan import kernel_cache

kernel_cache.use()  # before anything of geoindex is imported

settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
