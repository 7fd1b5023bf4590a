"""The command line as a user meets it: processes, exit codes, words on stderr, results on stdout.

    run_all([["match", "--help"], ["pull", "amap"]], folder)   commands that end by themselves, one after the other
    Running("run", "--var", "v", folder=folder)                one that goes on until it is told to end

Python needs a second for the imports of a command. `run_all` pays it once: a process imports everything, then forks
for each command, which from there on is a real one: its own arguments, files and exit code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.embedded import EmbeddedServer
from tuanyuan import kernel_cache

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tuanyuan.cli"]
START_TIMEOUT_S, STOP_TIMEOUT_S = 60.0, 20.0

_FORKING = """
import contextlib, json, os, sys, tempfile
from tuanyuan import cli
for name in cli.COMMANDS + cli.GROUPS:
    cli.module_of(name)
from flows.wire import decode_entry, encode_entry
from geoindex.entries import Settings

# What each command would do again at its first option and its first kernel: nearly all of a small command's time.
decode_entry(*encode_entry(Settings(partners=("amap",))))
with contextlib.suppress(ImportError):
    import typer._adapters

answers = []
for arguments in json.load(sys.stdin):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            code = 0
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = ["tuanyuan", *arguments]
                cli.main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        answers.append([status, out.read().decode(), err.read().decode(errors="replace")])
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that has ended."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """What it said in the end, on one line: there must be exactly one that says so, and nothing of a traceback."""
        assert "Traceback" not in self.err and "panicked" not in self.err, f"{self.arguments}: {self.err[-2000:]}"
        lines = [line for line in self.err.splitlines() if line.lower().startswith("error: ")]
        assert len(lines) == 1, f"{self.arguments}: {self.err}"
        return lines[0][len("error: ") :]

    @property
    def json(self) -> Any:
        """What it printed, as one JSON value."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """What it printed, as JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


def clean_environment(**settings: str) -> dict[str, str]:
    """Without settings of whoever runs the tests; 80 columns; a Rust backtrace would only be long."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TUANYUAN_", "RUST_", "DEMO_"))}
    return kept | {"PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"} | settings


def run(*arguments: str | Path, folder: Path, timeout_s: float = 60.0, **settings: str) -> Ran:
    """One command in a process of its own."""
    words = tuple(map(str, arguments))
    ended = subprocess.run(
        [*COMMAND, *words],
        cwd=folder,
        env=clean_environment(**settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    return Ran(words, ended.returncode, ended.stdout.decode(), ended.stderr.decode(errors="replace"))


def run_all(
    commands: Sequence[Sequence[str | Path]], folder: Path, timeout_s: float = 90.0, **settings: str
) -> list[Ran]:
    """Many commands, one after the other; see the module's text."""
    words = [[str(argument) for argument in arguments] for arguments in commands]
    ended = subprocess.run(
        [sys.executable, "-c", _FORKING],
        cwd=folder,
        env=clean_environment(**settings),
        input=json.dumps(words).encode(),
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    answers = json.loads(ended.stdout)
    return [Ran(tuple(arguments), *answer) for arguments, answer in zip(words, answers, strict=True)]


class Running:
    """A command that goes on until it is told to end. What it says is kept in files of `folder`."""

    _count = 0

    def __init__(self, *arguments: str | Path, folder: Path, **settings: str) -> None:
        Running._count += 1
        self.arguments = tuple(map(str, arguments))
        self._out = folder / f"out-{Running._count}.txt"
        self._err = folder / f"err-{Running._count}.txt"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [*COMMAND, *self.arguments],
                cwd=folder,
                env=clean_environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        return self._process.poll()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def wait_for_words(self, words: str, timeout_s: float = START_TIMEOUT_S) -> None:
        """Until it has said these words, on stdout or stderr."""
        deadline_s = time.monotonic() + timeout_s
        while words not in self.out + self.err:
            assert self._process.poll() is None, f"{self.arguments} ended with {self._process.returncode}: {self.err}"
            assert time.monotonic() < deadline_s, f"{self.arguments}: no {words!r} in {timeout_s:g} s: {self.err}"
            time.sleep(0.02)

    def end(self, number: signal.Signals = signal.SIGINT) -> Ran:
        """Send a signal and wait for the end."""
        self._process.send_signal(number)
        code = self._process.wait(STOP_TIMEOUT_S)
        return Ran(self.arguments, code, self.out, self.err)


@contextmanager
def embedded_flow(var: str, *options: str, folder: Path) -> Iterator[Running]:
    """`tuanyuan run` with a server under `var`, ready; neither outlives a test, whatever happens."""
    try:
        with Running("run", "--var", var, *options, folder=folder) as flow:
            flow.wait_for_words("ready;")
            yield flow
    finally:
        if EmbeddedServer.find(folder / var / "valkey") is not None:
            # Takes it over from the process that is gone, and stops it.
            EmbeddedServer.start(folder / var / "valkey").close()


def wait_until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"did not come true within {timeout_s:g} s"
        time.sleep(0.02)


def compile_kernels(folder: Path) -> None:
    """So that no command of a test compiles first; does nothing the second time."""
    if kernel_cache.is_warm(kernel_cache.use()):
        return
    ended = run("warmup", folder=folder, timeout_s=110)
    assert ended.code == 0, ended.err
