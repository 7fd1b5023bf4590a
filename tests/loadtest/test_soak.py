"""The fault table at its small size, and that its accounts notice what is wrong."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from loadtest.soak.accounts import account
from loadtest.soak.runner import run
from loadtest.soak.table import LINES, Line

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("line", [line for line in LINES if line.play is not None], ids=lambda line: line.name)
def test_nothing_is_lost_and_nothing_comes_twice(line: Line) -> None:
    said: list[str] = []
    outcome = run(line, line.small, said.append)
    if outcome.not_here:
        pytest.skip(outcome.not_here)
    assert outcome.passed, (outcome.problems, said)
    assert outcome.account is not None
    assert outcome.account.pushes > 0
