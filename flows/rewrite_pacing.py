"""Holds back the child that rewrites the server's append-only file, so that who waits for the server waits less.

    server ──fork──> child: writes all data into a new file, as fast as core and disk allow
                       ^ stopped and let go in turn, by a thread of the process that owns the server

Unhindered, the child has a core of its own and half of the disk for seconds, and pushes wait. A child that is stopped
half of the time takes twice as long, and they wait half as long (docs/decisions/0016-memory.md). Priorities do nothing
of the kind: where the kernel groups processes by session, a child competes with its own server alone.

A child is never left stopped: whoever looks after the server next lets it go on, also if its own server is gone, whose
memory it would keep; and so does whoever ends the server, which would wait for its child for ever.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

POLL_S = 0.1
STOPPED_S = RUNNING_S = 0.02
"""*Measured* beside 40 ms stopped and 10 let go, which draws a rewrite out and has pushes wait longer."""
_FILE_NAMES = "temp-rewriteaof-*.aof"
"""What the child writes to, in the server's directory; the name ends with its process id."""


def rewriting_children(directory: Path) -> list[psutil.Process]:
    """The child that is rewriting a server's file, and those of earlier servers that were killed. Raises OSError."""
    found: dict[int, psutil.Process] = {}
    home = directory.resolve()
    for path in directory.glob(_FILE_NAMES):
        pid = path.stem.rpartition("-")[2]
        # A file may be left over from a child that is gone, and its number be a stranger's by now: a child works where
        # its server does.
        with contextlib.suppress(psutil.Error, ValueError):
            process = psutil.Process(int(pid))
            if Path(process.cwd()) == home:
                found[process.pid] = process
    return list(found.values())


def resume(children: list[psutil.Process]) -> None:
    """Let children go on that somebody may have stopped."""
    for child in children:
        with contextlib.suppress(psutil.Error):
            child.resume()


def hold_back(children: Callable[[], list[psutil.Process]], stopping: threading.Event) -> None:
    """Stop and continue the children that rewrite a server's file, in turn, until told to stop: for a thread.

    `children`: those to hold back now; none while another process looks after the server. None is left stopped.
    """
    while not stopping.wait(POLL_S):
        try:
            for child in children():
                _pace(child, stopping)
        except OSError as error:
            logger.error("rewrites of the append-only file are not held back: %s", error)


def _pace(child: psutil.Process, stopping: threading.Event) -> None:
    """Until the child has ended, or this is to stop."""
    try:
        while not stopping.is_set() and child.status() != psutil.STATUS_ZOMBIE:
            child.suspend()
            stopping.wait(STOPPED_S)
            child.resume()
            stopping.wait(RUNNING_S)
    except psutil.NoSuchProcess:
        return
    except psutil.Error as error:
        logger.warning("the rewrite of the append-only file is not held back: %s", error)
