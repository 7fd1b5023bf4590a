"""Plays lines of the fault table, one after another, and says what came of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loadtest.soak.accounts import Account
from loadtest.soak.injectors import NotHere, small_disk
from loadtest.soak.scenarios import Size
from loadtest.soak.stage import Measured, Say, Stage
from loadtest.soak.table import Line

SAID_CHARS = 3000
"""Of a flow's log that is shown with a failure."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(slots=True)
class Outcome:
    """What came of one line."""

    name: str
    fault: str
    command: str
    seconds: float = 0.0
    account: Account | None = None
    """None: tests alone show the line, or it could not be played."""
    measured: Measured = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    not_here: str | None = None
    """Why it could not be played on this machine."""

    @property
    def passed(self) -> bool:
        return not self.problems and self.not_here is None

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"passed": self.passed}


def run(line: Line, size: Size, say: Say, seed: int = 1, time_s: float = float("inf")) -> Outcome:
    """Play one line at a size, for about `time_s` at most; its accounts at the end. Raises nothing but interrupts."""
    outcome = Outcome(line.name, line.fault, line.command)
    started_s = time.monotonic()
    try:
        if line.play is None:
            _run_tests(line, outcome)
        else:
            _play(line, size, say, seed, started_s + time_s, outcome)
    except NotHere as reason:
        outcome.not_here = str(reason)
    except Exception as problem:
        outcome.problems.append(f"{type(problem).__name__}: {problem}")
    outcome.seconds = round(time.monotonic() - started_s, 1)
    return outcome


def run_all(
    lines: Sequence[Line], full: bool, say: Say, tell: Say, seed: int = 1, minutes: float = float("inf")
) -> list[Outcome]:
    """Play lines one after another; each may use its part of the time that is left. `tell` is told of every outcome."""
    end_s = time.monotonic() + minutes * 60
    outcomes: list[Outcome] = []
    for number, line in enumerate(lines):
        say(f"{line.name}: {line.fault}")
        left_s = max(0.0, end_s - time.monotonic())
        outcome = run(line, line.full if full else line.small, say, seed, left_s / (len(lines) - number))
        outcomes.append(outcome)
        tell(words_of(outcome))
    return outcomes


def words_of(outcome: Outcome) -> str:
    """One line for a person."""
    verdict = "passed" if outcome.passed else "NOT PLAYED" if outcome.not_here else "FAILED"
    parts = [f"{outcome.name}: {verdict} in {outcome.seconds:g} s"]
    if outcome.account is not None:
        parts.append(outcome.account.line())
    parts += [f"{name} {value:,}" if not isinstance(value, str) else value for name, value in outcome.measured.items()]
    parts += outcome.problems
    if outcome.not_here:
        parts.append(outcome.not_here)
    return "; ".join(parts)


def _play(line: Line, size: Size, say: Say, seed: int, deadline_s: float, outcome: Outcome) -> None:
    assert line.play is not None
    with contextlib.ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="tuanyuan-soak-")))
        if line.setting.disk_mb is not None:
            folder = exits.enter_context(small_disk(folder / "disk", line.setting.disk_mb))
        stage = Stage(folder, exits, line.setting, seed, say, deadline_s)
        outcome.measured = stage.measured
        try:
            line.play(stage, size)
            stage.quiet()
        except RuntimeError as problem:
            said = f"; the last flow said:\n{stage.flows[-1].said[-SAID_CHARS:]}" if stage.flows else ""
            raise RuntimeError(f"{problem}{said}") from problem
        outcome.account = stage.account()
        if not outcome.account.clean:
            outcome.problems.append("; ".join(outcome.account.examples) or "queues differ from a replay")
        if not outcome.account.pushes:
            outcome.problems.append("nobody was told anything: nothing was shown")
        outcome.problems += stage.broken_promises()


def _run_tests(line: Line, outcome: Outcome) -> None:
    """Raises NotHere where the tests, or what runs them, are not installed."""
    if not (ROOT / "tests").is_dir():
        raise NotHere("needs the project's tests: run it from a checkout")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *line.tests]
    done = subprocess.run(command, cwd=ROOT, env=_clean_environment(), check=False, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        outcome.problems.append(f"{' '.join(line.tests)}: {last or done.stderr.strip()[-500:]}")
    outcome.measured["tests"] = last


def _clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
