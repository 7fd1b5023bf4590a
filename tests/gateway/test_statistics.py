"""The Ministry's figures: counted once, told apart, and small ones hidden so that they stay hidden."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.alert_models import BEIJING
from gateway.runtime import Gateway
from gateway.statistics import (
    NOT_SAID,
    SMALL,
    Counts,
    Figure,
    closed_figure,
    count_closed,
    count_published,
    month_of,
    public_from_ms,
    read_counts,
    statistics_of,
    suppressed,
)
from tests.gateway.conftest import HANGZHOU, XIHU, Http, Keys
from tests.gateway.desk import audited, published


def ms(*moment: int) -> int:
    return round(datetime(*moment, tzinfo=BEIJING).timestamp() * 1000)  # type: ignore[arg-type, misc]


# --- counting ---------------------------------------------------------------------------------------------------------


def test_ministrys_figures_tell_the_living_from_the_dead_and_from_false_reports() -> None:
    closed = {
        ("found", "rescued_from_trafficking"): 18,
        ("found", "ran_away"): 722,
        ("found", "lost"): 268,
        ("found", "at_a_friends_home"): 41,
        ("found", "drowned"): 65,
        ("found", "other_accident"): 24,
        ("found", "killed"): 22,
        ("found", "false_report_dispute"): 100,
        ("false_report", "false_report_dispute"): 14,
    }
    assert sum(closed.values()) == 1274
    figures = statistics_of(Counts(1317, closed), "2026", "000000", public=False)
    assert (figures.published, figures.closed) == (1317, 1274)
    assert (figures.found_alive.count, figures.found_dead.count, figures.found.count) == (1049, 111, 1160)
    assert (figures.false_reports.count, figures.other_false_reports.count) == (114, 0)
    assert figures.found_alive_of_published == 0.797
    assert figures.categories.ran_away.share == 0.567


def test_month_is_beijings_and_a_division_holds_its_parts(client: redis.Redis) -> None:
    with client.pipeline() as pipeline:
        for moment, division in (
            ((2026, 4, 30, 23, 59), "330106"),
            ((2026, 5, 1, 0, 0), "330106"),
            ((2026, 5, 2), "330102"),
            ((2026, 5, 3), "340100"),
        ):
            count_published(pipeline, ms(*moment), division)
        count_closed(pipeline, ms(2026, 5, 31, 23, 59), "330106", "found", None)
        count_closed(pipeline, ms(2026, 5, 31, 23, 59), "330106", "cancelled", None)
        pipeline.execute()
    assert month_of(ms(2026, 5, 1, 0, 0) - 1) == "2026-04"
    assert read_counts(client, "2026-05", "330106").published == 1
    assert read_counts(client, "2026-05", "330100").published == 2
    assert read_counts(client, "2026-05", "000000").published == 3
    assert read_counts(client, "2026", "330000") == Counts(3, {("found", NOT_SAID): 1, ("cancelled", NOT_SAID): 1})
    assert read_counts(client, "2025", "000000") == Counts(0, {})


def test_officers_see_their_jurisdiction_in_full_and_nothing_else(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    published(http, keys.county, status="exercise", audience=["amap"])  # is not counted
    published(http, keys.ministry, division="110101")
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found", "category": "lost"})
    own = http.get("/v1/statistics", key=keys.county).json()
    assert (own["division"], own["published"], own["closed"], own["as_public"]) == (XIHU, 1, 1, False)
    assert own["categories"]["lost"] == {"count": 1, "share": 1.0}
    assert http.get("/v1/statistics", key=keys.ministry).json()["published"] == 2
    assert http.get(f"/v1/statistics?division={XIHU}", key=keys.province).json()["published"] == 1
    assert http.get(f"/v1/statistics?division={HANGZHOU}", key=keys.county).status_code == 403
    assert audited(client)[-1] == ("statistics.view", HANGZHOU, "refused")
    assert http.get("/v1/statistics?period=2026-13", key=keys.county).status_code == 422
    assert http.get("/v1/statistics?division=001100", key=keys.county).status_code == 422


# --- what anybody may read --------------------------------------------------------------------------------------------


def test_anybody_reads_a_year_of_the_country_when_nothing_in_it_can_change_any_more(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with client.pipeline() as pipeline:
        for _ in range(12):
            count_closed(pipeline, ms(2029, 3, 1), "330106", "found", "lost")
            count_published(pipeline, ms(2029, 3, 1), "330106")
        pipeline.execute()
    shown_from_ms = public_from_ms(2029, 30.0)
    assert shown_from_ms == ms(2030, 1, 31)
    monkeypatch.setattr(gateway.desk, "now_ms", lambda: shown_from_ms - 1)
    early = http.get("/v1/statistics?period=2029")
    assert (early.status_code, early.json()["type"]) == (404, "urn:tuanyuan:problem:not-yet")
    assert "2030-01-31T00:00:00.000+08:00" in early.json()["detail"]
    assert http.get("/v1/statistics").json()["period"] == "2028"
    monkeypatch.setattr(gateway.desk, "now_ms", lambda: shown_from_ms)
    for key in (None, keys.amap, keys.station):
        figures = http.get("/v1/statistics", key=key).json()
        assert (figures["period"], figures["as_public"], figures["published"]) == ("2029", True, 12)
    assert http.get("/v1/statistics?period=2029-03").status_code == 401
    assert http.get(f"/v1/statistics?period=2029&division={XIHU}").status_code == 401


def tree(*parts: int | tuple[int, ...]) -> Figure:
    """A figure of leaves, and of figures of leaves."""
    made = []
    for index, part in enumerate(parts):
        if isinstance(part, int):
            made.append(Figure(f"{index}", part))
        else:
            leaves = tuple(Figure(f"{index}.{leaf}", count) for leaf, count in enumerate(part))
            made.append(Figure(f"{index}", sum(part), leaves))
    return Figure("all", sum(figure.count for figure in made), tuple(made))


@pytest.mark.parametrize(
    ("figure", "hidden"),
    [
        (tree(20, 30), set()),
        (tree(20, 30, 3), {"0", "2"}),  # 3 alone would be the rest; 20 + 3 is not
        (tree(30, 4, 4), {"0", "1", "2"}),  # 4 + 4 = 8 would tell that both are 4
        (tree(30, 4, 4, 4), {"1", "2", "3"}),
        (tree(30, 0), {"0", "1"}),  # none is a count under 5 as well
        (tree((9, 2), 50), {"0.0", "0.1"}),
        (tree((6, 2), 50), {"0.0", "0.1", "0", "1"}),  # 6 + 2 under 10: the sum goes too, and then another beside it
        (tree(1, 2), {"all", "0", "1"}),
        (tree(4, 3), {"all", "0", "1"}),  # the total alone would leave 4 + 3 = 7
    ],
)
def test_small_count_is_hidden_with_what_would_tell_it(figure: Figure, hidden: set[str]) -> None:
    assert suppressed(figure) == hidden


VALUES = 21
"""An attacker tries every count below that: enough to show that a hidden one could be any from 0 to 4."""


def equations(figure: Figure, hidden: set[str], leaves: list[str]) -> Iterator[tuple[np.ndarray, int]]:
    """What the shown figures say of the leaves: sums of some of them."""
    for each in figure.all():
        if each.name not in hidden:
            below = {leaf.name for leaf in each.all() if not leaf.parts}
            yield np.array([name in below for name in leaves]), each.count


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.integers(0, 14), st.lists(st.integers(0, 14), min_size=1, max_size=3).map(tuple)),
        min_size=1,
        max_size=4,
    ).filter(lambda parts: sum(1 if isinstance(part, int) else len(part) for part in parts) <= 5)
)
def test_nobody_can_work_out_a_count_under_5_from_what_is_shown(parts: list[int | tuple[int, ...]]) -> None:
    figure = tree(*parts)
    hidden = suppressed(figure)
    leaves = [each for each in figure.all() if not each.parts]
    unknown = [leaf.name for leaf in leaves if leaf.name in hidden]
    known = {leaf.name: leaf.count for leaf in leaves if leaf.name not in hidden}
    grid = np.indices((VALUES,) * len(unknown)).reshape(len(unknown), VALUES ** len(unknown))
    possible = np.ones(grid.shape[1], bool)
    for takes_part, count in equations(figure, hidden, [leaf.name for leaf in leaves]):
        chosen = [leaf.name for leaf, takes in zip(leaves, takes_part, strict=True) if takes]
        total = sum(known.get(name, 0) for name in chosen)
        rows = [index for index, name in enumerate(unknown) if name in chosen]
        possible &= total + grid[rows].sum(axis=0) == count
    for each in figure.all():
        if each.count < SMALL:
            assert each.name in hidden
            below = {leaf.name for leaf in each.all() if not leaf.parts}
            values = grid[[index for index, name in enumerate(unknown) if name in below]].sum(axis=0)[possible]
            assert set(range(SMALL)) <= set(values.tolist()), (figure, hidden, each)


def test_shares_of_hidden_counts_are_hidden_and_a_total_too_small_hides_all() -> None:
    closed = {("found", "lost"): 40, ("found", "killed"): 1, ("cancelled", NOT_SAID): 30}
    figures = statistics_of(Counts(3, closed), "2026", "000000", public=True)
    assert (figures.published, figures.closed, figures.found_alive_of_published) == (None, 71, None)
    assert figures.categories.killed.count is None and figures.categories.killed.share is None
    assert {figure.name for figure in closed_figure(closed).all() if figure.count < SMALL} <= suppressed(
        closed_figure(closed)
    )
    few = statistics_of(Counts(4, {("found", "lost"): 3}), "2026", "000000", public=True)
    assert (few.closed, few.found.count, few.found.share) == (None, None, None)
