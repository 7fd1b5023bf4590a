"""For all tests: where compiled kernels are kept, and examples that are the same on every run.

`HYPOTHESIS_PROFILE=explore` draws new examples instead: for looking for trouble, not for a suite that must not flake.
"""

from __future__ import annotations

import os
import signal

from hypothesis import settings

from tuanyuan import kernel_cache

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell that runs this in the background lets it ignore Ctrl-C, and the programs that tests start would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
kernel_cache.use()  # before anything of geoindex is imported

settings.register_profile("suite", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", database=None, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
