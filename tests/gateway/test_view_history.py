"""The history: written once whoever comes first, read at any span in few points."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import redis

from gateway.view_history import HISTORY_KEY, KEPT_MS, POINTS_MAX, STEP_MS, History, step_s_of, write_step

NOW_MS = 1_777_617_000_000 // STEP_MS * STEP_MS


def write(client: redis.Redis, steps_ago: int, **figures: float) -> bool:
    return write_step(client, NOW_MS - steps_ago * STEP_MS, figures)


def values(history: History, minutes: int, name: str) -> list[float | None]:
    found = history.view(minutes, NOW_MS).series[name]
    return [None if np.isnan(value) else float(value) for value in found]


def test_a_step_is_written_once_whichever_gateway_comes_first(client: redis.Redis) -> None:
    assert write(client, 1, lag_ms=5.0)
    assert not write(client, 1, lag_ms=7.0)
    assert not write(client, 2, lag_ms=9.0)  # too late
    assert write(client, 0, lag_ms=6.0)
    assert values(History(client), 15, "lag_ms")[-2:] == [5.0, 6.0]


def test_what_was_not_known_is_null_and_names_may_come_and_go(client: redis.Redis) -> None:
    write(client, 3, lag_ms=5.0)
    write(client, 1, lag_ms=6.0, devices_live=100.0)
    history = History(client)
    assert values(history, 15, "lag_ms")[-4:] == [5.0, None, 6.0, None]
    assert values(history, 15, "devices_live")[-4:] == [None, None, 100.0, None]
    assert len(values(history, 15, "lag_ms")) == 181


@pytest.mark.parametrize("minutes", [15, 60, 61, 360, 1_440])
def test_any_span_has_some_hundred_points_at_even_distances(client: redis.Redis, minutes: int) -> None:
    write(client, 0, lag_ms=1.0)
    view = History(client).view(minutes, NOW_MS)
    assert POINTS_MAX / 2 < len(view.at_ms) <= POINTS_MAX + 1
    assert set(np.diff(view.at_ms).tolist()) == {1000 * view.step_s}
    assert view.at_ms[0] <= NOW_MS - minutes * 60_000 < view.at_ms[1]
    assert view.at_ms[-1] <= NOW_MS
    assert {name: len(series) for name, series in view.series.items()} == {"lag_ms": len(view.at_ms)}
    assert view.step_s == step_s_of(minutes)


def test_a_point_of_several_steps_is_the_mean_of_rates_and_the_largest_of_all_else(client: redis.Redis) -> None:
    step = step_s_of(60) * 1000 // STEP_MS
    assert step == 3
    begin = NOW_MS // (step * STEP_MS) * step * STEP_MS - step * STEP_MS
    for index, value in enumerate((30.0, 60.0, 90.0)):
        write_step(client, begin + index * STEP_MS, {"pings_per_s:amap": value, "lag_ms": value})
    history = History(client)
    view = history.view(60, NOW_MS)
    at = view.at_ms.tolist().index(begin)
    assert view.series["pings_per_s:amap"][at] == 60.0
    assert view.series["lag_ms"][at] == 90.0


def test_a_reader_goes_on_where_it_was_and_another_server_begins_anew(client: redis.Redis) -> None:
    write(client, 2, lag_ms=1.0)
    history = History(client)
    assert values(history, 15, "lag_ms")[-3:] == [1.0, None, None]
    write(client, 1, lag_ms=2.0)
    assert values(history, 15, "lag_ms")[-3:] == [1.0, 2.0, None]
    client.delete(HISTORY_KEY)
    write(client, 5, lag_ms=3.0)
    assert values(history, 15, "lag_ms")[-6:] == [3.0, None, None, None, None, None]


def test_a_day_is_kept_and_no_more(client: redis.Redis) -> None:
    write_step(client, NOW_MS - KEPT_MS - STEP_MS, {"lag_ms": 1.0})
    write(client, 1, lag_ms=2.0)
    write(client, 0, lag_ms=3.0)
    entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(HISTORY_KEY))
    kept = [int(entry_id.partition(b"-")[0]) for entry_id, _ in entries]
    assert kept == [NOW_MS - STEP_MS, NOW_MS]


def test_a_step_of_a_hundred_figures_takes_half_a_kilobyte(client: redis.Redis) -> None:
    for ago in range(200, 0, -1):
        write_step(client, NOW_MS - ago * STEP_MS, {f"lag_ms:{shard}": float(shard) for shard in range(100)})
    used = client.memory_usage(HISTORY_KEY)
    assert used is not None and used / 200 < 550
