"""The clock of a recording: worked examples, then the kernels against slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.file_clock import LOOKAHEAD_ROWS, NO_CLOCK, clock_of_arrivals, clock_of_observations
from geoindex.columns import I64

TOLERANCE_MS = 300_000
T0 = 1_700_000_000_000


def column(times_ms: list[int]) -> I64:
    return np.array(times_ms, np.int64)


def arrivals(
    arrived_at_ms: list[int], observed_at_ms: list[int], clock_ms: int = NO_CLOCK
) -> tuple[list[int], list[bool], int]:
    """(clock of each row, whether it is accepted, the clock afterwards)."""
    at_ms, accepted = np.zeros(len(observed_at_ms), np.int64), np.zeros(len(observed_at_ms), np.bool_)
    after_ms = clock_of_arrivals(column(arrived_at_ms), column(observed_at_ms), clock_ms, TOLERANCE_MS, at_ms, accepted)
    return at_ms.tolist(), accepted.tolist(), int(after_ms)


def observations(
    observed_at_ms: list[int], rows: int | None = None, clock_ms: int = NO_CLOCK
) -> tuple[list[int], list[bool], int]:
    """Likewise for the first `rows` rows (all of them unless said otherwise)."""
    count = len(observed_at_ms) if rows is None else rows
    at_ms, accepted = np.zeros(count, np.int64), np.zeros(count, np.bool_)
    after_ms = clock_of_observations(column(observed_at_ms), count, clock_ms, TOLERANCE_MS, at_ms, accepted)
    return at_ms.tolist(), accepted.tolist(), int(after_ms)


# ---- worked examples: with an `at` column


def test_with_arrivals_the_clock_is_their_running_maximum() -> None:
    arrived = [T0, T0 + 10, T0 + 5, T0 + 10, T0 + 20]
    assert arrivals(arrived, [T0] * 5) == ([T0, T0 + 10, T0 + 10, T0 + 10, T0 + 20], [True] * 5, T0 + 20)


def test_with_arrivals_the_clock_goes_on_where_it_stood() -> None:
    assert arrivals([T0 - 7], [T0 - 7], clock_ms=T0) == ([T0], [True], T0)


def test_with_arrivals_a_ping_exactly_the_tolerance_ahead_is_accepted_and_one_millisecond_more_is_not() -> None:
    observed = [T0 + TOLERANCE_MS, T0 + TOLERANCE_MS + 1]
    at_ms, accepted, after_ms = arrivals([T0, T0], observed)
    assert accepted == [True, False]
    assert (at_ms[0], after_ms) == (T0, T0)


def test_with_arrivals_a_ping_from_the_future_does_not_move_the_clock() -> None:
    """Neither by its observation nor by its own arrival: nobody knows which of the two is wrong."""
    at_ms, accepted, after_ms = arrivals([T0, T0 + 1000, T0 + 500], [T0, T0 + 1001 + TOLERANCE_MS, T0])
    assert accepted == [True, False, True]
    assert (at_ms[0], at_ms[2], after_ms) == (T0, T0 + 500, T0 + 500)


def test_with_arrivals_an_old_observation_is_accepted_here() -> None:
    """What is older than the live window is the shard machine's business."""
    assert arrivals([T0], [0])[1] == [True]


def test_with_arrivals_an_ahead_ping_is_measured_against_the_clock_when_that_is_ahead_of_its_arrival() -> None:
    assert arrivals([T0, T0 - 60_000], [T0, T0 + TOLERANCE_MS])[1] == [True, True]


def test_no_rows_leave_the_clock_where_it_was() -> None:
    assert arrivals([], [], clock_ms=T0) == ([], [], T0)
    assert observations([], clock_ms=T0) == ([], [], T0)
    assert observations([]) == ([], [], NO_CLOCK)


# ---- worked examples: by observations alone


def test_by_observations_the_first_ping_sets_the_clock_whatever_it_says() -> None:
    assert observations([T0 + 10**12]) == ([T0 + 10**12], [True], T0 + 10**12)


def test_by_observations_the_clock_is_the_running_maximum() -> None:
    assert observations([T0, T0 + 9, T0 + 3]) == ([T0, T0 + 9, T0 + 9], [True] * 3, T0 + 9)


def test_by_observations_a_ping_within_the_tolerance_moves_the_clock() -> None:
    observed = [T0, T0 + TOLERANCE_MS, T0]
    assert observations(observed) == ([T0, T0 + TOLERANCE_MS, T0 + TOLERANCE_MS], [True] * 3, T0 + TOLERANCE_MS)


def test_by_observations_one_phone_a_day_ahead_is_from_the_future_and_moves_nothing() -> None:
    day_ms = 86_400_000
    assert observations([T0, T0 + day_ms, T0 + 1]) == ([T0, T0, T0 + 1], [True, False, True], T0 + 1)


def test_by_observations_a_gap_is_a_gap_if_the_file_does_not_come_back() -> None:
    night_ms = 8 * 3_600_000
    observed = [T0, T0 + night_ms, T0 + night_ms + 1]
    assert observations(observed) == (observed, [True] * 3, T0 + night_ms + 1)


def test_by_observations_the_file_comes_back_at_clock_and_tolerance_exactly() -> None:
    jump_ms = T0 + 10 * TOLERANCE_MS
    assert observations([T0, jump_ms, T0 + TOLERANCE_MS])[1] == [True, False, True]
    assert observations([T0, jump_ms, T0 + TOLERANCE_MS + 1])[1] == [True, True, True]


@pytest.mark.parametrize(("pings_between", "from_the_future"), [(LOOKAHEAD_ROWS - 1, True), (LOOKAHEAD_ROWS, False)])
def test_by_observations_it_comes_back_within_a_hundred_rows_or_not_at_all(
    pings_between: int, from_the_future: bool
) -> None:
    jump_ms = T0 + 10 * TOLERANCE_MS
    observed = [T0, jump_ms] + [jump_ms] * pings_between + [T0]
    assert observations(observed)[1][1] is not from_the_future


def test_by_observations_rows_beyond_those_asked_for_are_only_looked_at() -> None:
    jump_ms = T0 + 10 * TOLERANCE_MS
    assert observations([T0, jump_ms, T0], rows=2) == ([T0, T0], [True, False], T0)
    assert observations([T0, jump_ms], rows=2) == ([T0, jump_ms], [True, True], jump_ms)


def test_the_clock_may_stand_before_1970() -> None:
    assert observations([-5, -3]) == ([-5, -3], [True, True], -3)
    assert arrivals([-5, -3], [-5, -3]) == ([-5, -3], [True, True], -3)


# ---- against slow references


def slow_arrivals(
    arrived_at_ms: list[int], observed_at_ms: list[int], clock_ms: int, tolerance_ms: int
) -> tuple[list[int | None], list[bool], int]:
    """The clock of a row that is not accepted is nobody's business: None."""
    clocks: list[int | None] = []
    accepted = []
    for arrived, observed in zip(arrived_at_ms, observed_at_ms, strict=True):
        own_ms = arrived if clock_ms == NO_CLOCK else max(clock_ms, arrived)
        good = observed - own_ms <= tolerance_ms
        if good:
            clock_ms = own_ms
        clocks.append(own_ms if good else None)
        accepted.append(good)
    return clocks, accepted, clock_ms


def slow_observations(
    observed_at_ms: list[int], rows: int, clock_ms: int, tolerance_ms: int
) -> tuple[list[int | None], list[bool], int]:
    clocks: list[int | None] = []
    accepted = []
    for row, observed in enumerate(observed_at_ms[:rows]):
        following = observed_at_ms[row + 1 : row + 1 + LOOKAHEAD_ROWS]
        jumps = clock_ms != NO_CLOCK and observed - clock_ms > tolerance_ms
        comes_back = jumps and min(following, default=observed) - clock_ms <= tolerance_ms
        if not comes_back:
            clock_ms = observed if clock_ms == NO_CLOCK else max(clock_ms, observed)
        clocks.append(None if comes_back else clock_ms)
        accepted.append(not comes_back)
    return clocks, accepted, clock_ms


def known(at_ms: list[int], accepted: list[bool]) -> list[int | None]:
    return [time_ms if good else None for time_ms, good in zip(at_ms, accepted, strict=True)]


# Few distinct values around the limits, so that ties and near misses are common.
times = st.sampled_from([0, 1, 2]).flatmap(
    lambda jumps: st.integers(-3, 3).map(lambda off: T0 + jumps * (TOLERANCE_MS + 1) + off)
)
clocks = st.one_of(st.just(NO_CLOCK), times)


@settings(max_examples=300, deadline=None)
@given(rows=st.lists(st.tuples(times, times), max_size=30), clock_ms=clocks)
def test_the_clock_of_arrivals_is_that_of_the_slow_reference(rows: list[tuple[int, int]], clock_ms: int) -> None:
    arrived, observed = [row[0] for row in rows], [row[1] for row in rows]
    at_ms, accepted, after_ms = arrivals(arrived, observed, clock_ms)
    assert (known(at_ms, accepted), accepted, after_ms) == slow_arrivals(arrived, observed, clock_ms, TOLERANCE_MS)


@settings(max_examples=300, deadline=None)
@given(observed=st.lists(times, max_size=40), clock_ms=clocks, ahead=st.integers(0, 10))
def test_the_clock_of_observations_is_that_of_the_slow_reference(
    observed: list[int], clock_ms: int, ahead: int
) -> None:
    rows = max(0, len(observed) - ahead)
    at_ms, accepted, after_ms = observations(observed, rows, clock_ms)
    assert (known(at_ms, accepted), accepted, after_ms) == slow_observations(observed, rows, clock_ms, TOLERANCE_MS)


@pytest.mark.parametrize("seed", range(20))
def test_a_long_recording_has_the_clock_of_the_slow_reference_however_it_is_cut(seed: int) -> None:
    rng = np.random.default_rng(seed)
    observed_at_ms = T0 + np.cumsum(rng.integers(0, 2000, 2000))
    # Runs of wrong clocks about as long as the look-ahead, single ones, and nights.
    for start in rng.integers(0, 1900, 12):
        observed_at_ms[start : start + rng.choice([1, 2, 99, 100, 101])] += int(rng.choice([301_000, 86_400_000]))
    for start in rng.integers(0, 2000, 2):
        observed_at_ms[start:] += 8 * 3_600_000
    observed = [int(time_ms) for time_ms in observed_at_ms]
    expected = slow_observations(observed, len(observed), NO_CLOCK, TOLERANCE_MS)
    assert 0 < sum(not good for good in expected[1]) < 1500

    found_clocks: list[int | None] = []
    found_accepted: list[bool] = []
    clock_ms, start = NO_CLOCK, 0
    while start < len(observed):
        rows = min(int(rng.integers(1, 400)), len(observed) - start)
        window = observed[start : start + rows + LOOKAHEAD_ROWS]
        at_ms, accepted, clock_ms = observations(window, rows, clock_ms)
        found_clocks += known(at_ms, accepted)
        found_accepted += accepted
        start += rows
    assert (found_clocks, found_accepted, clock_ms) == expected
