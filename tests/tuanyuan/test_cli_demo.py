"""`tuanyuan demo`, small and short: it must verify itself, and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.tuanyuan import Ran, Running, compile_kernels, run

SMALL = ("--phones", "20000", "--rate", "5000")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    compile_kernels(folder)
    return folder


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """Where the demo keeps its temporary files: a short path, for a socket's has 100 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as scratch:
        yield Path(scratch)


@pytest.fixture(scope="module")
def shown(folder: Path, scratch: Path) -> Ran:
    """One demo."""
    return run("demo", "--seconds", "9", *SMALL, folder=folder, timeout_s=100, TMPDIR=str(scratch))


def test_the_demo_verifies_every_push(shown: Ran) -> None:
    assert shown.code == 0, shown.err
    verified = re.search(r"verified: ([\d,]+) pushes, 0 missed, 0 extra, 0 duplicate\n\Z", shown.out)
    assert verified, shown.out[-300:]
    assert int(verified[1].replace(",", "")) > 0
    assert shown.err.startswith("A world of 20,000 phones by the population of real places, 5,000 pings/s, for 8 s")


def test_the_demos_verdict_is_a_line_of_its_own(shown: Ran) -> None:
    assert shown.out.splitlines()[-1].startswith("verified: ")


def test_the_demos_last_view_shows_the_end_and_everyone_told_of_it(shown: Ran) -> None:
    assert "found. Everyone told hears of it." in shown.out
    told = re.findall(r"^([a-z]+) +([\d,]+) +([\d,]+)", shown.out, re.MULTILINE)
    assert {partner for partner, _, _ in told} == {"amap", "ditu", "chuxing", "xinwen", "zhifu", "dianxin"}
    assert all(alert == resolved != "0" for _, alert, resolved in told), told


def test_the_demo_leaves_nothing_behind(shown: Ran, scratch: Path) -> None:
    assert shown.code == 0
    assert os.listdir(scratch) == []


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, signal.SIGTERM],
)
def test_a_signal_ends_the_demo_its_flow_and_its_server(number: signal.Signals, folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp", ignore_cleanup_errors=True) as scratch,
        Running("demo", "--seconds", "60", *SMALL, folder=folder, TMPDIR=scratch) as demo,
    ):
        process = psutil.Process(demo.pid)
        children: list[psutil.Process] = []
        try:
            while len(children) < 2:
                assert demo.code is None, demo.err
                children = process.children(recursive=True)
                time.sleep(0.1)
            time.sleep(2)  # the flow is up
            ended = demo.end(number)
            assert ended.code == 128 + number, ended.err
            assert "Traceback" not in ended.err
            assert [child for child in children if is_alive(child)] == []
            assert os.listdir(scratch) == []
        finally:
            for child in children:
                if is_alive(child):
                    child.kill()
            psutil.wait_procs(children, 5)


def is_alive(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
