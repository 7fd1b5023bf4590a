"""Memory that was freed stays with the process, so that taking it again costs no page faults."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from flows.malloc import KEEPS_FREED_MEMORY

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="there is no glibc here")

SCRIPT = """
import resource, sys
import numpy as np
from flows.malloc import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def batches(count):
    # Columns that come and go together, more than malloc keeps when it was left to itself.
    for _ in range(count):
        columns = [np.ones(400_000, np.uint8) for _ in range(6)]
        del columns

if sys.argv[1] == "kept":
    keep_freed_memory()
batches(3)
before = faults()
batches(100)
print(faults() - before)
"""


def faults_of(mode: str, **environment: str) -> int:
    without = {name: value for name, value in os.environ.items() if name not in KEEPS_FREED_MEMORY}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True, env=without | environment
    )
    return int(ran.stdout)


def test_freed_memory_is_kept_and_taken_again_without_page_faults() -> None:
    assert faults_of("kept") < 100
    assert faults_of("as it is") > 1_000, "the test tests nothing: malloc keeps such memory by itself"


def test_what_the_environment_says_stays() -> None:
    assert faults_of("kept", MALLOC_TRIM_THRESHOLD_=str(128 << 10), MALLOC_TOP_PAD_="0") > 1_000


GIVEN_BACK = """
import os
import numpy as np
from flows.malloc import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") >> 20

keep_freed_memory()
before = resident()
columns = [np.ones(1 << 20, np.uint8) for _ in range(200)]
del columns
print(resident() - before)
give_back_freed_memory()
print(resident() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="there is no /proc here")
def test_what_was_kept_is_given_back_when_asked() -> None:
    ran = subprocess.run([sys.executable, "-c", GIVEN_BACK], capture_output=True, text=True, check=True)
    kept_mib, left_mib = map(int, ran.stdout.split())
    assert kept_mib > 150
    assert left_mib < 20
