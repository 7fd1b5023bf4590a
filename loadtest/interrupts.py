"""Ctrl-C and SIGTERM end a long command through its `finally` blocks, wherever Python is when they come."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_S = 0.02
"""After an interrupt that Python dropped; once a millisecond would starve what is called back that often."""


class Interrupted(SystemExit):
    """A signal came; `code` is 128 + its number, as a shell gives it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def interruptible(*numbers: signal.Signals) -> Iterator[None]:
    """Within it these signals raise Interrupted in the main thread, which alone may enter.

    What a signal's handler raises inside a finalizer or a callback from C has no caller to go to: Python hands it to
    `sys.unraisablehook`, which prints it, and goes on as if nothing had come. Here it is raised again a little later,
    by a timer (SIGALRM, which is not to be used otherwise within), until it comes through.
    """
    lost: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(number)

    def again(_number: int, _frame: FrameType | None) -> None:
        raise Interrupted(lost[-1])

    def dropped(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, Interrupted):
            lost.append(unraisable.exc_value.number)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            before_hook(unraisable)

    before_hook = sys.unraisablehook
    before = {number: signal.signal(number, interrupt) for number in numbers}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, again)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before_hook
        for number, handler in before.items():
            signal.signal(number, handler)
