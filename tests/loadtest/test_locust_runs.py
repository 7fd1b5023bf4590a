"""Load tests as engineers start them: Locust without a page, with workers, every scenario at a tiny size.

The runs of this module go on at the same time, against one small system: what is looked at is whether each does what
its scenario says and finds nobody missed, not how fast this machine is.
"""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import pytest

from flows.log import push_key
from flows.server import connect
from flows.wire import decode_push
from loadtest.load.account import audit_of
from loadtest.load.local_system import LocalSystem
from loadtest.load.report import write_report
from loadtest.load.scenarios import SCENARIOS
from loadtest.load.verdict import verdicts

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 4.0
PHONES, PINGS_PER_S = 2_000, 1_500
RUN_TIMEOUT_S = 110.0
TOGETHER = 3
"""Runs at the same time."""
SCENARIOS_HERE = [name for name in SCENARIOS if name != "crash"]
SPECIAL = ["workers", "recording"]

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Played:
    """What came of one run."""

    code: int
    said: str
    out: Path

    @property
    def report(self) -> dict[str, Any]:
        path = self.out / "report.json"
        assert path.exists(), self.said[-3000:]
        return cast("dict[str, Any]", orjson.loads(path.read_bytes()))


def arguments_of(name: str, out: Path, folder: Path) -> list[str]:
    """Of Locust, for one of the runs."""
    scenario = name if name in SCENARIOS else "steady"
    more: list[str] = []
    if name == "workers":
        more = ["--processes", "2"]
    if name == "recording":
        more = ["--pings", str(recording(folder)), "--warp", "30"]
    return [
        *("--headless", "--only-summary", "--scenario", scenario, "--out", str(out), "--stop-timeout", "1", *more),
        *("--phones", str(PHONES), "--pings-per-s", str(PINGS_PER_S), "--minutes", str(SECONDS / 60)),
    ]


def recording(folder: Path) -> Path:
    """600 pings within a minute, of ten phones."""
    path = folder / "pings.csv.gz"
    rows = [f"phone-{row % 10},30.2,120.1,{1_764_000_000_000 + 100 * row}" for row in range(600)]
    path.write_bytes(gzip.compress("\n".join(["device_id,lat,lng,observed_at", *rows]).encode()))
    return path


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSystem]:
    with LocalSystem(tmp_path_factory.mktemp("load")) as system:
        yield system


@pytest.fixture(scope="module")
def played(system: LocalSystem, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Played]:
    """Every run of this module, by name."""
    folder = tmp_path_factory.mktemp("out")
    waiting = [*SPECIAL, *SCENARIOS_HERE]
    running: dict[str, subprocess.Popen[bytes]] = {}
    done: dict[str, Played] = {}
    try:
        while waiting or running:
            while waiting and len(running) < TOGETHER:
                name = waiting.pop(0)
                with (folder / f"{name}.log").open("wb") as log:
                    running[name] = subprocess.Popen(
                        [
                            *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py")),
                            *arguments_of(name, folder / name, folder),
                        ],
                        env={**os.environ, "TUANYUAN_LOADTEST_DEPLOYMENT": str(system.path)},
                        stdout=log,
                        stderr=log,
                    )
            for name, process in list(running.items()):
                if (code := process.poll()) is not None:
                    said = (folder / f"{name}.log").read_text(errors="replace")
                    done[name] = Played(code, said, folder / name)
                    del running[name]
            time.sleep(0.02)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    return done


@pytest.mark.parametrize("name", SCENARIOS_HERE)
def test_a_scenario_runs_from_beginning_to_end_and_misses_nobody(name: str, played: dict[str, Played]) -> None:
    report = played[name].report
    values = report["values"]
    assert report["problem"] is None
    assert report["audit"]["clean"], report["audit"]["line"]
    assert report["audit"]["pushes"] > 0
    assert values["alerts"] == sum(wave.count for wave in SCENARIOS[name].waves)
    assert values["phones_known"] > 0.8 * PHONES
    assert values["pings_unsent"] == 0
    due, accepted = (sum(report["series"][key]) for key in ("due_per_s", "accepted_per_s"))
    assert due > 0
    assert accepted <= due
    names = {request["name"] for request in report["requests"] if request["count"]}
    assert {"POST /v1/pings [columns]", "POST /v1/pings [json]", "POST /v1/pings [ndjson]", "POST /v1/alerts"} <= names
    assert {"LOG append to log [zhifu]", "GET /healthz", "E2E decided to taken"} <= names


@pytest.mark.parametrize("name", [*SCENARIOS_HERE, *SPECIAL])
def test_the_exit_code_is_the_reports_verdict(name: str, played: dict[str, Played]) -> None:
    run = played[name]
    assert run.code == (0 if run.report["passed"] else 1), run.said[-3000:]
    assert {path.name for path in run.out.iterdir()} >= {"report.json", "report.html", "throughput.png", "cpu.png"}


def test_a_run_says_first_what_it_is_about_to_do(played: dict[str, Played]) -> None:
    said = played["steady"].said
    assert "steady: An ordinary evening" in said
    assert said.index("then the audit: missed, extra, duplicate, unretracted") < said.index("The load begins")


def test_two_workers_share_the_load(played: dict[str, Played]) -> None:
    report = played["workers"].report
    assert report["workers"] == 2
    assert report["audit"]["clean"]
    assert {load["worker"] for load in report["series"]["generator"]} == {0, 1}
    assert report["values"]["alerts"] == 8  # published once, not once by each
    alone = sum(played["steady"].report["series"]["due_per_s"])
    assert sum(report["series"]["due_per_s"]) == pytest.approx(alone, rel=0.1)


def test_a_recording_is_replayed_at_its_own_rate(played: dict[str, Played]) -> None:
    report = played["recording"].report
    assert report["audit"]["clean"]
    due = sum(report["series"]["due_per_s"])
    assert due == pytest.approx(600 / 60 * 30 * SECONDS, rel=0.15)


def test_an_entry_that_is_missing_from_a_queue_fails_the_run(
    system: LocalSystem, played: dict[str, Played], tmp_path: Path
) -> None:
    """Last of this module: it takes a push away."""
    report = played["steady"].report
    client = connect(system.server.url)
    shard, entry_id, push = next(
        (shard, entry_id, decode_push(next(iter(fields.values()))))
        for shard in range(8)
        for entry_id, fields in cast(Any, client.xrange(push_key(shard, "amap"), count=1))
    )
    client.xdel(push_key(shard, "amap"), entry_id)
    client.close()
    account = audit_of(system.server.url, str(system.folder))
    assert account.counts["missed"] == len(push.device_ids) > 0
    assert not account.passes
    values = report["values"] | {f"audit_{kind}": float(count) for kind, count in account.counts.items()}
    missed = [one["name"] for one in verdicts(values, "steady") if one["verdict"] == "missed"]
    assert "audit_missed" in missed
    audit = report["audit"] | {"line": account.line(), "clean": account.clean, "examples": list(account.examples)}
    said: list[str] = []
    assert write_report({**report, "passed": account.passes, "audit": audit}, tmp_path, None, said.append) == 1
    assert f"NOT CLEAN: {account.pushes:,} pushes, {len(push.device_ids)} missed" in said[0]


# ---- a system of its own


def test_a_crash_of_every_process_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loadtest", "crash", "--minutes", "0.4", "--out", str(tmp_path)),
            *("--phones", str(PHONES), "--pings-per-s", "1000"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=RUN_TIMEOUT_S,
        cwd=ROOT,
    )
    assert (tmp_path / "report.json").exists(), done.stderr[-3000:]
    report = orjson.loads((tmp_path / "report.json").read_bytes())
    assert [fault["role"] for fault in report["faults"]] == ["flow", "valkey", "gateway"], done.stderr[-3000:]
    assert report["audit"]["clean"], report["audit"]["line"]
    assert report["values"]["pings_unsent"] == 0
    assert done.returncode == (0 if report["passed"] else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["storm"], "invalid choice: 'storm'"),
        (["steady", "--pings", "nowhere.csv"], "loadtest: --pings: no such file: nowhere.csv"),
        (["steady", "--phones", "0"], "loadtest: phones must be at least 1, got 0"),
        (
            ["crash", "--deployment", "x.json"],
            "loadtest: crash kills processes, and does so only in a system of its own",
        ),
        (["compare", "a.json", "b.json"], "loadtest: a.json: No such file or directory"),
    ],
)
def test_a_run_that_cannot_begin_says_why(arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "loadtest", *arguments], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert words in done.stderr


def test_locust_without_a_deployment_says_where_to_get_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=RUN_TIMEOUT_S)
    assert done.returncode == 2
    assert "cannot begin: there is no deployment.json: `python -m loadtest accounts` makes accounts" in done.stderr


def test_help_has_every_scenario_and_examples() -> None:
    done = subprocess.run([sys.executable, "-m", "loadtest", "--help"], check=True, capture_output=True, text=True)
    assert all(f"    {name} " in done.stdout for name in SCENARIOS)
    assert "python -m loadtest rush-hour --minutes 5" in done.stdout
