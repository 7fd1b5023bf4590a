"""The command line: a load test of a system of its own, from nothing; accounts for others; reports drawn again."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gateway.accounts import Datum
from loadtest.interrupts import interruptible
from loadtest.load.compare import compared, read_report, table
from loadtest.load.conductor import BEGUN_FILE, FAULTS_FILE, REPORT_FILE, describe
from loadtest.load.deployment import Deployment
from loadtest.load.faults import Killer
from loadtest.load.local_system import DATUMS, LocalSystem, make_accounts
from loadtest.load.options import add_run_options, spec_of
from loadtest.load.report import html_of
from loadtest.load.scenarios import SCENARIOS
from tuanyuan import kernel_cache

ROOT = Path(__file__).resolve().parents[2]
EXIT_FAILED, EXIT_USAGE = 1, 2
KEEPS_ALL_S_MAX = 1800.0
"""Longer runs trim logs and queues as a deployment does: else they would fill the memory."""
END_TIMEOUT_S = 900.0

EPILOG = """
examples:

    python -m loadtest                                        steady, a minute and a half, on a system of its own
    python -m loadtest rush-hour --minutes 5
    python -m loadtest steady --stepping                      what does this machine hold, and what gives way first?
    python -m loadtest big-city --phones 30000000             one ring over 30 M phones; 4 GB of memory
    python -m loadtest crash --out out/crash --compare out/loadtest/report.json
    python -m loadtest steady --pings recorded.csv.gz --warp 60
    python -m loadtest steady --deployment deployment.json    against a system that runs already
    python -m loadtest accounts --valkey redis://10.0.0.5:6379 --gateway https://… > deployment.json
    python -m loadtest compare NEW.json OLD.json

With make: `make loadtest LOADTEST_ARGS="rush-hour --minutes 5"`. With Locust's page and workers: see
loadtest/locustfile.py. Exit code 1: a threshold of loadtest/thresholds.toml was missed, or the audit is not clean.
"""


def main(arguments: list[str]) -> int:
    """The exit code."""
    parser = _parser()
    options = parser.parse_args(_with_scenario(arguments))
    try:
        code: int = options.act(options)
    except ValueError as problem:
        print(f"loadtest: {problem}", file=sys.stderr)
        return EXIT_USAGE
    return code


def _with_scenario(arguments: list[str]) -> list[str]:
    """The first word may be left out: steady."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        return ["steady", *arguments]
    return arguments


def _parser() -> argparse.ArgumentParser:
    names = "\n".join(f"    {scenario.name:20} {scenario.about}" for scenario in SCENARIOS.values())
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description=f"Find out what a deployment holds before the night it is needed.\n\nscenarios:\n\n{names}",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="scenario|command")
    for scenario in SCENARIOS.values():
        run = commands.add_parser(scenario.name, description=scenario.about)
        add_run_options(run, has_environment=False)
        run.add_argument("--deployment", default=None, metavar="FILE.json", help="Test this, not a system of our own.")
        run.add_argument("--workers", type=int, default=1, help="Processes that send. Default: 1.")
        run.add_argument("--keep", action="store_true", help="Keep the system's folder, and say where it is.")
        run.set_defaults(act=_run, scenario=scenario.name)
    accounts = commands.add_parser("accounts", help="make accounts on a deployment; prints its file for --deployment")
    accounts.add_argument("--valkey", required=True, help="The deployment's Valkey.")
    accounts.add_argument("--gateway", required=True, help="Its gateway's url.")
    accounts.add_argument("--var", default="var", help="Folder of the gateways' key file and the flow's checkpoints.")
    accounts.add_argument("--partner", action="append", help="May be repeated. Default: the world's.")
    accounts.set_defaults(act=_accounts)
    compare = commands.add_parser("compare", help="two reports beside each other")
    compare.add_argument("new", type=Path)
    compare.add_argument("old", type=Path)
    compare.set_defaults(act=_compare)
    redraw = commands.add_parser("report", help="make report.html and plots of a report.json again")
    redraw.add_argument("report", type=Path)
    redraw.set_defaults(act=_redraw)
    return parser


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


# ---- a run


def _run(options: argparse.Namespace) -> int:
    spec = spec_of(options, options.scenario)
    if spec.plays.kills and options.deployment is not None:
        raise ValueError(f"{spec.scenario} kills processes, and does so only in a system of its own")
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    for name in (BEGUN_FILE, FAULTS_FILE, REPORT_FILE):
        (out / name).unlink(missing_ok=True)
    with contextlib.ExitStack() as exits:
        exits.enter_context(interruptible(signal.SIGTERM))
        if options.deployment is not None:
            return _locust(options, Path(options.deployment))
        folder = _folder(exits, options.keep)
        named = Deployment("http://127.0.0.1", dict.fromkeys(DATUMS, ""), is_local=True)
        _say(describe(spec, named))
        kernel_cache.warm(kernel_cache.use(), _say)
        _say(f"starting Valkey, flow and gateway under {folder} ...")
        started_s = time.monotonic()
        system = exits.enter_context(LocalSystem(folder, keeps_all=spec.seconds <= KEEPS_ALL_S_MAX, say=_say))
        _say(f"ready after {time.monotonic() - started_s:.1f} s")
        killer = None
        if spec.plays.kills:
            killer = Killer(system, spec.plays.kills, out / BEGUN_FILE, out / FAULTS_FILE, _say)
            exits.callback(killer.end)
        code = _locust(options, system.path, is_told=True)
        if killer is not None:
            killer.end()
            if killer.problem is not None:
                return EXIT_FAILED
        if ended := system.ended():
            _say(f"loadtest: {ended}")
            return EXIT_FAILED
        return code


def _folder(exits: contextlib.ExitStack, is_kept: bool) -> Path:
    if is_kept:
        return Path(tempfile.mkdtemp(prefix="tuanyuan-load-"))
    # Caches of a process that is just ending may still be written.
    return Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="tuanyuan-load-", ignore_cleanup_errors=True)))


def _locust(options: argparse.Namespace, deployment: Path, is_told: bool = False) -> int:
    """Locust, without its page, with the options that were given; its exit code."""
    command = [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"),
        *("--only-summary", "--skip-log-setup", "--stop-timeout", "1"),
        *("--scenario", options.scenario, "--deployment", str(deployment)),
        *run_arguments(options),
    ]
    if options.workers > 1:
        command += ["--processes", str(options.workers)]
    environment = {**os.environ, "TUANYUAN_LOADTEST_TOLD": "1"} if is_told else dict(os.environ)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        return process.wait()
    except KeyboardInterrupt:
        _say("stopping; the report is made of what there is (again to give that up)")
        return process.wait(END_TIMEOUT_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_arguments(options: argparse.Namespace) -> list[str]:
    """The run's options as Locust takes them."""
    found: list[str] = []
    for name in (
        *("phones", "pings_per_s", "minutes", "world_seed", "world", "pings", "warp", "step_from", "step_factor"),
        *("step_seconds", "steps_max", "format", "out", "compare"),
    ):
        value = getattr(options, name)
        if value is not None:
            found += [f"--{name.replace('_', '-')}", str(value)]
    return found + [
        f"--{name.replace('_', '-')}" for name in ("no_direct", "stepping", "no_audit") if getattr(options, name)
    ]


# ---- besides


def _accounts(options: argparse.Namespace) -> int:
    import orjson

    names: dict[str, Datum] = {name: DATUMS.get(name, "wgs84") for name in options.partner or DATUMS}
    keys = make_accounts(options.valkey, Path(options.var), names)
    deployment = Deployment(options.gateway, valkey=options.valkey, var=str(Path(options.var).resolve()), **keys)
    print(orjson.dumps(deployment.to_json(), option=orjson.OPT_INDENT_2).decode())
    return 0


def _compare(options: argparse.Namespace) -> int:
    print(table(compared(read_report(options.new), read_report(options.old))))
    return 0


def _redraw(options: argparse.Namespace) -> int:
    from loadtest.load.plots import draw

    found = read_report(options.report)
    folder = options.report.parent
    (folder / "report.html").write_text(html_of(found, draw(found, folder), None), encoding="utf-8")
    print(folder / "report.html")
    return 0
