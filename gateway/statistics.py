"""The Ministry's figures: how many alerts, how they ended, how many children were found alive.

    statistics:{desk}    hash: "2026-05:330106:published" or "2026-05:330106:found:lost" -> alerts

Counts are raised in the MULTI of the event that they count, so they neither miss nor repeat one, and stay when the case
is erased. A month is Beijing's; an alert is counted as published in the month of its publishing and as closed in that
of its closing. Exercises are not counted.

    closed ─┬─ found ─┬─ alive ─── rescued from trafficking, ran away, lost, at a friend's home
            │         ├─ dead ──── drowned, other accident, killed
            │         └─ not said
            ├─ false reports ───── over a family or debt dispute, other
            └─ cancelled

The Ministry's own "found" (1,274 of 1,317) holds the dead (111) and disputes (114) as well; here each is told apart.

What anybody may read. Counts under 5 could be known to be somebody. They are suppressed, and with them as many others
as it takes that no suppressed count can be worked out: below every figure that is shown, what is suppressed is at least
two figures and together at least 10, so each of them could be anything from 0 to 4 and more (`suppressed`). There is
one such table a year, of the whole country, shown when nothing in it can change any more. So there are no totals of
parts, no months of years, and no yesterday to compare it with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, cast

import redis
from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from gateway.accounts import OfficerAccount
from gateway.alert_models import BEIJING, moment
from gateway.errors import Problem, responses
from gateway.identity import caller_of, unknown_caller
from gateway.jurisdiction import DIVISION_PATTERN, MINISTRY, desk_refusal, division_refusal, prefix_of
from gateway.refusals import refuse
from gateway.runtime import Gateway, gateway_of
from geoindex.entries import HOUR_MS, OUTCOMES

STATISTICS_KEY = "statistics:{desk}"
PUBLISHED = "published"
NOT_SAID = "-"
SMALL = 5
"""Counts below are suppressed."""
TOGETHER_MIN = 10
"""Sum of what is suppressed below one figure that is shown."""

ALIVE = ("rescued_from_trafficking", "ran_away", "lost", "at_a_friends_home")
DEAD = ("drowned", "other_accident", "killed")
DISPUTE = "false_report_dispute"
CATEGORIES = (*ALIVE, *DEAD, DISPUTE)
CATEGORIES_OF: Mapping[str, tuple[str, ...]] = {"found": CATEGORIES, "false_report": (DISPUTE,), "cancelled": ()}
"""By outcome. A child may be found in what turns out to be a dispute; either way it is counted as a false report."""
assert set(CATEGORIES_OF) == set(OUTCOMES)


# --- counting ---------------------------------------------------------------------------------------------------------


def month_of(at_ms: int) -> str:
    """`2026-05`, in Beijing."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(BEIJING).strftime("%Y-%m")


def count_published(pipeline: Any, at_ms: int, division: str) -> None:
    """Queue the counting of one that was published."""
    pipeline.hincrby(STATISTICS_KEY, f"{month_of(at_ms)}:{division}:{PUBLISHED}", 1)


def count_closed(pipeline: Any, at_ms: int, division: str, outcome: str, category: str | None, by: int = 1) -> None:
    """Queue the counting of one that was closed; `by` -1: it was another category."""
    pipeline.hincrby(STATISTICS_KEY, f"{month_of(at_ms)}:{division}:{outcome}:{category or NOT_SAID}", by)


@dataclass(frozen=True, slots=True)
class Counts:
    """Counts of one period and division."""

    published: int
    closed: Mapping[tuple[str, str], int]
    """By outcome and category (NOT_SAID: none)."""


def read_counts(client: redis.Redis, period: str, division: str) -> Counts:
    """`period`: a year, "2026", or a month, "2026-05". `division` with all its parts."""
    published, closed = 0, dict[tuple[str, str], int]()
    start = f"{period}:" if "-" in period else f"{period}-"
    for raw, number in cast("Iterator[tuple[bytes, bytes]]", client.hscan_iter(STATISTICS_KEY, f"{start}*", 5_000)):
        _, part, *what = raw.decode().split(":")
        if not part.startswith(prefix_of(division)):
            continue
        if what == [PUBLISHED]:
            published += int(number)
        else:
            outcome, category = what
            closed[outcome, category] = closed.get((outcome, category), 0) + int(number)
    return Counts(published, closed)


# --- a table of them --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figure:
    """A count, and those it is the sum of."""

    name: str
    count: int
    parts: Sequence[Figure] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        assert not self.parts or self.count == sum(part.count for part in self.parts), self.name

    def all(self) -> Iterator[Figure]:
        """This one and all below."""
        yield self
        for part in self.parts:
            yield from part.all()


def _sum(name: str, *parts: Figure) -> Figure:
    return Figure(name, sum(part.count for part in parts), parts)


def closed_figure(closed: Mapping[tuple[str, str], int]) -> Figure:
    """All that were closed, by how they ended."""

    def category(name: str) -> Figure:
        return Figure(name, closed.get(("found", name), 0))

    disputes = closed.get(("found", DISPUTE), 0) + closed.get(("false_report", DISPUTE), 0)
    return _sum(
        "closed",
        _sum(
            "found",
            _sum("found_alive", *map(category, ALIVE)),
            _sum("found_dead", *map(category, DEAD)),
            Figure("found_not_said", closed.get(("found", NOT_SAID), 0)),
        ),
        _sum(
            "false_reports",
            Figure(DISPUTE, disputes),
            Figure("other_false_reports", closed.get(("false_report", NOT_SAID), 0)),
        ),
        Figure("cancelled", closed.get(("cancelled", NOT_SAID), 0)),
    )


def suppressed(root: Figure) -> set[str]:
    """Names of the figures that must not be shown, so that nobody can work out a count under SMALL.

    Every suppressed leaf stands in one equation: the nearest figure above it that is shown, less what is shown below
    that. It holds when the equation has two unknowns or more that add up to TOGETHER_MIN: each can then be anything
    from 0 on, to beyond 4. As long as one does not, the smallest leaf below that figure is suppressed too, with the
    sums between; and where no leaf is left, the figure itself.
    """
    hidden = {figure.name for figure in root.all() if figure.count < SMALL}
    while (weak := _weak_figure(root, hidden)) is not None:
        paths = [path for path in _paths(weak) if path[-1].name not in hidden]
        if paths:
            hidden.update(figure.name for figure in min(paths, key=lambda path: path[-1].count)[1:])
        else:
            hidden.add(weak.name)
    return hidden


def _weak_figure(root: Figure, hidden: set[str]) -> Figure | None:
    for figure in root.all():
        if figure.parts and figure.name not in hidden:
            counts = list(_unknown_leaves(figure, hidden))
            if counts and (len(counts) < 2 or sum(counts) < TOGETHER_MIN):
                return figure
    return None


def _unknown_leaves(figure: Figure, hidden: set[str]) -> Iterator[int]:
    """Counts of suppressed leaves with no figure that is shown between them and this one."""
    for part in figure.parts:
        if part.name in hidden:
            if part.parts:
                yield from _unknown_leaves(part, hidden)
            else:
                yield part.count


def _paths(figure: Figure) -> Iterator[tuple[Figure, ...]]:
    """From a figure down to each of its leaves."""
    if not figure.parts:
        yield (figure,)
    for part in figure.parts:
        for path in _paths(part):
            yield (figure, *path)


# --- asking -----------------------------------------------------------------------------------------------------------

router = APIRouter(tags=["statistics"])


class Share(BaseModel):
    """A count, and its share of all that were closed."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"count": 42, "share": 0.467}]})

    count: int | None = Field(ge=0, description="null: not shown.")
    share: float | None = Field(
        ge=0, le=1, description="Of `closed`; null where either is not shown, or nothing closed."
    )


class Categories(BaseModel):
    """The Ministry's categories."""

    model_config = ConfigDict(extra="forbid")

    rescued_from_trafficking: Share
    ran_away: Share
    lost: Share
    at_a_friends_home: Share
    drowned: Share
    other_accident: Share
    killed: Share
    false_report_dispute: Share


class Statistics(BaseModel):
    """Figures of one period and division."""

    model_config = ConfigDict(extra="forbid")

    period: str = Field(examples=["2026"])
    division: str = Field(examples=[MINISTRY])
    as_public: bool = Field(description="Whether counts under 5, and what would tell them, are left out.")
    published: int | None = Field(ge=0)
    closed: int | None = Field(ge=0)
    found_alive_of_published: float | None = Field(
        ge=0, description="Found alive in the period for each published in it.", examples=[0.797]
    )
    found: Share
    found_alive: Share
    found_dead: Share
    found_not_said: Share
    false_reports: Share
    other_false_reports: Share
    cancelled: Share
    categories: Categories


def statistics_of(counts: Counts, period: str, division: str, public: bool) -> Statistics:
    """The table of these counts, as anybody may see it or in full."""
    root = closed_figure(counts.closed)
    hidden = suppressed(root) if public else set()
    shown = {figure.name: None if figure.name in hidden else figure.count for figure in root.all()}
    published = None if public and counts.published < SMALL else counts.published
    closed, alive = shown["closed"], shown["found_alive"]

    def share(name: str) -> Share:
        count = shown[name]
        return Share(count=count, share=round(count / closed, 3) if count is not None and closed else None)

    return Statistics(
        period=period,
        division=division,
        as_public=public,
        published=published,
        closed=closed,
        found_alive_of_published=round(alive / published, 3) if alive is not None and published else None,
        found=share("found"),
        found_alive=share("found_alive"),
        found_dead=share("found_dead"),
        found_not_said=share("found_not_said"),
        false_reports=share("false_reports"),
        other_false_reports=share("other_false_reports"),
        cancelled=share("cancelled"),
        categories=Categories(**{name: share(name) for name in CATEGORIES}),
    )


def public_from_ms(year: int, details_days: float) -> int:
    """When a year's figures are shown to anybody: categories can be said until the details are erased, not longer."""
    end = datetime(year + 1, 1, 1, tzinfo=BEIJING)
    return round(end.timestamp() * 1000) + round(details_days * 24 * HOUR_MS)


@router.get(
    "/v1/statistics",
    summary="How alerts ended",
    responses=responses(400, 401, 403, 404),
)
def get_statistics(
    request: Request,
    period: Annotated[
        str | None,
        Query(
            pattern=r"^20[0-9]{2}(-(0[1-9]|1[0-2]))?$",
            description="A year, or (officers) a month, of Beijing. Officers: this year; else the last one shown.",
            examples=["2026", "2026-05"],
        ),
    ] = None,
    division: Annotated[
        str | None,
        Query(pattern=DIVISION_PATTERN, description="Officers: of the own jurisdiction, with all its parts."),
    ] = None,
) -> Statistics:
    """Published, closed, and the share of each category. Found alive is told apart from found.

    Anybody: one year of the whole country, shown some weeks after its end, without counts under 5. Officers of county
    level or above: any period of their own jurisdiction, in full.
    """
    gateway = gateway_of(request)
    caller = caller_of(request)
    if caller is not None and isinstance(caller.account, OfficerAccount) and desk_refusal(caller.account) is None:
        asked = division or caller.account.division
        try:
            refusal = division_refusal(caller.account, asked)
        except ValueError as error:
            raise Problem(422, "does-not-fit", str(error)) from None
        if refusal is not None:
            raise refuse(gateway, caller, "statistics.view", asked, refusal)
        period = period or month_of(gateway.desk.now_ms())[:4]
        return statistics_of(read_counts(gateway.client, period, asked), period, asked, public=False)
    if division not in (None, MINISTRY):
        raise unknown_caller()
    year = _public_year(gateway, period)
    return statistics_of(read_counts(gateway.client, year, MINISTRY), year, MINISTRY, public=True)


def _public_year(gateway: Gateway, period: str | None) -> str:
    now_ms, days = gateway.desk.now_ms(), gateway.config.details_days
    if period is not None and "-" in period:
        raise unknown_caller()
    this_year = int(month_of(now_ms)[:4])
    year = (
        int(period)
        if period is not None
        else next(year for year in range(this_year, 0, -1) if public_from_ms(year, days) <= now_ms)
    )
    if (from_ms := public_from_ms(year, days)) > now_ms:
        raise Problem(404, "not-yet", f"the figures of {year} are shown from {moment(from_ms)} on")
    return str(year)
