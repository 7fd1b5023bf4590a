"""`tuanyuan bench`: benchmarks that verify what they measure."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
import typer

from tuanyuan.console import EXIT_FAILED, EXIT_USAGE, console, fail, note

if TYPE_CHECKING:
    from loadtest.bench.report import Report

EPILOG = """
Examples:

    tuanyuan bench kernel --devices 1000000

    tuanyuan bench sustained --rate 4000000 --seconds 120 --json

    tuanyuan bench all --out out/bench

Every benchmark checks its own output; the exit code is 1 if something was wrong. Without --devices it runs at the size
of its goal, which takes minutes and up to 16 GB of memory; --smoke takes seconds.
"""

MILLION = 1_000_000
FOR_THROUGHPUT = 2
"""Flow processes on a machine with two cores where throughput is all; one pushes sooner (decision 9)."""
CLIMB_PINGS_PER_S = [2e6, 3e6, 4e6, 4.5e6, 5e6, 5.5e6, 6e6, 7e6, 8e6, 9e6, 10e6]
LATENCY_S_PER_ALERT = 0.5


class Benchmark(StrEnum):
    """What can be measured; `all` runs each in a process of its own."""

    KERNEL = "kernel"
    FLOW = "flow"
    SUSTAINED = "sustained"
    FANOUT = "fanout"
    GROWTH = "growth"
    LATENCY = "latency"
    MEMORY = "memory"
    CHECKPOINT = "checkpoint"
    RECOVERY = "recovery"
    COLDSTART = "coldstart"
    IDLE = "idle"
    AUDIT = "audit"
    GATEWAY = "gateway"
    FIGURES = "figures"
    WORLD = "world"
    VIEW = "view"
    PEERS = "peers"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Wanted:
    """The options as they were given; None: the benchmark's own."""

    devices: int | None = None
    seconds: float | None = None
    rate: float | None = None
    repeats: int | None = None
    processes: int | None = None
    smoke: bool = False

    def size(self, full: int, smoke: int) -> int:
        """Devices: what was asked for, or the benchmark's own full or small size."""
        return self.devices or (smoke if self.smoke else full)

    def times(self, full: int, smoke: int) -> int:
        """Repeats, likewise."""
        return self.repeats or (smoke if self.smoke else full)

    def flows(self, usual: int = 1) -> int:
        """Flow processes: what was asked for, or the benchmark's own number."""
        return self.processes or usual

    def chosen(self, full: float, smoke: float) -> float:
        """Any other number that `--smoke` makes small."""
        return smoke if self.smoke else full


def bench(
    benchmark: Annotated[Benchmark, typer.Argument(help="What to measure.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    devices: Annotated[int | None, typer.Option(min=1000, help="Phones in the world.")] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            help="How long: kernel, sustained, latency, idle, gateway, view; recovery: how much log.",
            show_default=False,
        ),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Small and short: does it work at all?")] = False,
    rate: Annotated[float | None, typer.Option(min=1, help="Pings a second: sustained, latency, recovery.")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="The median of so many counts.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=8, help="Flow processes. Default: flow and fanout 2, others 1.", show_default=False),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="all: folder for JSON and PNG. Default: out/bench.")] = None,
) -> None:
    """Measure speed, latency and memory, verify what was measured, and show it beside the goals."""
    wanted = Wanted(devices, seconds, rate, repeats, processes, smoke)
    if benchmark is Benchmark.ALL:
        if devices is not None or rate is not None:
            fail("all: each benchmark has its own size; --devices and --rate are for a single one", EXIT_USAGE)
        reports = run_all(out or Path("out/bench"), lambda name: _in_own_process(name, wanted))
        _print_all(reports, json)
        if not all(found["verified"] for found in reports.values()):
            raise typer.Exit(EXIT_FAILED)
        return
    if out is not None:
        fail("--out is for all; --json prints a single benchmark's object", EXIT_USAGE)
    report = RUNS[benchmark](wanted)
    if json:
        sys.stdout.buffer.write(orjson.dumps(report.as_json(), option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    else:
        report.print(console)
    if not report.verified:
        for words in report.faults:
            note(f"wrong: {words}")
        raise typer.Exit(EXIT_FAILED)


# --- one benchmark ----------------------------------------------------------------------------------------------------
# Each imports its module only when it runs: other commands need not load them.


def _kernel(wanted: Wanted) -> Report:
    from loadtest.bench import kernel

    pings = int(wanted.chosen(2 * MILLION, 60_000))
    return kernel.measure(
        wanted.size(10 * MILLION, 20_000), wanted.times(7, 2), pings, note, seconds_min=wanted.seconds or 0.0
    )


def _flow(wanted: Wanted) -> Report:
    from loadtest.bench import flow

    pings = int(wanted.chosen(15 * MILLION, 100_000))
    return flow.measure(
        wanted.size(10 * MILLION, 20_000), wanted.times(3, 1), pings, wanted.flows(FOR_THROUGHPUT), note
    )


def _sustained(wanted: Wanted) -> Report:
    from loadtest.bench import sustained

    rates = [wanted.rate] if wanted.rate else [100_000.0] if wanted.smoke else CLIMB_PINGS_PER_S
    seconds = wanted.seconds or wanted.chosen(120.0, 1.5)
    return sustained.measure(
        wanted.size(10 * MILLION, 20_000), seconds, min(10.0, seconds), wanted.flows(), note, rates
    )


def _fanout(wanted: Wanted) -> Report:
    from loadtest.bench import fanout

    return fanout.measure(wanted.size(10 * MILLION, 20_000), wanted.times(3, 2), wanted.flows(FOR_THROUGHPUT), note)


def _growth(wanted: Wanted) -> Report:
    from loadtest.bench import growth, open_alerts

    pings = int(wanted.chosen(2 * MILLION, 60_000))
    return growth.measure(
        wanted.size(100 * MILLION, 50_000),
        wanted.times(5, 2),
        pings,
        note,
        open_counts=open_alerts.SMOKE_COUNTS if wanted.smoke else open_alerts.COUNTS,
    )


def _latency(wanted: Wanted) -> Report:
    from loadtest.bench import latency

    alerts = round(wanted.seconds / LATENCY_S_PER_ALERT) if wanted.seconds else int(wanted.chosen(100, 4))
    rate = wanted.rate or wanted.chosen(2e6, 100_000)
    return latency.measure(wanted.size(10 * MILLION, 20_000), rate, max(1, alerts), wanted.flows(), note)


def _memory(wanted: Wanted) -> Report:
    from loadtest.bench import memory

    return memory.measure(wanted.size(100 * MILLION, 50_000), note)


def _checkpoint(wanted: Wanted) -> Report:
    from loadtest.bench import checkpoint

    return checkpoint.measure(wanted.size(10 * MILLION, 20_000), wanted.times(3, 1), note)


def _recovery(wanted: Wanted) -> Report:
    from loadtest.bench import recovery

    rate = wanted.rate or wanted.chosen(1e6, 100_000)
    seconds = wanted.seconds or wanted.chosen(60.0, 1.0)
    return recovery.measure(wanted.size(10 * MILLION, 20_000), round(rate * seconds), wanted.flows(), note)


def _coldstart(wanted: Wanted) -> Report:
    from loadtest.bench import coldstart

    return coldstart.measure(wanted.times(5, 1), note)


def _idle(wanted: Wanted) -> Report:
    from loadtest.bench import idle

    return idle.measure(wanted.seconds or wanted.chosen(20.0, 1.5), wanted.flows(), note)


def _audit(wanted: Wanted) -> Report:
    from loadtest.bench import audit

    devices = wanted.size(MILLION // 10, 10_000)
    return audit.measure(devices, int(wanted.chosen(MILLION, 20_000)), wanted.times(3, 1), note)


def _gateway(wanted: Wanted) -> Report:
    from loadtest.bench import gateway

    seconds = wanted.seconds or wanted.chosen(5.0, 0.3)
    return gateway.measure(wanted.size(MILLION // 10, 2_000), seconds, wanted.smoke, note)


def _figures(wanted: Wanted) -> Report:
    from loadtest.bench import figures

    pings = int(wanted.chosen(5 * MILLION, 300_000))
    return figures.measure(wanted.size(10 * MILLION, 20_000), pings, wanted.times(5, 1), note)


def _world(wanted: Wanted) -> Report:
    from loadtest.bench import world

    pings = int(wanted.chosen(3 * MILLION, 30_000))
    return world.measure(wanted.size(100 * MILLION, 20_000), wanted.times(5, 2), pings, note)


def _view(wanted: Wanted) -> Report:
    from loadtest.bench import view

    return view.measure(wanted.size(10 * MILLION, 20_000), wanted.seconds or wanted.chosen(60.0, 2.0), note)


def _peers(wanted: Wanted) -> Report:
    from loadtest.bench import peers

    devices = wanted.size(MILLION // 2, 10_000)
    return peers.measure(devices, devices, wanted.times(5, 2), note)


RUNS: dict[Benchmark, Callable[[Wanted], Report]] = {
    Benchmark.KERNEL: _kernel,
    Benchmark.FLOW: _flow,
    Benchmark.SUSTAINED: _sustained,
    Benchmark.FANOUT: _fanout,
    Benchmark.GROWTH: _growth,
    Benchmark.LATENCY: _latency,
    Benchmark.MEMORY: _memory,
    Benchmark.CHECKPOINT: _checkpoint,
    Benchmark.RECOVERY: _recovery,
    Benchmark.COLDSTART: _coldstart,
    Benchmark.IDLE: _idle,
    Benchmark.AUDIT: _audit,
    Benchmark.GATEWAY: _gateway,
    Benchmark.FIGURES: _figures,
    Benchmark.WORLD: _world,
    Benchmark.VIEW: _view,
    Benchmark.PEERS: _peers,
}


# --- all --------------------------------------------------------------------------------------------------------------


def run_all(out: Path, run: Callable[[Benchmark], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every benchmark by `run`; a JSON file each in `out`, and plots of all. Returns the objects by benchmark."""
    from loadtest.bench.plots import NoPlots, draw

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        fail(f"--out: {problem}")
    reports: dict[str, dict[str, Any]] = {}
    for benchmark in RUNS:
        note(f"--- {benchmark}")
        found = reports[benchmark.value] = run(benchmark)
        (out / f"{benchmark}.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    try:
        for path in draw({name: found for name, found in reports.items() if found["verified"]}, out):
            note(f"drawn: {path}")
    except NoPlots as problem:
        note(f"no plots: {problem}")
    return reports


def _in_own_process(benchmark: Benchmark, wanted: Wanted) -> dict[str, Any]:
    """Memory is given back between benchmarks, and one that breaks does not end the others."""
    options = ["--json"] + (["--smoke"] if wanted.smoke else [])
    for name, value in (
        ("--seconds", wanted.seconds),
        ("--repeats", wanted.repeats),
        ("--processes", wanted.processes),
    ):
        options += [name, str(value)] if value is not None else []
    command = [sys.executable, "-m", "tuanyuan.cli", "bench", benchmark.value, *options]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE)
    try:
        found: dict[str, Any] = orjson.loads(done.stdout)
    except orjson.JSONDecodeError:
        fault = f"ended with {done.returncode} and without a result"
        return {"benchmark": benchmark.value, "verified": False, "faults": [fault]}
    return found


def _print_all(reports: Mapping[str, dict[str, Any]], json: bool) -> None:
    from loadtest.bench.report import goals_table

    if json:
        verified = all(found["verified"] for found in reports.values())
        found = {"benchmark": "all", "verified": verified, "reports": reports}
        sys.stdout.buffer.write(orjson.dumps(found, option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
    else:
        console.print(goals_table(reports))
