"""What the operator's view is given, as JSON: the events of its stream, history, map, covers, phones told over time."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from flows.view_figures import DESCRIPTIONS
from gateway.alert_models import AlertId, Location, Strict, Time

Ms = Annotated[int, Field(ge=0, description="Ms since 1970, by the server's clock.", examples=[1_777_617_000_000])]
H3Cell = Annotated[str, Field(pattern="^[0-9a-f]{15}$", description="H3 index.", examples=["8431aabffffffff"])]
ShownPhones = Annotated[
    int | None,
    Field(ge=20, description="Phones, rounded down; null: fewer than 20, or not known.", examples=[4300]),
]
_FIGURE_NAMES = "; ".join(f"`{name}`: {words}" for name, words in DESCRIPTIONS.items())
_FIGURES_EXAMPLE = {"pings_per_s": 1_002_310.0, "pings_per_s:amap": 612_004.0, "lag_ms": 12.0, "lag_ms:0": 12.0}


class Hello(Strict):
    """The first event of a stream: `hello`."""

    version: str = Field(description="Of the program; a page of another one loads itself anew.", examples=["0.1.0"])
    server_time_ms: Ms
    step_s: int = Field(description="Between two `figures`.", examples=[1])
    scope: str = Field(
        description="Alerts of divisions whose code begins with this are sent; empty: all.", examples=["3301"]
    )
    role: Literal["operator", "officer"] = Field(description="Officers have the desk as well.")
    name: str = Field(description="Of the account whose key it is.", examples=["杭州 值班"])


class ViewAlarm(Strict):
    """Something that somebody should look at now."""

    kind: str = Field(examples=["queue_unread"])
    source: str = Field(description="Where within a process; may be empty.", examples=["amap"])
    words: str


class FiguresEvent(Strict):
    """Every second: `figures`. When `at_ms` stands still, what is shown is stale."""

    at_ms: Ms
    figures: dict[str, float] = Field(
        description="By name; `name:part` is one of several. What nobody knows is not there. " + _FIGURE_NAMES,
        examples=[_FIGURES_EXAMPLE],
    )
    alarms: list[ViewAlarm]


class ViewAlert(Strict):
    """An open alert."""

    id: AlertId
    revision: int = Field(ge=1)
    status: Literal["actual", "exercise"]
    state: Literal["open", "expired"] = Field(description="`expired`: open, but nobody new is told.")
    location: Location
    missing_since: Time
    published_at: Time
    schedule: list[list[float | None]] = Field(examples=[[[1, 100], [2, 200], [3, 300], [None, 500]]])
    ring_km: float = Field(gt=0, examples=[200.0])
    next_growth_ms: Ms | None = Field(description="null: it does not grow any more.")
    next_ring_km: float | None = Field(examples=[300.0])
    expires_at: Time
    audience: list[str] | None = Field(description="null: all partners.")
    told: ShownPhones
    delivered: ShownPhones
    acknowledged: ShownPhones
    retracted: ShownPhones


class AlertsEvent(Strict):
    """When they changed, and every 10 s: `alerts`. The open ones, the last published first."""

    at_ms: Ms
    alerts: list[ViewAlert]


class MapEvent(Strict):
    """When there is a newer map to be fetched: `map`."""

    at_ms: Ms | None = Field(description="Of the map; null: there is none.")


class HistoryAnswer(Strict):
    """Figures over time, at even distances."""

    step_s: int = Field(description="Between two points.", examples=[5])
    at_ms: list[Ms] = Field(description="Beginning of each point's time; the last one has not ended.")
    series: dict[str, list[float | None]] = Field(
        description="Figures as in the stream, as long as `at_ms`; null where nothing was known. Rates are means, all "
        "others the largest of their time.",
        examples=[{"pings_per_s": [1_002_310.0, None]}],
    )


class DensityMap(Strict):
    """About how many live phones are where, at least a minute ago."""

    at_ms: Ms | None = Field(description="When the oldest of the counts began; null: nothing may be shown yet.")
    resolution: int = Field(description="Of the cells.", examples=[4])
    cells: list[Annotated[list[H3Cell | int], Field(min_length=2, max_length=2)]] = Field(
        description="Cells and phones in tens; cells with fewer than 20 are left out.",
        examples=[[["8431aabffffffff", 4320]]],
    )
    shards_missing: list[int] = Field(
        description="Shards whose phones are not in it, for they have not counted lately."
    )


class CoverCells(Strict):
    """A ring and its cover."""

    ring_km: float = Field(gt=0)
    inside: list[H3Cell] = Field(description="Every phone in these is in the ring. Compacted: of several resolutions.")
    edge: list[H3Cell] = Field(description="The ring's edge crosses these: the exact distance decides.")


class NextCover(CoverCells):
    """The ring after its next growth."""

    at_ms: Ms


class AlertCover(CoverCells):
    """The ring of an open alert as the matcher covers it."""

    alert_id: AlertId
    revision: int = Field(ge=1)
    resolution: int = Field(description="Of the edge cells, and the finest of the inside ones.", examples=[5])
    next: NextCover | None = Field(description="null: it does not grow any more.")


class ToldOverTime(Strict):
    """Phones told of an alert, and of its end; a number holds until the next one."""

    at_ms: list[Ms]
    told: list[ShownPhones]
    resolved: list[ShownPhones]


EVENTS: dict[str, type[Strict]] = {
    "hello": Hello,
    "figures": FiguresEvent,
    "alerts": AlertsEvent,
    "map": MapEvent,
}
"""Of the stream, by name."""


def event_schemas() -> dict[str, Any]:
    """JSON schemas of the stream's events, for whoever reads the description."""
    return {name: model.model_json_schema(mode="serialization") for name, model in EVENTS.items()}
