"""Options of a run, the same for `locust -f loadtest/locustfile.py` and `python -m loadtest`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from loadtest.load.deployment import Deployment
from loadtest.load.plan import Stepping
from loadtest.load.scenarios import FORMATS, SCENARIOS
from loadtest.load.sources import WORLDS
from loadtest.load.spec import RunSpec

OUT = Path("out/loadtest")
PREFIX = "TUANYUAN_LOADTEST"
NUMBER_HELP = "Default: the scenario's."


def add_run_options(parser: Any, has_environment: bool) -> None:
    """To an argparse parser. `has_environment`: Locust's own, which reads variables, too."""

    def add(name: str, help: str, **more: Any) -> None:
        if has_environment:
            more["env_var"] = f"{PREFIX}_{name.strip('-').replace('-', '_').upper()}"
        parser.add_argument(name, help=help, **more)

    add("--phones", f"Phones of the world. {NUMBER_HELP}", type=int, default=None)
    add("--pings-per-s", f"Pings a second. {NUMBER_HELP}", type=float, default=None)
    add("--minutes", f"Length of the load. {NUMBER_HELP}", type=float, default=None)
    add("--world-seed", "Of phones, places and moments.", type=int, default=1)
    add("--world", f"What phones do: {', '.join(WORLDS)}.", default=next(iter(WORLDS)))
    add("--pings", "Replay a recording (CSV, .csv.gz) instead of a world.", default=None, metavar="FILE.csv.gz")
    add("--warp", "How many times faster than recorded.", type=float, default=1.0)
    add("--format", "Every partner sends like this. Default: as the scenario says.", choices=FORMATS, default=None)
    add("--no-direct", "Nobody writes straight to the logs.", action="store_true", default=False)
    add("--stepping", "Step the rate up until a limit breaks.", action="store_true", default=False)
    add(
        "--step-from",
        "First step, pings a second. Default: a quarter of the scenario's rate.",
        type=float,
        default=None,
    )
    add("--step-factor", "From one step to the next.", type=float, default=1.3)
    add("--step-seconds", "Length of a step.", type=float, default=12.0)
    add("--steps-max", "Steps at most.", type=int, default=20)
    add("--out", f"Folder of report and plots. Default: {OUT}", default=str(OUT))
    add("--compare", "Show this report's values beside those of another run.", default=None, metavar="OLD.json")
    add("--no-audit", "End without asking who was missed. Said in the report.", action="store_true", default=False)


def add_locust_options(parser: Any) -> None:
    """What only `locust -f` needs: the scenario by option, and the deployment's file."""
    parser.add_argument(
        "--scenario",
        env_var=f"{PREFIX}_SCENARIO",
        choices=sorted(SCENARIOS),
        default="steady",
        help="What is played.",
    )
    parser.add_argument(
        "--deployment",
        env_var=f"{PREFIX}_DEPLOYMENT",
        default="deployment.json",
        metavar="FILE.json",
        help="Addresses and keys of what is tested: `python -m loadtest accounts` writes it.",
    )
    add_run_options(parser, has_environment=True)


def spec_of(options: argparse.Namespace, scenario: str) -> RunSpec:
    """Raises ValueError."""
    stepping = None
    if options.stepping:
        rate = options.pings_per_s or SCENARIOS[scenario].pings_per_s
        stepping = Stepping(
            options.step_from or rate / 4, options.step_factor, options.step_seconds, int(options.steps_max)
        )
    if options.pings is not None and options.stepping:
        raise ValueError("--stepping raises the rate of a world: a recording (--pings) has its own; use --warp")
    if options.pings is not None and not Path(options.pings).is_file():
        raise ValueError(f"--pings: no such file: {options.pings}")
    return RunSpec.of(
        scenario,
        phones=options.phones,
        pings_per_s=options.pings_per_s,
        minutes=options.minutes,
        stepping=stepping,
        seed=int(options.world_seed),
        world=options.world,
        pings_file=None if options.pings is None else os.path.abspath(options.pings),
        warp=float(options.warp),
        format=options.format,
        direct=not options.no_direct,
    )


def deployment_of(options: argparse.Namespace) -> tuple[Deployment, Path]:
    """Raises ValueError saying what to do."""
    path = Path(options.deployment)
    try:
        return Deployment.read(path), path
    except FileNotFoundError:
        raise ValueError(
            f"there is no {path}: `python -m loadtest accounts` makes accounts on a deployment and writes it; "
            "`python -m loadtest` tests a system of its own"
        ) from None
