"""A live flow in a process of its own that starts in a tenth of a second, and breaks where it is told to.

Forked from a process that has every kernel loaded (`multiprocessing`'s fork server, which has one thread). It runs what
`tuanyuan run` runs; what is wrong with it is decided before it starts (`Trouble`).
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any, cast

from flows import checkpoints
from flows.checkpointer import Checkpointer, LogTooShort
from flows.checkpoints import CheckpointStore
from flows.config import FlowConfig
from flows.live import open_flow
from flows.queues import PushWriter
from flows.server import Link, connect
from geoindex.entries import Settings
from geoindex.shard import ShardMachine

_XADD_BYTES_MAX = 400
"""Of what stands before the payload of a push in its command."""
EXIT_REFUSED = 3
"""As `tuanyuan run` ends when it refuses to start."""
LISTENS_WITHIN_S = 30.0
CLONE_NEWNET = 0x40000000
"""Linux, sched.h."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["loadtest.soak.warm", __name__])


def start_fork_server() -> None:
    """Have every kernel in memory before anything goes on; at once if it is so already."""
    process = CONTEXT.Process(target=_nothing, daemon=True)
    process.start()
    process.join()


def _nothing() -> None:
    pass


def _die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _after(owner: Any, name: str, times: int) -> None:
    """Die after a method has returned for the n-th time."""
    method = cast(Callable[..., Any], getattr(owner, name))
    calls = threading.local()

    def wrapped(*arguments: Any, **named: Any) -> Any:
        returned = method(*arguments, **named)
        calls.count = getattr(calls, "count", 0) + 1
        if calls.count == times:
            _die()
        return returned

    setattr(owner, name, wrapped)


def _before(owner: Any, name: str, times: int) -> None:
    """Die when a method is called for the n-th time."""
    method = cast(Callable[..., Any], getattr(owner, name))
    calls = threading.local()

    def wrapped(*arguments: Any, **named: Any) -> Any:
        calls.count = getattr(calls, "count", 0) + 1
        if calls.count == times:
            _die()
        return method(*arguments, **named)

    setattr(owner, name, wrapped)


def _in_a_closing(shards_sent: int) -> None:
    """Die when the end of an alert has gone out to so many shards whole, and to the next one half."""
    send = Link.send
    seen = 0

    def wrapped(self: Link, parts: Any) -> None:
        nonlocal seen
        parts = list(parts)
        if any(b"\r\nresolved\r\n" in bytes(part) for part in parts if len(part) < _XADD_BYTES_MAX):
            seen += 1
            if seen > shards_sent:
                raw = b"".join(parts)
                send(self, [raw[: len(raw) // 2]])
                _die()
        send(self, parts)

    setattr(Link, "send", wrapped)  # noqa: B010


BEFORE_A_CHECKPOINT: dict[str, Callable[[], None]] = {
    "when pushes were sent and no answer was read": lambda: _before(PushWriter, "_replies", 30),
    "when a push was confirmed, before anybody here knows": lambda: _before(Checkpointer, "on_done", 25),
}
IN_A_CHECKPOINT: dict[str, Callable[[], None]] = {
    "when a machine was copied": lambda: _after(ShardMachine, "snapshot", 6),
    "while a checkpoint is written": lambda: _after(checkpoints, "_write_all", 14),
    "when a checkpoint was written, before it is final": lambda: _after(CheckpointStore, "write", 7),
    "when a checkpoint became final, before the log is trimmed": lambda: _after(CheckpointStore, "finalise", 6),
    "when the log was trimmed": lambda: _after(Checkpointer, "_trim", 16),
}
IN_A_CLOSING: dict[str, Callable[[], None]] = {
    f"when the end of an alert was sent to {count} shards and a half": lambda count=count: _in_a_closing(count)  # type: ignore[misc]
    for count in range(4)
}
CRASHES = BEFORE_A_CHECKPOINT | IN_A_CHECKPOINT | IN_A_CLOSING
"""Points at which a flow kills itself: what happens to the code before it runs."""


@dataclass(frozen=True, slots=True)
class Trouble:
    """What is wrong with a flow process."""

    crash: str | None = None
    """One of CRASHES."""
    network: str | None = None
    """Path of the network namespace it lives in."""
    clock_ahead_s: Any = None
    """Shared number, `shared_clock()`: how far its clock is ahead of the machine's, at any moment."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Other values for some, as {"flows.server.NAME": value}."""


def shared_clock() -> Any:
    """A number that this process sets and a flow adds to every look at its clock. Used as `.value`, in seconds."""
    return RawValue(ctypes.c_double, 0.0)


def _apply(trouble: Trouble) -> None:
    if trouble.network is not None:
        descriptor = os.open(trouble.network, os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", trouble.network)
        os.close(descriptor)
    if trouble.clock_ahead_s is not None:
        true_time, ahead_s = time.time, trouble.clock_ahead_s
        setattr(time, "time", lambda: true_time() + ahead_s.value)  # noqa: B010
    for name, value in trouble.constants.items():
        module, _, constant = name.rpartition(".")
        if not hasattr(sys.modules[module], constant):
            raise ValueError(f"there is no constant {name}")
        setattr(sys.modules[module], constant, value)
    if trouble.crash is not None:
        CRASHES[trouble.crash]()


def _run(url: str, var: str, log_path: str, trouble: Trouble, options: dict[str, Any], listens: Connection) -> None:
    with Path(log_path).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    _apply(trouble)
    client = connect(url)
    # Its logs exist: settings are read, none are written.
    flow = open_flow(FlowConfig(valkey=url, var=Path(var), **options), client, Settings())
    signal.signal(signal.SIGTERM, lambda *_: flow.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listens.close()
    try:
        flow.run(lambda: print("ready", flush=True))
    except LogTooShort as refusal:
        print(f"refused: {refusal}", flush=True)
        sys.exit(EXIT_REFUSED)
    print("stopped cleanly", flush=True)


class ForkedFlow:
    """One flow process; `options`: fields of `FlowConfig`."""

    def __init__(self, url: str, var: Path, log_path: Path, trouble: Trouble | None = None, **options: Any) -> None:
        self._log_path = log_path
        log_path.touch()
        self._listens, listens = CONTEXT.Pipe(duplex=False)
        """At its end when the process knows what SIGTERM asks of it, or is gone."""
        self._process = CONTEXT.Process(
            target=_run, args=(url, str(var), str(log_path), trouble or Trouble(), options, listens), daemon=True
        )
        self._process.start()
        listens.close()

    @property
    def said(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Until it has ended; its exit code, negative for a signal."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            raise RuntimeError(f"the flow must have ended within {timeout_s:g} s; it said: {self.said}")
        return code

    def stop(self) -> int:
        """SIGTERM, as soon as it can end cleanly; its exit code."""
        self._listens.poll(LISTENS_WITHIN_S)
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join()
