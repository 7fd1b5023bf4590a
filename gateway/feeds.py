"""What map and social partners poll: the open alerts as an Atom index of CAP messages, as GeoJSON, and as JSON.

    desk stream ──look────> FeedKeeper, one thread: which alerts changed, what grew ──> bytes of three feeds
                                                                                            │
    10,000 pollers ──If-None-Match──> 304, or the bytes as they are ────────────────────────┘

A poll reads memory alone. The bytes are made anew when an alert changes, a ring grows, an alert expires or a notice has
stood long enough, and at no other time; they follow from the desk alone, so every gateway gives the same ones under the
same ETag. Exercises and alerts for some partners alone never stand in a feed. For a day after its end an alert stands
there as a notice in neutral words, without anything about the child; then it is gone, which means the same.
"""

from __future__ import annotations

import gzip
import hashlib
import logging
import threading
from dataclasses import dataclass, field
from email.utils import format_datetime
from typing import Annotated, Any, Literal, cast

import orjson
import redis
from fastapi import APIRouter, Header, Request
from lxml import etree
from pydantic import Field
from starlette.responses import Response

from flows.desk import ALERT_IDS_KEY, DESK_KEY, DeskAlert, changed_alert_ids
from flows.log import LogId, last_id
from flows.server import worth_a_line
from gateway.alert_models import TIME_MS_MAX, Location, Strict, Time, moment
from gateway.alert_views import ENDED_SHOWN_MS, ended_at_ms, is_matching
from gateway.cap import cap_url, is_public, public_words
from gateway.cap_alerts import ENDED_HEADLINE, AlertWords, History, alert_message, desk_events, history
from gateway.cap_messages import CapMessage, write_message, xml_text
from gateway.cap_signatures import utc_now
from gateway.cases import read_cases
from gateway.desk_service import page_url
from gateway.errors import Problem, responses
from gateway.ring_shapes import ring_geometry
from gateway.runtime import Gateway, gateway_of
from geoindex.entries import AUTO_CLOSE_MS, AlertClose, AlertRevision
from geoindex.rings import radius_km

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""Between two looks at the desk, of two commands each: so late is a change shown."""
WORDS_S = 10.0
"""So often words and pictures are compared, which can change without an event of the desk."""
FRESH_S = 10.0
"""Feeds that could not be compared with the desk for so long are not given away any more."""

ATOM = "http://www.w3.org/2005/Atom"
TITLE = "团圆 Tuanyuan: children who are looked for"
ATOM_TYPE, GEOJSON_TYPE, JSON_TYPE = "application/atom+xml", "application/geo+json", "application/json"

router = APIRouter(tags=["feeds"])


# --- the JSON feed, described -----------------------------------------------------------------------------------------


class FeedChild(Strict):
    """Who is missing; what is not known is left empty."""

    name: str
    sex: Literal["female", "male", ""]
    age: str = Field(description="Years.", examples=["6"])
    clothes: str
    features: str


class OpenAlert(Strict):
    """An alert that is open now."""

    state: Literal["open"]
    alert_id: str = Field(examples=["a-7k3f9x2m4q"])
    revision: int = Field(ge=1)
    updated: Time = Field(description="When it was published, edited, or when its ring grew.")
    url: str = Field(description="Page for people.", examples=["https://alerts.example.org/a/a-7k3f9x2m4q"])
    cap_url: str = Field(description="The same as CAP 1.2.")
    location: Location
    ring_km: float = Field(examples=[200.0])
    next_growth: Time | None = Field(description="null: the ring does not grow any more.")
    next_ring_km: float | None
    missing_since: Time
    expires_at: Time
    headline: str
    place: str
    text: str
    contact: str
    child: FeedChild
    photo_url: str | None


class EndedAlert(Strict):
    """An alert that ended within the last 24 hours. Take it down."""

    state: Literal["ended"]
    alert_id: str
    revision: int = Field(ge=1)
    updated: Time
    url: str
    cap_url: str
    headline: str = Field(examples=[ENDED_HEADLINE])


class AlertFeed(Strict):
    """Open alerts, and those that ended within 24 hours; the last changed first."""

    title: str
    updated: Time = Field(description="When anything here changed last.")
    alerts: list[Annotated[OpenAlert | EndedAlert, Field(discriminator="state")]]


# --- what stands in the feeds -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One alert at one moment."""

    past: History
    words: AlertWords
    message: CapMessage
    url: str
    cap_url: str

    @property
    def alert_id(self) -> str:
        return self.past.alert.alert_id

    @property
    def updated_ms(self) -> int:
        return self.past.last.sent_ms


@dataclass(frozen=True, slots=True)
class Document:
    """The bytes of one feed, plain and compressed, each with its ETag."""

    body: bytes
    etag: str
    compressed: bytes
    compressed_etag: str
    media_type: str
    updated_ms: int

    @classmethod
    def of(cls, body: bytes, media_type: str, updated_ms: int) -> Document:
        digest = hashlib.sha256(body).hexdigest()[:32]
        packed = gzip.compress(body, 6, mtime=0)
        return cls(body, f'"{digest}"', packed, f'"{digest}-gzip"', media_type, updated_ms)


def _moment(at_ms: int) -> str:
    """From 1970 to 2100: what was published at the terminal may lie beyond."""
    return moment(max(0, min(TIME_MS_MAX, at_ms)))


def json_document(entries: list[Entry], updated_ms: int) -> Document:
    """The JSON feed: `AlertFeed`."""
    feed = {"title": TITLE, "updated": _moment(updated_ms), "alerts": [_json(entry) for entry in entries]}
    return Document.of(orjson.dumps(feed), JSON_TYPE, updated_ms)


def _json(entry: Entry) -> dict[str, Any]:
    head = {
        "state": "ended" if entry.past.is_ended else "open",
        "alert_id": entry.alert_id,
        "revision": entry.past.last.revision,
        "updated": _moment(entry.updated_ms),
        "url": entry.url,
        "cap_url": entry.cap_url,
    }
    if entry.past.is_ended:
        return head | {"headline": ENDED_HEADLINE}
    alert, words, next_ms = entry.past.alert, entry.words, entry.past.next_growth_ms
    next_km = None if next_ms is None else radius_km(alert.schedule, next_ms - alert.missing_since_ms)
    return head | {
        "location": {"lat": alert.lat, "lng": alert.lng},
        "ring_km": entry.past.ring_km,
        "next_growth": None if next_ms is None else _moment(next_ms),
        "next_ring_km": next_km,
        "missing_since": _moment(alert.missing_since_ms),
        "expires_at": _moment(alert.expires_at_ms),
        "headline": words.headline,
        "place": words.place,
        "text": words.text,
        "contact": words.contact,
        "child": {name: getattr(words, name) for name in ("name", "sex", "age", "clothes", "features")},
        "photo_url": words.photo_url or None,
    }


def geojson_document(entries: list[Entry], updated_ms: int) -> Document:
    """The map: of an open alert a point and its ring, of an ended one a feature without a place (RFC 7946, 3.2)."""
    features = [feature for entry in entries for feature in _features(entry)]
    return Document.of(orjson.dumps({"type": "FeatureCollection", "features": features}), GEOJSON_TYPE, updated_ms)


def _features(entry: Entry) -> list[dict[str, Any]]:
    said = _json(entry)
    said.pop("child", None)
    if entry.past.is_ended:
        return [{"type": "Feature", "id": entry.alert_id, "geometry": None, "properties": said | {"role": "notice"}}]
    alert, ring_km = entry.past.alert, entry.past.ring_km
    shapes = {
        "place": {"type": "Point", "coordinates": [alert.lng, alert.lat]},
        "ring": ring_geometry(alert.lat, alert.lng, ring_km),
    }
    return [
        {
            "type": "Feature",
            "id": entry.alert_id if role == "place" else f"{entry.alert_id}/ring",
            "geometry": shape,
            "properties": said | {"role": role},
        }
        for role, shape in shapes.items()
    ]


def atom_document(entries: list[Entry], base_url: str, updated_ms: int) -> Document:
    """The index: each entry holds its CAP message, and links to it and to the page for people (RFC 4287)."""
    feed = etree.Element(f"{{{ATOM}}}feed", nsmap={None: ATOM})
    feed_url = f"{base_url}/feed/alerts.atom"
    _atom(feed, "id", feed_url)
    _atom(feed, "title", TITLE)
    _atom(feed, "updated", _moment(updated_ms))
    _atom(_atom(feed, "author"), "name", "团圆 Tuanyuan")
    _atom(feed, "link", rel="self", type=ATOM_TYPE, href=feed_url)
    for entry in entries:
        message, element = entry.message, _atom(feed, "entry")
        info = message.infos[0]
        _atom(element, "id", entry.url)
        _atom(element, "title", info.headline or info.event)
        _atom(element, "updated", _moment(entry.updated_ms))
        _atom(element, "published", _moment(entry.past.steps[0].sent_ms))
        _atom(element, "link", rel="alternate", type="text/html", href=entry.url)
        _atom(element, "link", rel="alternate", type="application/cap+xml", href=entry.cap_url)
        _atom(element, "summary", info.description or info.headline or info.event)
        _atom(element, "content", type="application/cap+xml").append(write_message(message))
    body = etree.tostring(feed, encoding="utf-8", xml_declaration=True)
    return Document.of(cast(bytes, body), ATOM_TYPE, updated_ms)


def _atom(parent: etree._Element, name: str, text: str | None = None, **attributes: str) -> etree._Element:
    element = etree.SubElement(parent, f"{{{ATOM}}}{name}", attributes)
    element.text = None if text is None else xml_text(text)
    return element


# --- keeping them -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Known:
    """A public alert that stands in the feeds, or may again: open, or ended a short while ago."""

    alert: DeskAlert
    events: list[tuple[AlertRevision | AlertClose, int]]
    words: AlertWords = field(default_factory=AlertWords)


def _withdrawn_ms(known: _Known) -> int:
    """When an alert that is for some partners alone stopped to be for everybody; 0: it never was."""
    withdrawn_ms = 0
    for event, at_ms in reversed(known.events):
        if isinstance(event, AlertRevision):
            if event.alert.audience is None:
                return withdrawn_ms
            withdrawn_ms = at_ms
    return 0


class FeedKeeper:
    """The three feeds, kept up with the desk by a thread. `refresh` is one look; the endpoints read `documents`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._client = gateway.client
        self._desk = gateway.desk
        self._base_url = gateway.config.base_url
        self._clock = gateway.clock
        self._seen: LogId | None = None
        """Of the desk's stream; None: nothing was read yet."""
        self._known: dict[str, _Known] = {}
        self._changed_ms = 0
        """The last moment at which anything that was ever in the feeds changed."""
        self._due_ms = 0
        """When the feeds change by themselves."""
        self._words_due_s = 0.0
        self._documents: dict[str, Document] = {}
        self._looked_s = -FRESH_S
        self._builds = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feeds", daemon=True)

    @property
    def builds(self) -> int:
        """How often the bytes were made anew."""
        return self._builds

    def start(self) -> None:
        """Keep up with the desk from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        self._stopping.set()
        self._thread.join(10)

    def document(self, name: str) -> Document:
        """The feed of this name, "atom", "geojson" or "json", as it is now. Never blocks. Raises Problem 503."""
        found = self._documents.get(name)
        if found is None or self._clock.monotonic_s() - self._looked_s > FRESH_S:
            detail = "the desk could not be read for a while, so what this feed says may not be so any more"
            raise Problem(503, "feed-stale", detail, headers={"Retry-After": "2"})
        return found

    def refresh(self) -> None:
        """Take up what changed, and make the bytes anew if anything did. Raises redis.RedisError."""
        now_ms = self._desk.now_ms()
        head = last_id(self._client, DESK_KEY)
        changed = self._take_events(head)
        now_s = self._clock.monotonic_s()
        if changed or now_s >= self._words_due_s:
            changed = self._take_words(now_ms) or changed
            self._words_due_s = now_s + WORDS_S
        if changed or now_ms >= self._due_ms or not self._documents:
            self._build(now_ms)
        self._looked_s = self._clock.monotonic_s()

    def _take_events(self, head: LogId) -> bool:
        """Read the alerts that the desk's stream names since the last look; all of them at the first."""
        if self._seen is not None and head == self._seen:
            return False
        if self._seen is None or head < self._seen:  # the server lost its tail: nothing that was read counts
            raw_ids = cast("list[bytes]", self._client.zrange(ALERT_IDS_KEY, 0, -1))
            alert_ids = [raw.decode() for raw in raw_ids]
            self._known.clear()
        else:
            alert_ids = changed_alert_ids(self._client, self._seen, head)
        now_ms = self._desk.now_ms()
        for alert_id in alert_ids:
            self._known.pop(alert_id, None)
            alert = self._desk.show(alert_id)
            if alert is None or alert.alert.status != "actual":
                continue
            ended_ms = ended_at_ms(alert, now_ms)
            if ended_ms is not None and is_public(alert) and now_ms >= ended_ms + ENDED_SHOWN_MS:
                self._changed_ms = max(self._changed_ms, ended_ms + ENDED_SHOWN_MS)
                continue
            known = _Known(alert, desk_events(self._client, alert))
            if is_public(alert):
                self._known[alert_id] = known
            else:
                self._changed_ms = max(self._changed_ms, _withdrawn_ms(known))
        self._seen = head
        return True

    def _take_words(self, now_ms: int) -> bool:
        """Read the words of open alerts; whether any are other ones."""
        open_ids = [alert_id for alert_id, known in self._known.items() if known.alert.is_open(now_ms)]
        changed = False
        for alert_id, case in zip(open_ids, read_cases(self._client, open_ids), strict=True):
            known = self._known[alert_id]
            words = public_words(self._gateway, known.alert, case)
            changed = changed or words != known.words
            known.words = words
        return changed

    def _build(self, now_ms: int) -> None:
        entries: list[Entry] = []
        dues: list[int] = []
        for alert_id, known in list(self._known.items()):
            past = history(known.alert, known.events, now_ms)
            alert, last_ms = past.alert, past.last.sent_ms
            self._changed_ms = max(self._changed_ms, last_ms)
            ended_ms = ended_at_ms(known.alert, now_ms)
            if ended_ms is not None:
                known.words = AlertWords()
                if now_ms >= ended_ms + ENDED_SHOWN_MS:
                    self._changed_ms = max(self._changed_ms, ended_ms + ENDED_SHOWN_MS)
                    del self._known[alert_id]
                    continue
                dues.append(ended_ms + ENDED_SHOWN_MS)
            elif not is_matching(known.alert, now_ms):
                # Nobody new is told; an edit can bring it back, and when it ends that stands here for a day.
                self._changed_ms = max(self._changed_ms, alert.expires_at_ms + 1)
                dues.append(alert.expires_at_ms + AUTO_CLOSE_MS)
                continue
            else:
                expired_ms = alert.expires_at_ms + 1
                dues.append(min(past.next_growth_ms or expired_ms, expired_ms))
            entries.append(self._entry(past, known.words))
        entries.sort(key=lambda entry: (-entry.updated_ms, entry.alert_id))
        self._documents = {
            "atom": atom_document(entries, self._base_url, self._changed_ms),
            "geojson": geojson_document(entries, self._changed_ms),
            "json": json_document(entries, self._changed_ms),
        }
        self._due_ms = min(dues, default=1 << 62)
        self._builds += 1

    def _entry(self, past: History, words: AlertWords) -> Entry:
        url = page_url(self._gateway, past.alert.alert_id)
        message = alert_message(past, words, self._base_url, url)
        return Entry(past, words, message, url, cap_url(self._gateway, past.alert.alert_id))

    def _run(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            try:
                self.refresh()
                failures = 0
                self._stopping.wait(LOOK_S)
            except redis.RedisError as error:
                failures += 1
                if worth_a_line(failures):
                    logger.warning("feeds cannot be compared with the desk (try %d): %s", failures, error)
                self._stopping.wait(min(1.0, 0.02 * 2 ** min(failures, 8)))
            except Exception:
                # Feeds that grow old are refused to those who ask: better than a thread that is gone.
                failures += 1
                if worth_a_line(failures):
                    logger.exception("feeds cannot be made (try %d)", failures)
                self._stopping.wait(1.0)


def start(gateway: Gateway) -> FeedKeeper:
    """Keep the feeds from now on."""
    keeper = FeedKeeper(gateway)
    try:
        keeper.refresh()  # so that the first poll finds the feeds
    except redis.RedisError as error:
        logger.warning("feeds cannot be made yet: %s", error)
    keeper.start()
    return keeper


# --- giving them away -------------------------------------------------------------------------------------------------

_NAMES = {"atom": ATOM_TYPE, "geojson": GEOJSON_TYPE, "json": JSON_TYPE}
IfNoneMatch = Annotated[
    str | None, Header(max_length=1_000, description="ETags that are at hand: 304 if one still holds.")
]


def matches(if_none_match: str, etag: str) -> bool:
    """Whether one of the header's ETags is ours: compared weakly, as RFC 9110, 13.1.2 has it."""
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return "*" in tags or etag in tags


def accepts_gzip(header: str) -> bool:
    """Whether an Accept-Encoding takes gzip."""
    for part in header.lower().split(","):
        coding, _, weight = part.partition(";")
        if coding.strip() in ("gzip", "*"):
            return weight.strip().removeprefix("q=").strip("0.") != "" or not weight.strip()
    return False


def feed_response(request: Request, document: Document, max_age_s: int) -> Response:
    """200 with the bytes, or 304. HEAD: the same without them."""
    compressed = accepts_gzip(request.headers.get("accept-encoding", ""))
    etag = document.compressed_etag if compressed else document.etag
    headers = {
        "ETag": etag,
        "Last-Modified": format_datetime(utc_now(document.updated_ms // 1000 * 1000), usegmt=True),
        "Cache-Control": f"public, max-age={max_age_s}",
        "Vary": "Accept-Encoding",
        # Pages of map and social partners read it from elsewhere.
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Expose-Headers": "ETag, Last-Modified",
        "Cross-Origin-Resource-Policy": "cross-origin",
    }
    if_none_match = ",".join(request.headers.getlist("if-none-match"))
    if if_none_match and matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    if compressed:
        headers["Content-Encoding"] = "gzip"
    body = document.compressed if compressed else document.body
    headers["Content-Length"] = str(len(body))
    return Response(b"" if request.method == "HEAD" else body, headers=headers, media_type=document.media_type)


def _feed(request: Request, name: str) -> Response:
    gateway = gateway_of(request)
    return feed_response(request, gateway.service(FeedKeeper).document(name), gateway.config.feed_cache_s)


def _described(media_type: str, schema: dict[str, Any] | None = None) -> dict[int | str, dict[str, Any]]:
    ok: dict[str, Any] = {"description": "The feed, with ETag and Last-Modified."}
    if schema is not None:
        ok["content"] = {media_type: {"schema": schema}}
    unchanged = {"description": "What If-None-Match names still holds; no body."}
    return {200: ok, 304: unchanged, **responses(503)}


_GEOJSON_SCHEMA = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {"type": "object", "required": ["type", "id", "geometry", "properties"]},
        },
    },
}


class _Bytes(Response):
    media_type = None


@router.head("/feed/alerts.atom", include_in_schema=False)
@router.get(
    "/feed/alerts.atom",
    summary="Open alerts as an Atom index of CAP messages",
    response_class=_Bytes,
    responses=_described(ATOM_TYPE, {"type": "string"}),
)
async def alerts_atom(request: Request, _if_none_match: IfNoneMatch = None) -> Response:
    """RFC 4287. An entry's id is the alert's page and stays; its content is the newest CAP 1.2 message."""
    return _feed(request, "atom")


@router.head("/feed/alerts.geojson", include_in_schema=False)
@router.get(
    "/feed/alerts.geojson",
    summary="Open alerts and their rings as GeoJSON",
    response_class=_Bytes,
    responses=_described(GEOJSON_TYPE, _GEOJSON_SCHEMA),
)
async def alerts_geojson(request: Request, _if_none_match: IfNoneMatch = None) -> Response:
    """RFC 7946. Of an open alert a feature of the role `place` (a point) and one of the role `ring` (its polygon now).

    An ended one is a feature of the role `notice` without geometry.
    """
    return _feed(request, "geojson")


@router.head("/feed/alerts.json", include_in_schema=False)
@router.get(
    "/feed/alerts.json",
    summary="Open alerts as JSON",
    response_class=_Bytes,
    responses={
        200: {"description": "The feed, with ETag and Last-Modified.", "model": AlertFeed, "content": {JSON_TYPE: {}}},
        304: {"description": "What If-None-Match names still holds; no body."},
        **responses(503),
    },
)
async def alerts_json(request: Request, _if_none_match: IfNoneMatch = None) -> Response:
    """Open alerts, and for 24 hours those that ended. What is not here has ended, or expired."""
    return _feed(request, "json")
