"""Small worlds hold every promise, and broken programs do not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loadtest.simulation.mutations import MUTATIONS, mutated
from loadtest.simulation.run import run_seed, run_seeds

FAULTS = (
    *("deaths", "interleavings", "link_breaks", "lost_replies", "batches_sent_again", "duplicated_batches"),
    *("delayed_batches", "consumers_died", "server_restarts", "lost_tails", "power_failures", "out_of_memory"),
    *("refused_writes", "partitions", "pauses", "reshards", "zombies", "clean_stops", "short_writes", "clock_jumps"),
)


def test_worlds_full_of_faults_hold_every_promise() -> None:
    totals = run_seeds(range(40))
    assert totals.as_json()["failing_seeds"] == []
    assert totals.pushes > 1000
    assert [name for name in FAULTS if not totals.faults[name]] == []


def test_a_seed_is_a_run() -> None:
    program = "import logging; from loadtest.simulation.run import run_seed; print(run_seed(7).trace_hash)"
    elsewhere = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    first, second = run_seeds([7]), run_seeds([7])
    assert first.faults == second.faults
    assert run_seed(7).trace_hash == elsewhere.stdout.strip()
    assert run_seed(8).trace_hash != run_seed(7).trace_hash


FOUND_BY = {
    "trims-too-early": 1,
    "final-before-done": 5,
    "takes-any-checkpoint": 10,
    "without-checksums": 66,
    "without-sync": 9,
    "wipes-at-checkpoint": 1,
    "forgets-told": 3,
    "forgets-closed": 3,
    "sweeps-at-restart": 1,
    "reverses-free-rows": 81,
    "writes-for-another-run": 3,
    "reads-another-run": 10,
    "ignores-trimmed": 219,
    "full-reader-is-blind": 0,
    "plain-pipeline": 13,
    "skips-refused-blocks": 8,
    "lost-replies-are-success": 5,
    "done-before-pushes": 0,
    "done-with-a-part": 0,
    "done-may-turn-back": 157,
    "ids-of-the-server": 0,
    "grows-late": 2,
    "late-pings-move": 0,
    "edits-again": 17,
    "watches-nothing": 45,
    "marks-before-copying": 3,
    "copies-without-desk-id": 0,
}
"""A seed that finds each mutation; `tuanyuan simulate --mutation NAME --seeds 400` tells others."""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_program_is_found(name: str) -> None:
    totals = run_seeds([FOUND_BY[name]], mutation=name)
    assert totals.failed, MUTATIONS[name].words


def test_a_mutation_ends_where_it_should() -> None:
    with mutated("plain-pipeline"):
        pass
    assert run_seeds([FOUND_BY["plain-pipeline"]]).failed == []


def test_mutations_reach_other_processes() -> None:
    totals = run_seeds(range(2), jobs=2, mutation="ids-of-the-server")
    assert [result.seed for result in sorted(totals.failed, key=lambda result: result.seed)] == [0, 1]
