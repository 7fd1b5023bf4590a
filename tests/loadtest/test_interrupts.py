"""An interrupt ends a command through its `finally` blocks wherever it comes, also where Python drops exceptions."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, gc, os, signal, sys, time
from loadtest.interrupts import interruptible
where, number = sys.argv[1], int(sys.argv[2])

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), number)
        for _ in range(100):
            pass
        print("gone on in a finalizer")

@ctypes.CFUNCTYPE(ctypes.c_int)
def called_back():
    os.kill(os.getpid(), number)
    for _ in range(100):
        pass
    return 0

class Fails:
    def __del__(self):
        raise ValueError("another's fault")

try:
    with interruptible(signal.SIGINT, signal.SIGTERM):
        if where == "code":
            os.kill(os.getpid(), number)
        elif where == "callback":
            called_back()
        elif where == "callback twice":
            called_back()
            called_back()
        elif where == "finalizer":
            Finalized()
        elif where == "another":
            Fails()
            os.kill(os.getpid(), number)
        for _ in range(500):
            time.sleep(0.01)
        print("nothing came")
finally:
    print("cleaned up")
"""


def ended(where: str, number: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", SCRIPT, where, str(int(number))], capture_output=True, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["code", "callback", "callback twice", "finalizer"])
def test_a_signal_comes_through_from_wherever_it_came(where: str, number: int) -> None:
    it = ended(where, number)
    assert (it.returncode, it.stdout, it.stderr) == (128 + number, "cleaned up\n", "")


def test_another_exception_that_python_drops_is_printed_as_ever() -> None:
    it = ended("another", signal.SIGTERM)
    assert it.returncode == 128 + signal.SIGTERM
    assert "ValueError: another's fault" in it.stderr
    assert "Interrupted" not in it.stderr


def test_what_was_set_before_is_set_again() -> None:
    script = """
import signal, sys
from loadtest.interrupts import interruptible
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
before = [signal.getsignal(number) for number in numbers], sys.unraisablehook
with interruptible(signal.SIGTERM):
    assert signal.getsignal(signal.SIGINT) is before[0][0]
    assert signal.getsignal(signal.SIGTERM) is not before[0][1]
assert ([signal.getsignal(number) for number in numbers], sys.unraisablehook) == before
"""
    it = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (it.returncode, it.stderr) == (0, "")
