"""The map: nobody can read a phone off it, nor work one out from two maps."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.density import SHOWN_MIN, Density
from gateway.view_map import CELLS_MAX, DELAY_MS, EMPTY, FALLBACK_RESOLUTION, RESOLUTION, DelayedMaps, map_document
from geoindex.cells import ZONE_RESOLUTION, coarse_to_h3

AT_MS = 1_777_617_000_000
PER_CELL = 7 ** (ZONE_RESOLUTION - RESOLUTION)


def density(
    counts: dict[int, int], at_ms: int = AT_MS, newest_ms: int | None = None, missing: tuple[int, ...] = ()
) -> Density:
    """`counts`: phones by zone."""
    zones = sorted(counts)
    return Density(
        zone=np.array(zones, np.uint32),
        partner=np.zeros(len(zones), np.uint16),
        count=np.array([counts[zone] for zone in zones], np.int64),
        partners=("amap",),
        at_ms=at_ms,
        missing=missing,
        left_out=0,
        newest_ms=at_ms if newest_ms is None else newest_ms,
    )


def shown(counts: dict[int, int]) -> dict[str, int]:
    return dict(json.loads(map_document(density(counts)).body)["cells"])


def name(cell: int) -> str:
    """The H3 index of a coarse cell."""
    return f"{int(coarse_to_h3(np.array([cell], np.uint32), RESOLUTION)[0]):x}"


CELL = 50_000
ZONE = CELL * PER_CELL


def test_cells_under_20_phones_are_hidden_and_others_are_in_tens() -> None:
    for phones, expected in ((1, None), (19, None), (20, 20), (24, 20), (25, 30), (1_234, 1_230)):
        assert shown({ZONE: phones}).get(name(CELL)) == expected
    assert shown({ZONE: 10, ZONE + 1: 9, ZONE + 2: 4}) == {name(CELL): 20}


def test_the_map_is_coarser_than_what_shards_count() -> None:
    body = json.loads(map_document(density({ZONE: 100})).body)
    assert body == {"at_ms": AT_MS, "resolution": RESOLUTION, "cells": [[name(CELL), 100]], "shards_missing": []}
    assert RESOLUTION < ZONE_RESOLUTION


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.integers(ZONE, ZONE + 3 * PER_CELL - 1), st.integers(1, 60), max_size=21),
    st.integers(ZONE, ZONE + 3 * PER_CELL - 1),
)
def test_one_phone_more_never_shows_a_number_that_belongs_to_it_alone(counts: dict[int, int], zone: int) -> None:
    """Two maps that differ by one phone: whatever changes could as well be ten others, and nothing small appears."""
    more = counts | {zone: counts.get(zone, 0) + 1}
    before, after = shown(counts), shown(more)
    for cell in before.keys() | after.keys():
        old, new = before.get(cell, 0), after.get(cell, 0)
        assert new in (old, old + 10) or (old == 0 and new == SHOWN_MIN)
        assert new % 10 == 0 and (new == 0 or new >= SHOWN_MIN)
    assert sum(before.get(cell) != after.get(cell) for cell in before.keys() | after.keys()) <= 1


def test_a_hidden_cell_does_not_follow_from_any_sum() -> None:
    """There is no parent, no total and no partner beside it that it could be taken from."""
    body = json.loads(map_document(density({ZONE: 19, ZONE + PER_CELL: 500})).body)
    assert body.keys() == {"at_ms", "resolution", "cells", "shards_missing"}
    assert body["cells"] == [[name(CELL + 1), 500]]


def test_a_map_is_shown_a_minute_after_its_newest_count_and_not_before() -> None:
    maps = DelayedMaps()
    maps.add(density({ZONE: 100}, AT_MS, AT_MS + 40_000))
    assert maps.shown(AT_MS + 40_000 + DELAY_MS - 1) is EMPTY
    found = maps.shown(AT_MS + 40_000 + DELAY_MS)
    assert (found.at_ms, json.loads(found.body)["cells"]) == (AT_MS, [[name(CELL), 100]])


def test_a_newer_map_waits_while_the_older_one_is_shown() -> None:
    maps = DelayedMaps()
    maps.add(density({ZONE: 100}))
    maps.add(density({ZONE: 100}))  # the same again
    maps.add(density({ZONE: 200}, AT_MS + 60_000))
    cells = [json.loads(maps.shown(AT_MS + DELAY_MS + wait_ms).body)["cells"][0][1] for wait_ms in (0, 59_999, 60_000)]
    assert cells == [100, 100, 200]


def test_shards_that_do_not_count_are_named_and_without_any_the_map_is_empty() -> None:
    maps = DelayedMaps()
    maps.add(density({ZONE: 100}, missing=(3,)))
    assert json.loads(maps.shown(AT_MS + DELAY_MS).body)["shards_missing"] == [3]
    nobody = np.zeros(0, np.int64)
    gone = Density(nobody.astype(np.uint32), nobody.astype(np.uint16), nobody, (), None, (0, 1), 0)
    maps.add(gone)
    found: dict[str, Any] = json.loads(maps.shown(AT_MS + DELAY_MS).body)
    assert (found["at_ms"], found["cells"], found["shards_missing"]) == (None, [], [0, 1])


def test_compressed_bytes_are_the_same_map_under_a_tag_of_their_own() -> None:
    found = map_document(density({ZONE: 100}))
    assert gzip.decompress(found.compressed) == found.body
    assert found.etag != found.compressed_etag


@pytest.mark.parametrize(("cells", "resolution"), [(CELLS_MAX, RESOLUTION), (CELLS_MAX + 1, FALLBACK_RESOLUTION)])
def test_a_planet_full_of_phones_is_shown_coarser(cells: int, resolution: int) -> None:
    """Cells of base cells 0 and up that exist: those of hexagons, whose numbers have no gaps."""
    base = 7**ZONE_RESOLUTION
    first = [base_cell * base for base_cell in (0, 1, 2, 3, 5, 6, 7)]
    zones = [start + PER_CELL * index for start in first for index in range(7**RESOLUTION)][:cells]
    body = json.loads(map_document(density(dict.fromkeys(zones, 20))).body)
    assert body["resolution"] == resolution
