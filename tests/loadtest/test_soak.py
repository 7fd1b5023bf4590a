"""The fault table at its small size, and that its accounts notice what is wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from flows.log import format_id, parse_id
from flows.wire import encode_entry
from geoindex.entries import AlertClose, AlertRevision, LogEntry
from loadtest.soak import runner
from loadtest.soak.accounts import Account, StreamEntries, account, queues_of
from loadtest.soak.deployment import SETTINGS
from loadtest.soak.life import PARTNERS, growing_alert, phones, somewhere
from loadtest.soak.offline import Turns, compare_turns
from loadtest.soak.runner import Outcome, run
from loadtest.soak.scenarios import Size
from loadtest.soak.stage import Measured
from loadtest.soak.table import BY_NAME, LINES, Line
from tuanyuan.commands import soak as command

ROOT = Path(__file__).resolve().parents[2]
NOW_MS = 1_700_000_000_000


# ---- the table


@pytest.mark.parametrize("line", [line for line in LINES if line.play is not None], ids=lambda line: line.name)
def test_nothing_is_lost_and_nothing_comes_twice(line: Line) -> None:
    said: list[str] = []
    outcome = run(line, line.small, said.append)
    if outcome.not_here:
        pytest.skip(outcome.not_here)
    assert outcome.passed, (outcome.problems, said)
    assert outcome.account is not None
    assert outcome.account.pushes > 0


def test_pytest_finds_every_test_that_the_table_names() -> None:
    named = [test for line in LINES for test in line.tests]
    collect = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "--collect-only", *named]
    done = subprocess.run(collect, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_line_shown_by_tests_runs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run_nothing(command: list[str], **_: Any) -> Any:
        ran.append(command)
        return type("Done", (), {"returncode": int(len(ran) > 1), "stdout": "1 passed", "stderr": ""})

    monkeypatch.setattr("loadtest.soak.runner.subprocess.run", run_nothing)
    line = BY_NAME["malformed"]
    assert run(line, line.small, lambda _: None).passed
    assert set(line.tests) < set(ran[0])
    assert not run(line, line.small, lambda _: None).passed


def test_whatever_goes_wrong_is_a_failure_and_not_an_end() -> None:
    def broken(stage: Any, size: Size) -> None:
        raise RuntimeError("it fell over")

    outcome = run(Line("broken", "nothing works", broken), Size(), lambda _: None)
    assert not outcome.passed
    assert outcome.problems == ["RuntimeError: it fell over"]


def test_nobody_told_is_a_failure() -> None:
    def idle(stage: Any, size: Size) -> None:
        stage.flow()

    outcome = run(Line("idle", "nothing happens", idle), Size(), lambda _: None)
    assert outcome.problems == ["nobody was told anything: nothing was shown"]


# ---- its accounts

Logs = dict[int, StreamEntries]
Queues = dict[str, StreamEntries]


@pytest.fixture(scope="module")
def history() -> tuple[Logs, Queues]:
    """One log: phones, an alert, its end; and the queues that it gives."""
    alert = growing_alert("a", NOW_MS + 1, 60.0)
    entries: list[tuple[int, LogEntry]] = [
        (NOW_MS, replace(SETTINGS, shard_count=1)),
        (NOW_MS + 1, somewhere(phones(1, 50), np.random.default_rng(1), NOW_MS, 0.5)),
        (NOW_MS + 2, AlertRevision("publish", alert, (1, 0))),
        (NOW_MS + 3, AlertClose("a", 2, "found", (2, 0))),
    ]
    log: StreamEntries = []
    for at_ms, entry in entries:
        kind, payload = encode_entry(entry)
        log.append((format_id((at_ms, 0)).encode(), {kind: payload}))
    logs = {0: log}
    return logs, queues_of(logs, PARTNERS)


def altered(history: tuple[Logs, Queues], change: Any) -> Account:
    logs, queues = history
    queues = {key: list(entries) for key, entries in queues.items()}
    change(queues)
    return account(logs, queues, PARTNERS)


def first_of(queues: Queues, kind: bytes) -> tuple[str, int]:
    """Key and position of the first entry of a kind."""
    return next((key, at) for key, found in queues.items() for at, (_, fields) in enumerate(found) if kind in fields)


def test_queues_as_they_must_be_are_clean(history: tuple[Logs, Queues]) -> None:
    found = altered(history, lambda queues: None)
    assert found.clean
    assert found.pushes == 100


def test_a_lost_entry_is_missed(history: tuple[Logs, Queues]) -> None:
    def lose(queues: Queues) -> None:
        key, at = first_of(queues, b"alert")
        del queues[key][at]

    found = altered(history, lose)
    assert not found.clean
    assert (found.missed, found.extra, found.duplicate, found.unretracted, found.differing) == (25, 0, 0, 0, 1)


def test_a_lost_end_leaves_devices_unretracted(history: tuple[Logs, Queues]) -> None:
    def lose(queues: Queues) -> None:
        key, at = first_of(queues, b"resolved")
        del queues[key][at]

    found = altered(history, lose)
    assert (found.missed, found.unretracted) == (25, 25)


def test_an_entry_under_a_second_id_is_a_duplicate(history: tuple[Logs, Queues]) -> None:
    def repeat(queues: Queues) -> None:
        key, at = first_of(queues, b"alert")
        ms, seq = parse_id(queues[key][at][0])
        queues[key].append((format_id((ms + 9, seq)).encode(), queues[key][at][1]))

    found = altered(history, repeat)
    assert (found.missed, found.duplicate, found.differing) == (0, 25, 1)


def test_an_entry_of_another_partner_is_extra(history: tuple[Logs, Queues]) -> None:
    def mix_up(queues: Queues) -> None:
        key, at = first_of(queues, b"alert")
        (other,) = queues.keys() - {key}
        queues[other].insert(0, queues[key].pop(at))

    found = altered(history, mix_up)
    assert (found.missed, found.extra) == (25, 25)


def test_an_entry_under_another_id_differs(history: tuple[Logs, Queues]) -> None:
    def rename(queues: Queues) -> None:
        key, at = first_of(queues, b"alert")
        ms, seq = parse_id(queues[key][at][0])
        queues[key][at] = format_id((ms, seq + 1)).encode(), queues[key][at][1]

    found = altered(history, rename)
    assert (found.missed, found.extra, found.duplicate, found.differing) == (0, 0, 0, 2)
    assert not found.clean


# ---- an offline partner's figures


def turns_of(p99_ms: list[float]) -> Turns:
    return Turns([p99 / 2 for p99 in p99_ms], p99_ms, 60 * len(p99_ms))


def test_turns_are_compared_by_their_medians() -> None:
    measured: Measured = {}
    compare_turns(measured, turns_of([4.0] * 19 + [400.0]), turns_of([4.2] * 20))
    assert (measured["p99_ms_while_it_reads"], measured["p99_ms_while_it_is_away"]) == (4.0, 4.2)
    assert (measured["p50_ratio"], measured["p99_ratio"]) == (1.05, 1.05)
    assert (measured["p99_ratio_from"], measured["p99_ratio_to"]) == (1.05, 1.05)
    assert measured["entries_measured_while_away"] == 1200


def test_a_p99_that_is_surely_higher_is_a_failure() -> None:
    with pytest.raises(RuntimeError, match=r"p99 must stay within 1\.1 times what it was, it is 1\.250 times"):
        compare_turns({}, turns_of([4.0] * 20), turns_of([5.0] * 20))


def test_a_p99_that_is_higher_by_chance_or_in_few_turns_is_none() -> None:
    measured: Measured = {}
    compare_turns(measured, turns_of([4.0, 6.0] * 10), turns_of([3.9, 7.4] * 10))
    assert cast(float, measured["p99_ratio"]) > 1.1 > cast(float, measured["p99_ratio_from"])
    compare_turns(measured, turns_of([4.0]), turns_of([8.0]))
    assert measured["p99_ratio"] == 2.0


# ---- the command


@pytest.fixture
def app() -> typer.Typer:
    found = typer.Typer()
    found.command()(command.soak)
    return found


def test_the_list_names_every_line_once(app: typer.Typer) -> None:
    done = CliRunner(env={"COLUMNS": "400"}).invoke(app, ["--list"])
    assert done.exit_code == 0, done.output
    names = re.findall(r"^([a-z0-9-]+) {3}", done.stdout, re.MULTILINE)
    assert names[1:] == [line.name for line in LINES]
    lines = json.loads(CliRunner().invoke(app, ["--list", "--json"]).stdout)["lines"]
    assert [line["command"] for line in lines] == [line.command for line in LINES]


def test_a_line_that_does_not_exist_is_wrong_usage(app: typer.Typer) -> None:
    done = CliRunner().invoke(app, ["kill-everybody"])
    assert done.exit_code == 2
    assert "there is no line 'kill-everybody'" in done.stderr


@pytest.mark.parametrize(("problems", "not_here", "code"), [([], None, 0), (["lost"], None, 1), ([], "needs root", 1)])
def test_the_exit_code_says_whether_all_passed(
    problems: list[str], not_here: str | None, code: int, app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcome(line: Line, *_: Any) -> Outcome:
        clean = Account(1, 0, 0, 0, 0, 0)
        return Outcome(line.name, line.fault, line.command, 1.0, clean, {}, problems, not_here)

    monkeypatch.setattr(runner, "run", outcome)
    done = CliRunner().invoke(app, ["burst", "kill-flow", "--json"])
    assert done.exit_code == code
    found = json.loads(done.stdout)
    assert found["passed"] is (code == 0)
    assert [line["name"] for line in found["lines"]] == ["burst", "kill-flow"]
    # Of all lines, those that this machine cannot play are named and not held against it.
    assert CliRunner().invoke(app, []).exit_code == int(bool(problems))
