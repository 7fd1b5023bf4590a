"""A live flow in a process of its own that starts in a tenth of a second, and dies where it is told to.

Forked from a process that has every kernel loaded (`multiprocessing`'s fork server, which has one thread).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from flows import checkpoints
from flows.checkpointer import Checkpointer, LogTooShort
from flows.checkpoints import CheckpointStore
from flows.config import FlowConfig
from flows.live import open_flow
from flows.queues import PushWriter
from flows.server import connect
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from tuanyuan.console import EXIT_REFUSED

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.flows.warm_kernels", __name__])


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


CRASHES: dict[str, Callable[[], None]] = {
    "when a push was confirmed, before anybody here knows": lambda: _before(Checkpointer, "on_done", 25),
    "when a machine was copied": lambda: _after(ShardMachine, "snapshot", 6),
    "while a checkpoint is written": lambda: _after(checkpoints, "_write_all", 14),
    "when a checkpoint was written, before it is final": lambda: _after(CheckpointStore, "write", 7),
    "when a checkpoint became final, before the log is trimmed": lambda: _after(CheckpointStore, "finalise", 6),
    "when the log was trimmed": lambda: _after(Checkpointer, "_trim", 16),
    "when pushes were sent and no answer was read": lambda: _before(PushWriter, "_replies", 30),
}
"""Points at which a flow kills itself: what happens to the code before it runs."""


def _run(
    url: str, var: str, log_path: str, crash: str | None, constants: dict[str, Any], options: dict[str, Any]
) -> None:
    with Path(log_path).open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        assert hasattr(sys.modules[module], constant), f"no such constant: {name}"
        setattr(sys.modules[module], constant, value)
    if crash is not None:
        CRASHES[crash]()
    client = connect(url)
    flow = open_flow(FlowConfig(valkey=url, var=Path(var), **options), client, Settings(shard_count=4))
    signal.signal(signal.SIGTERM, lambda *_: flow.stop())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        flow.run(lambda: print("ready", flush=True))
    except LogTooShort as refusal:
        print(f"refused: {refusal}", flush=True)
        sys.exit(EXIT_REFUSED)
    print("stopped cleanly", flush=True)


class ForkedFlow:
    """One flow process; `crash`: one of CRASHES; `constants`: other values for some, as {"flows.server.NAME": value};
    `options`: fields of `FlowConfig`.
    """

    def __init__(
        self,
        url: str,
        var: Path,
        log_path: Path,
        crash: str | None = None,
        constants: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self._log_path = log_path
        log_path.touch()
        arguments = (url, str(var), str(log_path), crash, constants or {}, options)
        self._process = _CONTEXT.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    @property
    def said(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None, "it was started"
        return pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait(self, timeout_s: float = 60.0) -> int:
        """Until it has ended; its exit code, negative for a signal."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        assert code is not None, f"the flow must have ended within {timeout_s:g} s; it said: {self.said}"
        return code

    def stop(self) -> int:
        self._process.terminate()
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
