"""Ask pip-audit whether anything that is shipped has a known weakness; and say loudly when nobody could be asked.

    found something           every weakness, and exit code 1
    asked about everything    one line
    could not ask             a warning that cannot be overlooked, and exit code 0: a machine without the network must
                              be able to work. With `--strict`, for whoever releases: exit code 1.

    python scripts/known_weaknesses.py requirements/run.txt [--strict]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TIMEOUT_S = 180.0
"""For all of it: one question a package."""
ANSWER_TIMEOUT_S = 10
_UNREACHABLE = re.compile(
    r"ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|NewConnectionError|NameResolutionError"
    r"|Max retries exceeded|Could not connect|Tip: your network may be blocking|ServiceError|HTTPError"
)
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Verdict:
    """What came of asking."""

    weaknesses: list[str] = field(default_factory=list)
    asked_count: int = 0
    unasked: list[str] = field(default_factory=list)
    """Packages that nothing could be learnt about, each with the reason."""
    failure: str | None = None
    """Why pip-audit itself did not work."""


def judge(report: str, errors: str) -> Verdict:
    """`report`: what pip-audit wrote as JSON, or nothing; `errors`: what it said."""
    try:
        packages: list[dict[str, Any]] = json.loads(report)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = "\n".join(errors.strip().splitlines()[-_SHOWN_LINES:]) or "it said nothing"
        if _UNREACHABLE.search(errors):
            return Verdict(unasked=[f"all packages: {last}"])
        return Verdict(failure=last)
    weaknesses = [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", [])
    ]
    unasked = [f"{package['name']}: {package['skip_reason']}" for package in packages if "skip_reason" in package]
    return Verdict(weaknesses, len(packages) - len(unasked), unasked)


def ask(lock: Path) -> Verdict:
    """Run pip-audit over a lock file, whose packages it need not install."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--require-hashes"]
        command += ["--format", "json", "--output", str(report), "--progress-spinner", "off"]
        command += ["--timeout", str(ANSWER_TIMEOUT_S)]
        try:
            ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Verdict(unasked=[f"all packages: no answer within {TIMEOUT_S:.0f} s"])
        return judge(report.read_text() if report.exists() else "", ended.stderr)


def exit_code(verdict: Verdict, lock: Path, strict: bool) -> int:
    """Say what came of it."""
    if verdict.failure is not None:
        print(f"error: pip-audit does not work on {lock}:\n{verdict.failure}", file=sys.stderr)
        return 1
    for weakness in verdict.weaknesses:
        print(f"error: known weakness: {weakness}", file=sys.stderr)
    if verdict.unasked:
        bar = "!" * 100
        print(f"{bar}\nWARNING: known weaknesses of {lock} were NOT looked up; nobody could be asked:", file=sys.stderr)
        for reason in verdict.unasked[:_SHOWN_LINES]:
            print(f"    {reason}", file=sys.stderr)
        if len(verdict.unasked) > _SHOWN_LINES:
            print(f"    and {len(verdict.unasked) - _SHOWN_LINES} more", file=sys.stderr)
        print(f"Run `make check` again where there is a network, before this is shipped.\n{bar}", file=sys.stderr)
    if verdict.asked_count and not verdict.weaknesses:
        print(f"{lock}: no known weakness in {verdict.asked_count} packages")
    return 1 if verdict.weaknesses or (strict and verdict.unasked) else 0


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description="Look up known weaknesses of what a lock file names.")
    parser.add_argument("lock", type=Path, help="as requirements/run.txt")
    parser.add_argument("--strict", action="store_true", help="fail also when nobody could be asked")
    options = parser.parse_args()
    return exit_code(ask(options.lock), options.lock, options.strict)


if __name__ == "__main__":
    raise SystemExit(main())
