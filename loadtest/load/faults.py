"""What kills parts of a local system while a run goes on: a thread beside Locust, which knows nothing of it.

It waits for the file in which the conductor says when the load began, and writes what it did to another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from loadtest.load.local_system import LocalSystem
from loadtest.load.scenarios import Kill

POLL_S = 0.1


class Killer:
    """Kills what a scenario says, when it says so."""

    def __init__(
        self, system: LocalSystem, kills: tuple[Kill, ...], begun: Path, done: Path, say: Callable[[str], None]
    ):
        self._system, self._kills, self._begun, self._done, self._say = system, kills, begun, done, say
        self._ending = threading.Event()
        self.problem: str | None = None
        self._thread = threading.Thread(target=self._run, name="killer", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """No more kills; one that is under way is finished."""
        self._ending.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._play()
        except Exception as problem:
            self.problem = f"{type(problem).__name__}: {problem}"
            self._say(f"a fault could not be played: {self.problem}")

    def _play(self) -> None:
        while not self._begun.exists():
            if self._ending.wait(POLL_S):
                return
        begun = orjson.loads(self._begun.read_bytes())
        played: list[dict[str, Any]] = []
        for kill in sorted(self._kills, key=lambda one: one.at):
            due_s = begun["begin_ms"] / 1000 + kill.at * begun["seconds"]
            if self._ending.wait(max(0.0, due_s - time.time())):
                return
            at_s = time.time() - begun["begin_ms"] / 1000
            self._say(f"{at_s:5.0f} s: killing {kill.role} ...")
            took_s = self._system.kill(kill.role)
            self._say(f"{at_s + took_s:5.0f} s: {kill.role} is back after {took_s:.1f} s")
            played.append({"role": kill.role, "at_s": round(at_s, 2), "took_s": round(took_s, 2)})
            self._done.write_bytes(orjson.dumps(played))
