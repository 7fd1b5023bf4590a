"""The public page: what is told while a child is looked for, and how little afterwards."""

from __future__ import annotations

import io
from html.parser import HTMLParser

import msgspec
import pytest
import redis
from PIL import Image

from flows.desk import Desk
from gateway.alerts import public_alerts
from gateway.cases import Case, ChildWords, Words, read_case, write_case
from gateway.public import html_page
from gateway.runtime import Gateway
from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS
from tests.gateway.conftest import Http, Keys
from tests.gateway.desk import desk_events, now_ms, published
from tests.gateway.test_photos import encoded, picture

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that elements are closed in order; keeps texts, tags and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def put_photo(http: Http, key: str, alert_id: str) -> int:
    body = encoded(picture(), "JPEG")
    headers = {"Content-Type": "image/jpeg"}
    return http.put(f"/v1/alerts/{alert_id}/photo", key=key, content=body, headers=headers).status_code


def test_page_tells_in_two_languages_whom_to_look_for(http: Http, keys: Keys) -> None:
    alert_id = published(http, keys.county)
    assert put_photo(http, keys.county, alert_id) == 200
    answer = http.get(f"/a/{alert_id}")
    page = Page(answer.text)
    for words in (
        "王小明",
        "男 male",
        "6 岁 years",
        "红色外套",
        "文三路",
        "Missing since",
        "孩子可能乘坐公交车离开。",
        "110",
    ):
        assert words in page.text
    assert answer.text.startswith('<!DOCTYPE html>\n<html lang="zh-CN">')
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images[0]["alt"] == "照片：王小明，男，6岁 (photo: 王小明, male, 6 years old)"
    assert str(images[0]["src"]).startswith(f"/a/{alert_id}/photo.jpg?v=")
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links == ["tel:057188001122"]
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "form", "link", "object"}
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src" not in policy and "unsafe" not in policy
    assert answer.headers["x-robots-tag"].startswith("noindex, noarchive")
    assert answer.headers["cache-control"] == "public, max-age=10, must-revalidate"


def test_words_cannot_become_markup(http: Http, keys: Keys) -> None:
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(1)>'
    alert_id = published(
        http, keys.county, child={"name": evil, "clothes": evil}, text=evil, place=evil, contact=evil, headline=evil
    )
    assert put_photo(http, keys.county, alert_id) == 200
    page = Page(http.get(f"/a/{alert_id}").text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and tags.count("img") == 1
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)


@pytest.mark.parametrize("outcome", ["found", "false_report", "cancelled"])
def test_page_turns_into_one_and_the_same_neutral_notice_at_closing(
    http: Http, keys: Keys, client: redis.Redis, outcome: str
) -> None:
    alert_id = published(http, keys.county)
    put_photo(http, keys.county, alert_id)
    picture_path = http.get(f"/a/{alert_id}.json").json()["photo_url"].removeprefix("https://alerts.example.org")
    assert http.get(picture_path).headers["content-type"] == "image/jpeg"
    category = {"found": "drowned", "false_report": "false_report_dispute", "cancelled": None}[outcome]
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": outcome, "category": category})
    html, page = http.get(f"/a/{alert_id}"), http.get(f"/a/{alert_id}.json")
    assert (html.status_code, page.status_code) == (200, 200)
    for text in (html.text, page.text):
        assert "搜寻已结束" in text and "The search has ended" in text
        for told in ("王小明", "红色", "文三路", "0571", "30.27", "photo.jpg", "drowned", "dispute", outcome):
            assert told not in text
    said = page.json()
    assert {name for name, value in said.items() if value not in (None, "")} == {
        "alert_id",
        "state",
        "exercise",
        "notice",
        "headline",
        "changed_at",
        "revision",
        "url",
    }
    assert http.get(picture_path).status_code == 410
    case = read_case(client, alert_id)
    assert case is not None and case.words is not None  # the desk still knows


def test_alert_that_closed_by_itself_shows_nothing_even_before_anybody_swept(
    http: Http, keys: Keys, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert_id = published(http, keys.county)
    later_ms = now_ms() + 72 * HOUR_MS + AUTO_CLOSE_MS
    monkeypatch.setattr(gateway.desk, "now_ms", lambda: later_ms)
    assert http.get(f"/a/{alert_id}.json").json()["state"] == "ended"
    assert "王小明" not in http.get(f"/a/{alert_id}").text


def test_exercise_is_marked_wherever_it_can_be_read(http: Http, keys: Keys) -> None:
    alert_id = published(http, keys.county, status="exercise", audience=["amap"])
    for _ in range(2):
        html, page = http.get(f"/a/{alert_id}").text, http.get(f"/a/{alert_id}.json").json()
        heading = html[html.index("<h1>") : html.index("</h1>")]
        title = html[html.index("<title>") : html.index("</title>")]
        assert all("演习" in part and "EXERCISE" in part for part in (heading, title, page["headline"], page["notice"]))
        assert "这不是真实警情" in html and page["exercise"]
        http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "cancelled"})


def test_unknown_alert_has_no_page(http: Http) -> None:
    for path in ("/a/a-never", "/a/a-never.json", "/a/a-never/photo.jpg"):
        assert http.get(path).status_code == 404


def test_client_that_has_the_page_is_not_sent_it_again(http: Http, keys: Keys) -> None:
    alert_id = published(http, keys.county)
    put_photo(http, keys.county, alert_id)
    etag = ""
    for path in (f"/a/{alert_id}/photo.jpg", f"/a/{alert_id}.json", f"/a/{alert_id}"):
        etag = http.get(path).headers["etag"]
        again = http.get(path, headers={"If-None-Match": f'"x", W/{etag}'})
        assert (again.status_code, again.content) == (304, b"")
        http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json={"place": path})
    changed = http.get(f"/a/{alert_id}", headers={"If-None-Match": etag})
    assert changed.status_code == 200


# --- pictures by HTTP -------------------------------------------------------------------------------------------------


def test_picture_is_shown_replaced_and_taken_away_without_telling_anybody(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county)
    path = f"/v1/alerts/{alert_id}/photo"
    assert http.get(f"/a/{alert_id}/photo.jpg").status_code == 404
    assert put_photo(http, keys.county, alert_id) == 200
    first = http.get(f"/a/{alert_id}.json").json()["photo_url"]
    other = encoded(Image.new("RGB", (100, 100), "green"), "PNG")
    answer = http.put(path, key=keys.county, content=other, headers={"Content-Type": "image/png"})
    assert (answer.status_code, answer.json()["event"], answer.json()["revision"]) == (200, "photo", 1)
    assert http.get(f"/a/{alert_id}.json").json()["photo_url"] != first
    shown = Image.open(io.BytesIO(http.get(f"/a/{alert_id}/photo.jpg").content))
    assert (shown.format, shown.size) == ("JPEG", (100, 100))
    assert http.delete(path, key=keys.county).status_code == 200
    assert http.get(f"/a/{alert_id}.json").json()["photo_url"] is None
    assert len(desk_events(client)) == 1


def test_what_is_no_picture_is_refused_and_the_one_before_stays(http: Http, keys: Keys, gateway: Gateway) -> None:
    alert_id = published(http, keys.county)
    path = f"/v1/alerts/{alert_id}/photo"
    assert put_photo(http, keys.county, alert_id) == 200
    before = http.get(f"/a/{alert_id}/photo.jpg").content
    refused = [
        http.put(path, key=keys.county, content=b"%PDF-1.7", headers={"Content-Type": "application/pdf"}),
        http.put(path, key=keys.county, content=b"no picture", headers={"Content-Type": "image/png"}),
        http.put(
            path,
            key=keys.county,
            content=b"\0" * (gateway.config.photo_bytes_max + 1),
            headers={"Content-Type": "image/png"},
        ),
        http.put(path, key=keys.station, content=before, headers={"Content-Type": "image/jpeg"}),
        http.put(path, content=before, headers={"Content-Type": "image/jpeg"}),
        http.put("/v1/alerts/a-never/photo", key=keys.county, content=before, headers={"Content-Type": "image/jpeg"}),
    ]
    assert [answer.status_code for answer in refused] == [415, 422, 413, 403, 401, 404]
    assert http.get(f"/a/{alert_id}/photo.jpg").content == before


# --- feeds ------------------------------------------------------------------------------------------------------------


def test_feeds_hold_open_alerts_for_everybody_and_notices_of_the_last_day(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = published(http, keys.county)
    published(http, keys.county, status="exercise", audience=["amap"])
    published(http, keys.county, audience=["amap"])
    ended = published(http, keys.county, place="other")
    http.post(f"/v1/alerts/{ended}/close", key=keys.county, json={"outcome": "found", "category": "killed"})
    last, first = public_alerts(gateway)
    assert (last.known.alert.alert_id, first.known.alert.alert_id) == (ended, shown)
    assert first.words is not None and first.headline == "寻找失踪儿童：王小明，男，6岁"
    assert first.ring is not None and first.ended_at_ms is None
    assert (last.words, last.photo_url, last.ring) == (None, None, None)
    assert last.headline == "搜寻已结束 The search has ended"
    later_ms = Desk(client).now_ms() + 25 * HOUR_MS
    monkeypatch.setattr(gateway.desk, "now_ms", lambda: later_ms)
    assert [alert.known.alert.alert_id for alert in public_alerts(gateway)] == [shown]


def test_page_says_little_where_little_is_known_and_nothing_where_it_is_erased(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county)
    case = read_case(client, alert_id)
    assert isinstance(case, Case)
    for words, heading in ((Words(child=ChildWords()), "寻找失踪儿童"), (None, "搜寻已结束")):
        with client.pipeline() as pipeline:
            write_case(pipeline, msgspec.structs.replace(case, words=words))
            pipeline.execute()
        (alert,) = public_alerts(gateway)
        assert heading in Page(html_page(alert)).text
