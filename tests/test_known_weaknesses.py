"""The look-up of known weaknesses: what was found stops, what could not be asked is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.known_weaknesses import Verdict, exit_code, judge

LOCK = Path("requirements/run.txt")
SOUND = {"name": "a", "version": "1.0", "vulns": []}
WEAK = {"name": "b", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"], "description": ""}]}
SKIPPED = {"name": "c", "skip_reason": "not found"}


def report(*packages: dict[str, object]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


def test_sound_packages_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(judge(report(SOUND, SOUND), ""), LOCK, strict=True) == 0
    assert capsys.readouterr().out == "requirements/run.txt: no known weakness in 2 packages\n"


def test_a_known_weakness_stops(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(judge(report(SOUND, WEAK), "Found 1 known vulnerability"), LOCK, strict=False) == 1
    said = capsys.readouterr()
    assert said.err == "error: known weakness: b 2.0: CVE-1, mended in 2.1\n"
    assert said.out == ""


@pytest.mark.parametrize(
    "errors",
    [
        "requests.exceptions.ConnectionError: Max retries exceeded",
        "pip_audit._service.interface.ServiceError",
        "ERROR:pip_audit._cli:Could not connect to the feed\nERROR:pip_audit._cli:Tip: your network may be blocking",
    ],
)
def test_a_machine_without_the_network_passes_and_says_so(errors: str, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge("", errors)
    assert exit_code(verdict, LOCK, strict=False) == 0
    said = capsys.readouterr()
    assert "WARNING: known weaknesses of requirements/run.txt were NOT looked up" in said.err
    assert said.out == ""
    assert exit_code(verdict, LOCK, strict=True) == 1


def test_packages_that_nothing_could_be_learnt_about_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(judge(report(SOUND, SKIPPED), ""), LOCK, strict=False) == 0
    said = capsys.readouterr()
    assert "    c: not found\n" in said.err
    assert "no known weakness in 1 packages" in said.out


def test_a_weakness_counts_also_when_others_could_not_be_asked() -> None:
    assert exit_code(judge(report(WEAK, SKIPPED), ""), LOCK, strict=False) == 1


def test_a_pip_audit_that_does_not_work_is_not_a_missing_network(capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge("", "usage: pip-audit\npip-audit: error: unrecognized arguments: --nonsense")
    assert verdict == Verdict(failure="usage: pip-audit\npip-audit: error: unrecognized arguments: --nonsense")
    assert exit_code(verdict, LOCK, strict=False) == 1
    assert "does not work" in capsys.readouterr().err
