"""Child processes of a Locust process, by `posix_spawn`.

gevent's `subprocess` forks in Python, with the hooks of every library and whatever native threads there are: in the
child they complain, and it may hang; what it has replaced does not work any more. Waiting lets other greenlets work.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Mapping

import gevent

POLL_S = 0.02


class Process:
    """A child in a session of its own, so that Ctrl-C in the terminal is for its parent."""

    def __init__(self, command: list[str], descriptors: Mapping[int, int]) -> None:
        """`descriptors`: the child's number -> ours. Its other files are closed, but for stdout and stderr, which are
        ours. Raises OSError.
        """
        actions = [(os.POSIX_SPAWN_DUP2, ours, child) for child, ours in descriptors.items()]
        self.pid = os.posix_spawn(command[0], command, os.environ, file_actions=actions, setsid=True)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code (negative: a signal), or None while it goes on."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self.returncode = -1  # somebody else has asked
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code; None: it goes on after so long."""
        deadline_s = time.monotonic() + timeout_s
        while (code := self.poll()) is None and time.monotonic() < deadline_s:
            gevent.sleep(POLL_S)
        return code

    def end(self, timeout_s: float = 5.0) -> None:
        """Terminate it; kill it if it takes longer than that."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.poll() is not None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            self.wait(timeout_s)
