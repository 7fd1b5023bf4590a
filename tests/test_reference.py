"""The reference follows the 15 rules: every worked example gives exactly the pushes worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import h3
import numpy as np
import pytest

from tests.reference.events import Log
from tests.reference.examples.builders import SETTINGS, T0, TOLERANCE, WINDOW
from tests.reference.matcher import ReferenceMatcher, by_device_and_alert, great_circle_km, run_reference
from tests.reference.worked_examples import EXAMPLES, Example


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"rule {example.rule}: {example.name}" for example in EXAMPLES])
def test_worked_example_gives_exactly_the_pushes_worked_out_by_hand(example: Example) -> None:
    matcher = run_reference(Log(example.settings, example.events))
    assert by_device_and_alert(matcher.pushes) == by_device_and_alert(example.expected_pushes)
    assert all(earlier.at_ms <= later.at_ms for earlier, later in pairwise(matcher.pushes))


def test_every_rule_has_worked_examples() -> None:
    assert {example.rule for example in EXAMPLES} == set(range(1, 16))
    assert len({example.name for example in EXAMPLES}) == len(EXAMPLES)


@pytest.mark.parametrize(
    ("lat", "lng"), [(math.nan, 0.0), (0.0, math.nan), (math.inf, 0.0), (0.0, -math.inf), (90.1, 0.0), (0.0, 180.1)]
)
def test_coordinates_that_are_not_finite_or_out_of_range_are_refused(lat: float, lng: float) -> None:
    matcher = ReferenceMatcher(SETTINGS)
    matcher.ping(T0, "amap", "phone", lat, lng, T0)
    assert matcher.refused == {"bad_coordinates": 1}
    assert matcher.locations == {}


def test_refused_pings_are_counted_by_reason() -> None:
    matcher = ReferenceMatcher(SETTINGS)
    matcher.ping(T0, "nobody", "phone", 0.0, 0.0, T0)
    matcher.ping(T0, "amap", "", 0.0, 0.0, T0)
    matcher.ping(T0, "amap", "\ud800", 0.0, 0.0, T0)
    matcher.ping(T0, "amap", "phone", 91.0, 0.0, T0)
    matcher.ping(T0, "amap", "phone", 0.0, 0.0, T0 + TOLERANCE + 1)
    matcher.ping(T0, "amap", "phone", 0.0, 0.0, T0 - WINDOW - 1)
    expected = {"unknown_partner": 1, "bad_id": 2, "bad_coordinates": 1, "from_future": 1, "too_old": 1}
    assert matcher.refused == expected


def test_location_is_wiped_once_it_is_older_than_the_live_window() -> None:
    matcher = ReferenceMatcher(SETTINGS)
    matcher.ping(T0, "amap", "phone", 0.0, 0.0, T0)
    matcher.tick(T0 + WINDOW)
    assert list(matcher.locations) == [("amap", "phone")]
    matcher.tick(T0 + WINDOW + 1)
    assert matcher.locations == {}


def test_one_degree_of_latitude_is_111_19508_km() -> None:
    assert great_circle_km(30.0, 114.0, 31.0, 114.0) == pytest.approx(111.19508023, abs=1e-8)
    assert great_circle_km(0.0, 0.0, 0.0, 180.0) == pytest.approx(6371.0088 * math.pi, abs=1e-8)


def test_great_circle_agrees_with_h3_on_the_sphere_of_rule_5() -> None:
    """H3 has the same formula on a radius of 6371.007180918475 km, 25 cm less in 1,000 km."""
    rng = np.random.default_rng(5)
    for _ in range(500):
        start, end = ((float(rng.uniform(-90, 90)), float(rng.uniform(-180, 180))) for _ in range(2))
        expected_km = h3.great_circle_distance(start, end, unit="km") / 6371.007180918475 * 6371.0088
        assert great_circle_km(*start, *end) == pytest.approx(expected_km, abs=1e-6)


def test_clock_that_runs_backwards_is_a_programmer_error() -> None:
    matcher = ReferenceMatcher(SETTINGS)
    matcher.tick(T0)
    with pytest.raises(AssertionError, match="never runs backwards"):
        matcher.tick(T0 - 1)
