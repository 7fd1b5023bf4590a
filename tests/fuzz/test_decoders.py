"""A short run of the fuzzer, and proof that it would notice. `make fuzz` is the long one."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris has wheels for Linux alone")


def fuzz(folder: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """The fuzzer in a process of its own: it ends it. `before`: statements that run ahead of it."""
    program = f"from tests.fuzz import decoders\n{before}\ndecoders.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=110,
    )


def test_thousands_of_inputs_break_no_decoder(tmp_path: Path) -> None:
    done = fuzz(tmp_path, "--runs", "4000")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done 4000 runs" in done.stderr
    assert list((tmp_path / "out" / "fuzz").iterdir()) == []


def test_a_decoder_that_loses_a_ping_is_noticed_and_the_input_is_kept(tmp_path: Path) -> None:
    # Refused pings of whole batches are forgotten.
    broken = (
        "genuine = decoders.ping_bodies._judged\n"
        "def forgetful(found, terms):\n"
        "    from dataclasses import replace\n"
        "    result = genuine(found, terms)\n"
        "    return replace(result, received=result.received + (found.positions is None and result.refused > 0))\n"
        "decoders.ping_bodies._judged = forgetful"
    )
    done = fuzz(tmp_path, "--runs", "200000", before=broken)
    assert done.returncode != 0
    assert "AssertionError" in done.stdout + done.stderr
    (kept,) = (tmp_path / "out" / "fuzz").glob("crash-*")
    again = fuzz(tmp_path, str(kept), before=broken)
    assert "AssertionError" in again.stderr
    assert fuzz(tmp_path, str(kept)).returncode == 0
