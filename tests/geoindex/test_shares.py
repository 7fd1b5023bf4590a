"""Rows shared out among cores: each exactly once, in order."""

from __future__ import annotations

import threading

import pytest

from geoindex import shares
from geoindex.shares import core_count, in_shares


@pytest.fixture(params=[1, 2, 5])
def cores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count = int(request.param)
    monkeypatch.setattr(shares, "core_count", lambda: count)
    return count


@pytest.mark.parametrize("row_count", [0, 1, 9, 10, 19, 20, 57, 1000])
def test_every_row_is_in_one_share(row_count: int, cores: int) -> None:
    ranges = in_shares(lambda first, stop: range(first, stop), row_count, 10)
    assert [row for rows in ranges for row in rows] == list(range(row_count))
    assert len(ranges) <= cores
    assert len(ranges) == 1 or min(map(len, ranges)) >= 10


def test_shares_run_at_the_same_time(cores: int) -> None:
    together = threading.Barrier(cores, timeout=10)
    assert len(in_shares(lambda first, stop: together.wait(), 1000, 1)) == cores


@pytest.mark.parametrize("failing", [0, 999])
def test_what_a_share_raises_is_raised(failing: int, cores: int) -> None:
    def work(first: int, stop: int) -> None:
        if first <= failing < stop:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        in_shares(work, 1000, 1)


def test_there_is_a_core() -> None:
    assert core_count() >= 1
