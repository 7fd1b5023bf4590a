"""The fuzzer of CAP messages starts, reaches deep, and finds nothing within a second or two."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = "tests.fuzz.cap"


def fuzz(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", MODULE, *options]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, timeout=100)


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    # No limit: a new process is told the largest memory of the one that started it, here a worker full of tests.
    done = fuzz("-runs=3000", "-seed=1", "-rss_limit_mb=0", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (covered,) = re.findall(r"DONE\s+cov: (\d+)", done.stderr)
    assert int(covered) > 150
    assert list(tmp_path.iterdir()) == []


def test_one_input_is_played_again(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    body = tmp_path / "crash"
    body.write_bytes(b"<alert/>")
    done = fuzz(str(body), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Executed" in done.stderr
