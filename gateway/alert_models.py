"""What officers write and read at the desk, as JSON: fields, bounds, examples. The OpenAPI page comes from here.

Times are written with an offset, as 2026-05-01T14:30+08:00: a time without one would be eight hours off in China, one
way or the other, so it is refused. Inside they are ms since 1970.
"""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime, timedelta, timezone
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    WithJsonSchema,
    model_validator,
)

from flows.alert_json import ALERT_ID_CHARS_MAX, PARTNER_NAME_BYTES_MAX, SCHEDULE_STEPS_MAX, event_time_ms
from gateway.jurisdiction import DIVISION_PATTERN, level_of
from geoindex.rings import HOURS_MAX

BEIJING = timezone(timedelta(hours=8))
TIME_MS_MAX = 4_102_444_800_000
"""2100: whatever lies beyond is a slip of the pen."""
AUDIENCE_MAX = 64
CHILD_AGE_MAX = 17

Outcome = Literal["found", "false_report", "cancelled"]
Category = Literal[
    "rescued_from_trafficking",
    "ran_away",
    "lost",
    "at_a_friends_home",
    "drowned",
    "other_accident",
    "killed",
    "false_report_dispute",
]
State = Literal["open", "expired", "closed"]
Sex = Literal["female", "male", "unknown"]


# --- kinds of fields --------------------------------------------------------------------------------------------------


def _time_ms(value: object) -> int:
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError("must be an ISO 8601 time with an offset, as 2026-05-01T14:30+08:00")
    if value.isdigit() or (value[-1:] not in "Zz" and "+" not in value[10:] and "-" not in value[10:]):
        raise ValueError("must say its offset, as 2026-05-01T14:30+08:00: 08:00 in Beijing is midnight in UTC")
    at_ms = event_time_ms(value, "the time")
    if not 0 <= at_ms <= TIME_MS_MAX:
        raise ValueError("must be between 1970 and 2100")
    return at_ms


def moment(at_ms: int) -> str:
    """Ms since 1970 as people at the desk read it, with the offset of Beijing."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).astimezone(BEIJING).isoformat(timespec="milliseconds")


def clean(text: str) -> str:
    """Text without what cannot be seen: control and format characters, but for line ends; no space around it."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    seen = ("".join(_seen(character) for character in line).strip() for line in lines)
    return "\n".join(seen).strip()


def _seen(character: str) -> str:
    if character == "\t":
        return " "
    return "" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


def _division(text: str) -> str:
    level_of(text)
    return text


_TIME_SCHEMA = {"type": "string", "format": "date-time", "examples": ["2026-05-01T14:30:00+08:00"]}
Time = Annotated[
    int,
    BeforeValidator(_time_ms),
    PlainSerializer(moment, return_type=str),
    WithJsonSchema({**_TIME_SCHEMA, "maxLength": 40}),
]
"""Ms since 1970; in JSON ISO 8601 with an offset."""
AlertId = Annotated[str, Field(min_length=1, max_length=ALERT_ID_CHARS_MAX, examples=["a-7k3f9x2m4q"])]
Division = Annotated[
    str,
    Field(
        pattern=DIVISION_PATTERN,
        description="Administrative division code of GB/T 2260, 6 digits.",
        examples=["330106"],
    ),
    AfterValidator(_division),
]
PartnerName = Annotated[str, Field(min_length=1, max_length=PARTNER_NAME_BYTES_MAX, examples=["amap"])]
Audience = Annotated[list[PartnerName], Field(min_length=1, max_length=AUDIENCE_MAX)]
Step = Annotated[
    list[Annotated[float, Field(gt=0, le=HOURS_MAX)] | None],
    Field(min_length=2, max_length=2, description="[hours, km]: so many km until so many hours have passed."),
]
ScheduleSteps = Annotated[
    list[Step],
    Field(
        min_length=1,
        max_length=SCHEDULE_STEPS_MAX,
        description="Ring radius in km until so many hours after the child went missing; the last hours is null. "
        "Hours and km rise. A ring of an actual alert is at least 10 km.",
        examples=[[[1, 100], [2, 200], [3, 300], [None, 500]]],
    ),
]
FEWER = "<20"
PhoneCount = Annotated[
    Annotated[int, Field(ge=20)] | Literal["<20"],
    Field(description='Phones, rounded; fewer than 20 are told as "<20".', examples=[4300, "<20"]),
]


class Strict(BaseModel):
    """Nothing is guessed: a field of another name or type is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Location(Strict):
    """A place in degrees, WGS-84."""

    lat: float = Field(ge=-90, le=90, examples=[30.25])
    lng: float = Field(ge=-180, le=180, examples=[120.13])


class Child(Strict):
    """Who is missing. Shown on the alert's public page while it is open, and erased some days after it was closed."""

    name: Annotated[str, Field(max_length=60), AfterValidator(_one_line)] = Field(default="", examples=["王小明"])
    sex: Sex = "unknown"
    age: int | None = Field(default=None, ge=0, le=CHILD_AGE_MAX, description="Years.", examples=[6])
    clothes: Annotated[str, Field(max_length=300), AfterValidator(_one_line)] = Field(
        default="", examples=["红色外套,蓝色书包"]
    )
    features: Annotated[str, Field(max_length=500), AfterValidator(_one_line)] = Field(
        default="", description="What else to recognise the child by.", examples=["左眉有一道疤,身高约1.1米"]
    )


Headline = Annotated[
    str,
    Field(max_length=160, description="One line; made of the child's details if it is empty."),
    AfterValidator(_one_line),
]
PlaceWords = Annotated[
    str,
    Field(max_length=200, description="Where the child was last seen, in words.", examples=["西湖区文三路沃尔玛门口"]),
    AfterValidator(_one_line),
]
FreeText = Annotated[
    str,
    Field(max_length=2_000, description="Free text; line ends are kept.", examples=["孩子可能乘坐公交车离开。"]),
    AfterValidator(clean),
]
Contact = Annotated[
    str,
    Field(max_length=100, description="Whom to call.", examples=["110", "0571-88001122 李警官"]),
    AfterValidator(_one_line),
]
ExpectedRevision = Annotated[
    int | None,
    Field(
        ge=1,
        le=(1 << 53) - 1,
        description="The revision that was seen: 409 if somebody edited the alert since. As If-Match, which gives 412.",
        examples=[3],
    ),
]


# --- what officers write ----------------------------------------------------------------------------------------------


class PublishRequest(Strict):
    """An alert to publish."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "location": {"lat": 30.2741, "lng": 120.1551},
                    "missing_since": "2026-05-01T14:30:00+08:00",
                    "child": {"name": "王小明", "sex": "male", "age": 6, "clothes": "红色外套,蓝色书包"},
                    "place": "西湖区文三路沃尔玛门口",
                    "contact": "0571-88001122",
                }
            ]
        }
    )

    division: Division | None = Field(
        default=None, description="Whose alert it is; the officer's own division unless given."
    )
    status: Literal["actual", "exercise"] = Field(
        default="actual", description="An exercise names its partners in `audience`, and never becomes actual."
    )
    location: Location = Field(description="Where the child was last seen: the middle of the rings.")
    missing_since: Time = Field(description="When the child went missing: from here the rings grow.")
    schedule: ScheduleSteps | None = None
    expires_at: Time | None = Field(
        default=None, description="From then on nobody new is told; 72 h after `missing_since` unless given."
    )
    audience: Audience | None = Field(
        default=None, description="These partners' phones alone; all partners' unless given."
    )
    child: Child = Field(default_factory=Child)
    headline: Headline = ""
    place: PlaceWords = ""
    text: FreeText = ""
    contact: Contact = "110"

    @model_validator(mode="after")
    def _says_something(self) -> PublishRequest:
        child = self.child
        if not (child.name or child.clothes or child.features or self.headline or self.text):
            raise ValueError("must say whom to look for: a name, clothes, features, a headline or a text")
        return self


class ChildChanges(Strict):
    """What changes of the child's details; what is left out stays."""

    name: Annotated[str, Field(max_length=60), AfterValidator(_one_line)] | None = None
    sex: Sex | None = None
    age: int | None = Field(default=None, ge=0, le=CHILD_AGE_MAX)
    clothes: Annotated[str, Field(max_length=300), AfterValidator(_one_line)] | None = None
    features: Annotated[str, Field(max_length=500), AfterValidator(_one_line)] | None = None


class EditRequest(Strict):
    """What changes of an open alert. What is left out stays as it is; null is the default again."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"location": {"lat": 30.31, "lng": 120.2}, "place": "杭州东站", "revision": 1}]}
    )

    revision: ExpectedRevision = None
    # Neither can be null. Their defaults are never read: `model_fields_set` says what was given.
    location: Location = Field(default_factory=lambda: Location(lat=0, lng=0))
    missing_since: Time = Field(default_factory=int)
    schedule: ScheduleSteps | None = None
    expires_at: Time | None = None
    audience: Audience | None = None
    child: ChildChanges = Field(default_factory=ChildChanges)
    headline: Headline | None = None
    place: PlaceWords | None = None
    text: FreeText | None = None
    contact: Contact | None = None


class CloseRequest(Strict):
    """The end of a search. Everyone told hears that it has ended, and nothing else."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"outcome": "found", "category": "lost"}]})

    outcome: Outcome
    category: Category | None = Field(
        default=None,
        description="For the desk and the statistics alone. Of `found` any, of `false_report` none or "
        "`false_report_dispute`, of `cancelled` none. It can be said later.",
    )
    revision: ExpectedRevision = None


class CategoryRequest(Strict):
    """What became known after an alert was closed."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"category": "ran_away"}]})

    category: Category | None


# --- what officers read -----------------------------------------------------------------------------------------------


class Receipt(Strict):
    """An event that is durable. The same for every repetition under one Idempotency-Key."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "alert_id": "a-7k3f9x2m4q",
                    "event": "publish",
                    "revision": 1,
                    "at": "2026-05-01T14:41:07.205+08:00",
                    "url": "https://alerts.example.org/a/a-7k3f9x2m4q",
                    "copied": True,
                }
            ]
        }
    )

    alert_id: AlertId
    event: Literal["publish", "update", "close", "category", "photo", "none"] = Field(
        description="`none`: everything asked for was so already, and nobody was told anything."
    )
    revision: int = Field(ge=1)
    at: Time
    url: str = Field(description="The alert's public page.", max_length=2_000)
    copied: bool = Field(
        description="Whether it stands in every shard's log, so that phones are being told. If not it will by itself."
    )


class Ring(Strict):
    """The ring now, and when it grows."""

    km: float = Field(examples=[200.0])
    next_growth: Time | None = Field(description="null: it does not grow any more.")
    next_km: float | None = Field(examples=[300.0])


class PartnerFigures(Strict):
    """What became of an alert at one partner. Rounded down; never below 20."""

    partner: PartnerName
    told: PhoneCount
    retracted: PhoneCount = Field(description="Of those told, how many were sent the end of the search.")
    delivered: PhoneCount | None = Field(
        description="Handed over to the partner, of those told. null: the partner reads its queue by itself."
    )
    acknowledged: PhoneCount | None = Field(description="Of those delivered.")


class AlertSummary(Strict):
    """An alert as it is now."""

    alert_id: AlertId
    revision: int = Field(ge=1)
    state: State = Field(description="`expired`: open, but nobody new is told.")
    status: Literal["actual", "exercise"]
    division: str | None = Field(
        description="null: it was published at the terminal, and is the Ministry's.", examples=["330106"]
    )
    published_by: str | None = Field(examples=["officer:西湖 值班"])
    published_at: Time
    changed_at: Time
    location: Location
    missing_since: Time
    schedule: list[list[float | None]] = Field(examples=[[[1, 100], [2, 200], [3, 300], [None, 500]]])
    expires_at: Time
    audience: list[str] | None
    ring: Ring | None = Field(description="null: the alert is closed.")
    outcome: Outcome | None
    category: Category | None
    child: Child | None = Field(description="null: erased, or never given.")
    headline: str
    place: str
    text: str
    contact: str
    photo_url: str | None
    url: str
    details_erased_at: Time | None


class AlertDetails(AlertSummary):
    """An alert as it is now, and what became of it so far."""

    partners: list[PartnerFigures] | None = Field(description="null: erased with the details.")


class AlertList(Strict):
    """Alerts of the officer's jurisdiction, the last published first."""

    alerts: list[AlertSummary]
    next: str | None = Field(description="For `before` of the next request; null: these were the last.")


def schedule_of(steps: list[list[float | None]]) -> tuple[tuple[float | None, float], ...]:
    """Steps as the matcher takes them. Raises ValueError for a step without km."""
    schedule: list[tuple[float | None, float]] = []
    for hours, km in steps:
        if km is None:
            raise ValueError(f"schedule must have km in every step, got null after {hours} hours")
        schedule.append((hours, km))
    return tuple(schedule)


def json_of(model: BaseModel) -> Any:
    """A model as JSON values."""
    return model.model_dump(mode="json")
