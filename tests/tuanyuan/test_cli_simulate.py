"""`tuanyuan simulate` as a user and a program see it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from loadtest.simulation import run
from loadtest.simulation.mutations import MUTATIONS
from loadtest.simulation.run import SeedResult
from tuanyuan.commands.simulate import simulate


def ran(*arguments: str) -> Any:
    app = typer.Typer()
    app.command()(simulate)
    return CliRunner().invoke(app, list(arguments))


def test_one_json_object_says_what_was_found() -> None:
    done = ran("--first", "3", "--seeds", "2", "--jobs", "1", "--json")
    assert done.exit_code == 0, done.output
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["seeds"], found["violations"], found["failing_seeds"]) == (2, 0, [])
    assert (found["played_to_the_end"], found["beyond_repair"], found["beyond_repair_seeds"]) == (2, 0, [])
    assert found["turns"] > 0
    assert found["seconds"] > 0
    assert found["faults"]["interleavings"] > 0


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_seed_beyond_repair_is_told_apart_from_those_that_were_played_to_the_end(
    json_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_early(seed: int) -> SeedResult:
        return SeedResult(seed, [], [], "", 30, 0, Counter(), is_beyond_repair=seed == 8)

    monkeypatch.setattr(run, "run_seed", ends_early)
    done = ran("--first", "7", "--seeds", "3", "--jobs", "1", *(["--json"] if json_wanted else []))
    assert done.exit_code == 0, done.output
    if json_wanted:
        found = json.loads(done.stdout)
        assert (found["seeds"], found["played_to_the_end"], found["beyond_repair"]) == (3, 2, 1)
        assert (found["beyond_repair_seeds"], found["failing_seeds"]) == ([8], [])
    else:
        assert done.stdout.startswith("3 seeds, 0 violations, 90 turns")
        assert "2 played to the end, 1 beyond repair: disk faults left no checkpoint" in done.stdout
        assert "of seeds 8\n" in done.stdout


@pytest.mark.parametrize("json_wanted", [False, True])
def test_a_failing_seed_is_printed_with_its_story_and_how_to_play_it_again(json_wanted: bool) -> None:
    done = ran("--seed", "0", "--mutation", "ids-of-the-server", *(["--json"] if json_wanted else []))
    assert done.exit_code == 1
    if json_wanted:
        assert json.loads(done.stdout)["failing_seeds"] == [0]
    else:
        assert done.stdout.startswith("1 seeds, ")
    assert "seed 0: " in done.stderr
    assert "flow-1: shard 1 starts behind" in done.stderr
    assert "\n  violated: " in done.stderr
    assert "again: tuanyuan simulate --seed 0 --mutation ids-of-the-server" in done.stderr


def test_the_trace_of_a_good_seed_is_shown_when_it_is_asked_for() -> None:
    done = ran("--seed", "3", "--trace")
    assert done.exit_code == 0, done.output
    assert "flow-1: shard 1 starts behind" in done.stderr
    assert " quiet" in done.stderr


def test_every_mutation_is_listed_with_its_words() -> None:
    done = ran("--list-mutations")
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(MUTATIONS)
    assert all(known.words in done.stdout for known in MUTATIONS.values())
