"""The feeds: what stands in them, for how long, under which ETag, and that a poll costs nothing."""

from __future__ import annotations

import gzip
from datetime import datetime
from typing import Any

import msgspec
import orjson
import pytest
import redis
from lxml import etree

from flows.desk import Desk
from flows.metrics import Metrics
from gateway.app import create_app
from gateway.cap_messages import read_message
from gateway.cap_xml import satisfies_schema
from gateway.cases import read_case, write_case
from gateway.config import GatewayConfig
from gateway.errors import Problem
from gateway.feeds import ATOM, AlertFeed, FeedKeeper, matches
from gateway.runtime import Gateway
from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_SCHEDULE, Alert
from tests.flows.waiting import eventually
from tests.gateway.conftest import Http, Keys
from tests.gateway.desk import HOUR_MS, now_ms, published

A, CAP = f"{{{ATOM}}}", "{urn:oasis:names:tc:emergency:cap:1.2}"
PATHS = ("/feed/alerts.atom", "/feed/alerts.geojson", "/feed/alerts.json")
WORDS = ("王小明", "红色外套", "文三路", "公交车", "0571")


@pytest.fixture
def keeper(gateway: Gateway) -> FeedKeeper:
    """One without a thread: it looks when it is told to."""
    return FeedKeeper(gateway)


class DeskClock:
    """The desk's clock, for the keeper: the server's, and so much later as a test says."""

    def __init__(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead_ms = 0
        real = desk.now_ms
        monkeypatch.setattr(desk, "now_ms", lambda: real() + self.ahead_ms)


@pytest.fixture
def later(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> DeskClock:
    return DeskClock(gateway.desk, monkeypatch)


def put(gateway: Gateway, alert_id: str = "a17", **changes: Any) -> Alert:
    """An alert on the desk, missing for half an hour."""
    fields: dict[str, Any] = {
        "alert_id": alert_id,
        "revision": 1,
        "lat": 30.0,
        "lng": 114.0,
        "missing_since_ms": now_ms() - HOUR_MS // 2,
        "schedule": DEFAULT_SCHEDULE,
        "expires_at_ms": now_ms() + 72 * HOUR_MS,
    }
    alert = Alert(**(fields | changes))
    gateway.desk.publish(alert, {"headline": f"headline of {alert_id}"})
    return alert


def looked(keeper: FeedKeeper) -> dict[str, Any]:
    """The JSON feed after a look."""
    keeper.refresh()
    return dict(orjson.loads(keeper.document("json").body))


def features(keeper: FeedKeeper) -> list[dict[str, Any]]:
    return list(orjson.loads(keeper.document("geojson").body)["features"])


def ids(feed: dict[str, Any]) -> list[str]:
    return [alert["alert_id"] for alert in feed["alerts"]]


# --- what stands in them ----------------------------------------------------------------------------------------------


def test_an_open_alert_stands_in_every_feed(keeper: FeedKeeper, gateway: Gateway) -> None:
    alert = put(gateway)
    feed = looked(keeper)
    AlertFeed.model_validate(feed)
    (said,) = feed["alerts"]
    assert (said["state"], said["alert_id"], said["ring_km"], said["next_ring_km"]) == ("open", "a17", 100.0, 200.0)
    assert datetime.fromisoformat(said["next_growth"]).timestamp() * 1000 == alert.missing_since_ms + HOUR_MS
    assert said["location"] == {"lat": 30.0, "lng": 114.0}
    assert said["headline"] == "headline of a17"
    assert said["url"] == "https://alerts.example.org/a/a17"
    assert said["cap_url"] == "https://alerts.example.org/v1/alerts/a17/cap"
    place, ring = features(keeper)
    assert (place["id"], place["geometry"]) == ("a17", {"type": "Point", "coordinates": [114.0, 30.0]})
    assert (ring["id"], ring["geometry"]["type"]) == ("a17/ring", "Polygon")
    assert place["properties"]["ring_km"] == ring["properties"]["ring_km"] == 100.0


def test_empty_feeds_are_feeds(keeper: FeedKeeper, gateway: Gateway) -> None:
    assert looked(keeper)["alerts"] == []
    assert features(keeper) == []
    assert atom(keeper).findall(f"{A}entry") == []


def test_exercises_and_alerts_for_some_partners_are_in_no_feed(keeper: FeedKeeper, gateway: Gateway) -> None:
    put(gateway, "exercise", status="exercise", audience=("amap",))
    put(gateway, "narrow", audience=("amap",))
    keeper.refresh()
    for name in ("atom", "geojson", "json"):
        body = keeper.document(name).body
        assert b"exercise" not in body and b"narrow" not in body


def test_an_alert_that_is_narrowed_leaves_the_feeds_and_comes_back(keeper: FeedKeeper, gateway: Gateway) -> None:
    put(gateway)
    first = looked(keeper)
    gateway.desk.update("a17", {"audience": ("amap",)})
    narrowed = looked(keeper)
    assert ids(narrowed) == []
    assert narrowed["updated"] > first["updated"]
    gateway.desk.update("a17", {"audience": None})
    assert ids(looked(keeper)) == ["a17"]


def test_the_last_changed_alert_comes_first(keeper: FeedKeeper, gateway: Gateway) -> None:
    for alert_id in ("a1", "a2", "a3"):
        put(gateway, alert_id)
    assert sorted(ids(looked(keeper))) == ["a1", "a2", "a3"]
    gateway.desk.update("a2", {"lat": 31.0})
    feed = looked(keeper)
    assert ids(feed)[0] == "a2"
    updated = [alert["updated"] for alert in feed["alerts"]]
    assert updated == sorted(updated, reverse=True)
    assert feed["updated"] == updated[0]


def test_the_end_stands_for_a_day_in_neutral_words_and_then_is_gone(
    keeper: FeedKeeper, gateway: Gateway, later: DeskClock, http: Http, keys: Keys
) -> None:
    alert_id = published(http, keys.county)
    keeper.refresh()
    assert all("王小明".encode() in keeper.document(name).body for name in ("atom", "json"))
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found", "category": "killed"})
    feed = looked(keeper)
    AlertFeed.model_validate(feed)
    (said,) = feed["alerts"]
    assert (said["state"], said["headline"]) == ("ended", "搜寻已结束 The search has ended")
    (feature,) = features(keeper)
    assert feature["geometry"] is None
    for name in ("atom", "geojson", "json"):
        text = keeper.document(name).body.decode()
        assert not any(word in text for word in (*WORDS, "found", "killed", "30.27", "120.15"))
    later.ahead_ms = 24 * HOUR_MS - 60_000
    assert ids(looked(keeper)) == [alert_id]
    later.ahead_ms = 24 * HOUR_MS
    gone = looked(keeper)
    assert gone["alerts"] == []
    assert gone["updated"] > feed["updated"]


def test_an_expired_alert_leaves_until_it_is_extended(keeper: FeedKeeper, gateway: Gateway, later: DeskClock) -> None:
    put(gateway, expires_at_ms=now_ms() + HOUR_MS)
    assert ids(looked(keeper)) == ["a17"]
    later.ahead_ms = HOUR_MS + 1_000
    assert ids(looked(keeper)) == []
    gateway.desk.update("a17", {"expires_at_ms": now_ms() + 72 * HOUR_MS})
    assert ids(looked(keeper)) == ["a17"]


def test_an_alert_left_open_ends_by_itself_with_a_notice(
    keeper: FeedKeeper, gateway: Gateway, later: DeskClock
) -> None:
    alert = put(gateway, expires_at_ms=now_ms() + HOUR_MS)
    keeper.refresh()
    later.ahead_ms = alert.expires_at_ms + AUTO_CLOSE_MS + 1_000 - now_ms()
    (said,) = looked(keeper)["alerts"]
    assert said["state"] == "ended"


def test_a_picture_that_came_later_is_taken_up_without_an_event(
    keeper: FeedKeeper, gateway: Gateway, client: redis.Redis, http: Http, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:

    alert_id = published(http, keys.county)
    before = looked(keeper)
    case = read_case(client, alert_id)
    assert case is not None and before["alerts"][0]["photo_url"] is None
    with client.pipeline() as pipeline:
        write_case(pipeline, msgspec.structs.replace(case, photo="ab" * 32))
        pipeline.execute()
    monkeypatch.setattr("gateway.feeds.WORDS_S", 0.0)
    monkeypatch.setattr(keeper, "_words_due_s", 0.0)
    url = looked(keeper)["alerts"][0]["photo_url"]
    assert url.startswith(f"https://alerts.example.org/a/{alert_id}/photo.jpg")
    assert url in atom(keeper).find(f".//{CAP}resource/{CAP}uri").text


def test_an_alert_that_xml_can_hardly_hold_does_not_break_the_feeds(keeper: FeedKeeper, gateway: Gateway) -> None:
    put(gateway, "a <&>,\U0001f9d2", lat=90.0, lng=-180.0, expires_at_ms=253_402_300_800_000)
    gateway.desk.update("a <&>,\U0001f9d2", {}, content={"headline": "\x00\x1b <b>", "photo_url": "http://%%"})
    assert len(looked(keeper)["alerts"]) == 1
    assert atom(keeper).find(f"{A}entry/{A}title").text == "\ufffd\ufffd <b>"


# --- Atom -------------------------------------------------------------------------------------------------------------


def atom(keeper: FeedKeeper) -> etree._Element:
    return etree.fromstring(keeper.document("atom").body)


def check_atom(feed: etree._Element) -> None:
    """The rules of RFC 4287 for a feed document, as far as this one uses its elements."""

    def one(parent: etree._Element, name: str) -> etree._Element:
        (found,) = parent.findall(f"{A}{name}")
        return found

    def check_date(parent: etree._Element, name: str) -> None:
        moment = datetime.fromisoformat(one(parent, name).text)
        assert moment.tzinfo is not None
        assert "T" in one(parent, name).text

    assert feed.tag == f"{A}feed"  # 4.1.1
    allowed = {"author", "id", "link", "title", "updated", "entry"}
    assert {etree.QName(child).localname for child in feed} <= allowed
    assert one(feed, "author").findall(f"{A}name")
    assert one(feed, "id").text.startswith("https://")
    assert one(feed, "title").text
    check_date(feed, "updated")
    assert [link.get("rel") for link in feed.findall(f"{A}link")] == ["self"]
    entries = feed.findall(f"{A}entry")
    assert len({one(entry, "id").text for entry in entries}) == len(entries)
    for entry in entries:  # 4.1.2
        assert one(entry, "id").text.startswith("https://")
        assert one(entry, "title").text
        assert one(entry, "summary").text
        check_date(entry, "updated")
        check_date(entry, "published")
        alternates = [
            (link.get("type"), link.get("hreflang"))
            for link in entry.findall(f"{A}link")
            if link.get("rel") == "alternate"
        ]
        assert len(set(alternates)) == len(alternates)  # 4.1.2: not two of one type and language
        assert all(link.get("href") for link in entry.iter(f"{A}link"))
        content = one(entry, "content")  # 4.1.3.3: XML media type, one element inside
        assert content.get("type").endswith("+xml")
        assert len(content) == 1 and not (content.text or "").strip()


def test_the_index_is_atom_and_its_entries_hold_cap(keeper: FeedKeeper, gateway: Gateway) -> None:
    put(gateway, "a1")
    put(gateway, "a2")
    gateway.desk.close("a2", "found")
    keeper.refresh()
    feed = atom(keeper)
    check_atom(feed)
    by_id = {entry.find(f"{A}id").text: entry for entry in feed.iter(f"{A}entry")}
    assert set(by_id) == {"https://alerts.example.org/a/a1", "https://alerts.example.org/a/a2"}
    for alert_id, kind in (("a1", "Alert"), ("a2", "Cancel")):
        alert = by_id[f"https://alerts.example.org/a/{alert_id}"].find(f"{A}content")[0]
        assert satisfies_schema(alert)
        assert read_message(alert).kind == kind


def test_an_entry_keeps_its_id_and_its_time_moves_on(keeper: FeedKeeper, gateway: Gateway, later: DeskClock) -> None:
    put(gateway)
    keeper.refresh()
    first = atom(keeper).find(f"{A}entry")
    later.ahead_ms = HOUR_MS
    keeper.refresh()
    second = atom(keeper).find(f"{A}entry")
    assert first.find(f"{A}id").text == second.find(f"{A}id").text
    assert first.find(f"{A}published").text == second.find(f"{A}published").text
    assert first.find(f"{A}updated").text < second.find(f"{A}updated").text
    message = read_message(second.find(f"{A}content")[0])
    assert (message.kind, message.infos[0].circles[0].km) == ("Update", 200.0)


# --- when the bytes change --------------------------------------------------------------------------------------------


def test_bytes_are_made_anew_only_when_something_changes(
    keeper: FeedKeeper, gateway: Gateway, later: DeskClock
) -> None:
    put(gateway)
    keeper.refresh()
    document = keeper.document("json")
    for _ in range(3):
        keeper.refresh()
    later.ahead_ms = HOUR_MS // 4
    keeper.refresh()
    assert (keeper.builds, keeper.document("json")) == (1, document)
    later.ahead_ms = HOUR_MS // 2 + 1_000
    keeper.refresh()
    assert keeper.builds == 2
    assert keeper.document("json").etag != document.etag
    assert orjson.loads(keeper.document("json").body)["alerts"][0]["ring_km"] == 200.0


def test_every_gateway_gives_the_same_bytes_whenever_it_was_started(
    keeper: FeedKeeper, gateway: Gateway, later: DeskClock
) -> None:
    keeper.refresh()
    for alert_id in ("a1", "a2", "a3", "a4"):
        put(gateway, alert_id)
        keeper.refresh()
    gateway.desk.update("a1", {"audience": ("amap",)})
    keeper.refresh()
    gateway.desk.close("a2", "found")
    for ahead_ms in (0, HOUR_MS, 25 * HOUR_MS, 73 * HOUR_MS):
        later.ahead_ms = ahead_ms
        keeper.refresh()
        another = FeedKeeper(gateway)
        another.refresh()
        for name in ("atom", "geojson", "json"):
            assert another.document(name) == keeper.document(name), (name, ahead_ms)


def test_a_server_that_lost_its_tail_is_read_from_the_beginning(
    keeper: FeedKeeper, gateway: Gateway, client: redis.Redis
) -> None:
    put(gateway, "a1")
    keeper.refresh()
    client.delete("desk", "alerts:{desk}", "alert:{desk}:a1")
    assert ids(looked(keeper)) == []


def test_feeds_that_cannot_be_compared_with_the_desk_are_not_given_away(
    keeper: FeedKeeper, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Problem) as early:
        keeper.document("json")
    assert early.value.status_code == 503
    keeper.refresh()
    assert keeper.document("json").body
    monkeypatch.setattr(keeper, "_looked_s", keeper._looked_s - 11)
    with pytest.raises(Problem, match="could not be read"):
        keeper.document("json")


# --- over HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "media_type"),
    list(zip(PATHS, ("application/atom+xml", "application/geo+json", "application/json"), strict=True)),
)
def test_a_feed_is_given_once_and_then_304(http: Http, keys: Keys, path: str, media_type: str) -> None:
    published(http, keys.county)
    plain = {"Accept-Encoding": "identity"}
    eventually(lambda: "文三路" in http.get("/feed/alerts.json", headers=plain).text)
    answer = http.get(path, headers=plain)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    assert answer.headers["cache-control"] == "public, max-age=10"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert answer.headers["vary"] == "Accept-Encoding"
    assert answer.headers["last-modified"].endswith("GMT")
    etag = answer.headers["etag"]
    for header in (etag, f"W/{etag}", f'"x", {etag}', "*"):
        unchanged = http.get(path, headers=plain | {"If-None-Match": header})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == etag
    assert http.get(path, headers=plain | {"If-None-Match": '"another"'}).status_code == 200
    head = http.request("HEAD", path, headers=plain)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))
    assert head.headers["etag"] == etag


def test_a_compressed_feed_has_an_etag_of_its_own(http: Http) -> None:
    plain = http.get("/feed/alerts.json", headers={"Accept-Encoding": "identity"})
    packed = http.get("/feed/alerts.json", headers={"Accept-Encoding": "br;q=1.0, gzip;q=0.5"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == plain.content  # httpx unpacks
    assert packed.headers["etag"] != plain.headers["etag"]
    refused = http.get("/feed/alerts.json", headers={"Accept-Encoding": "gzip;q=0"})
    assert "content-encoding" not in refused.headers


def test_a_document_unpacks_to_itself(keeper: FeedKeeper, gateway: Gateway) -> None:
    put(gateway)
    keeper.refresh()
    for name in ("atom", "geojson", "json"):
        document = keeper.document(name)
        assert gzip.decompress(document.compressed) == document.body


@pytest.mark.parametrize(
    ("header", "etag", "holds"),
    [
        ('"a"', '"a"', True),
        ('W/"a"', '"a"', True),
        (' "b" ,"a"', '"a"', True),
        ("*", '"a"', True),
        ('"b"', '"a"', False),
        ("a", '"a"', False),
        ("", '"a"', False),
        ('"a-gzip"', '"a"', False),
    ],
)
def test_etags_are_compared_weakly(header: str, etag: str, holds: bool) -> None:
    assert matches(header, etag) is holds


def test_a_poll_asks_the_server_nothing(http: Http, keys: Keys, client: redis.Redis) -> None:
    published(http, keys.county)
    eventually(lambda: "文三路" in http.get("/feed/alerts.json").text)

    def asked() -> int:
        return int(client.info("stats")["total_commands_processed"])

    def polled(count: int) -> int:
        before = asked()
        for _ in range(count):
            http.get("/feed/alerts.geojson")
        return asked() - before

    fewest = min(polled(50) for _ in range(5))  # what other threads ask meanwhile is not the polls' doing
    assert fewest < 50


def test_the_description_of_the_feeds_is_made(config: GatewayConfig, client: redis.Redis) -> None:
    paths = create_app(config, client, Metrics()).openapi()["paths"]
    assert set(PATHS) <= set(paths)
    assert set(paths["/v1/cap"]["post"]["requestBody"]["content"]) == {
        "application/cap+xml",
        "application/xml",
        "text/xml",
    }
