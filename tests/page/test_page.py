"""The operator's page in a browser, in front of a real server, flow and gateway."""

from __future__ import annotations

import io
import re
import signal
import time
from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from gateway.alert_models import moment
from geoindex.entries import HOUR_MS
from scripts.small_deployment import SmallDeployment
from tests.page.conftest import WAIT_MS, Opener

expect.set_options(timeout=WAIT_MS)

CHENGDU = {"lat": 30.66, "lng": 104.06}
HANGZHOU = {"lat": 30.2741, "lng": 120.1551}


class Desk:
    """The desk over HTTP, beside the page."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def publish(self, **changes: Any) -> str:
        body = {
            "location": CHENGDU,
            "missing_since": moment(round(time.time() * 1000)),
            "child": {"name": "王小明", "sex": "male", "age": 6, "clothes": "红色外套"},
            "place": "春熙路",
        }
        answer = self._client.post("/v1/alerts", json=body | changes)
        assert answer.status_code == 201, answer.text
        return cast(str, answer.json()["alert_id"])

    def alert(self, alert_id: str) -> dict[str, Any]:
        return cast("dict[str, Any]", self._client.get(f"/v1/alerts/{alert_id}").json())

    def close(self, alert_id: str) -> None:
        assert self._client.post(f"/v1/alerts/{alert_id}/close", json={"outcome": "cancelled"}).is_success


@pytest.fixture
def desk(deployment: SmallDeployment, officer_key: str) -> Iterator[Desk]:
    headers = {"Authorization": f"Bearer {officer_key}"}
    with httpx.Client(base_url=deployment.url, headers=headers, timeout=30) as client:
        yield Desk(client)


def live(page: Page) -> Page:
    """The page, once figures come."""
    expect(page.get_by_test_id("connection")).to_have_attribute("data-state", "live")
    return page


def row_of(page: Page, alert_id: str) -> Locator:
    return page.locator(f'[data-testid="alert-row"][data-alert="{alert_id}"]')


def point_at(page: Page, alert_id: str) -> tuple[float, float]:
    """Move the mouse onto a mark, and again only if the mark has another place on the page by then; where it is."""
    container = page.locator(".maplibregl-canvas-container")
    at: tuple[float, float] | None = None
    for _ in range(300):
        mark, box = mark_of(page, alert_id), page.locator(".map").bounding_box()
        assert box
        place = box["x"] + mark["x"], box["y"] + mark["y"]
        if place != at:
            page.mouse.move(*place)
            at = place
        page.wait_for_timeout(100)
        if container.evaluate("element => getComputedStyle(element).cursor") == "pointer":
            return place
    raise AssertionError(f"no pointer over the mark of {alert_id}, at {at}")


def mark_of(page: Page, alert_id: str) -> dict[str, Any]:
    """An alert's mark as it stands on the map now, in the map's pixels; waits until it is there."""
    find = "id => window.tuanyuanMap?.marksShown().find(mark => mark.id === id)"
    return cast("dict[str, Any]", page.wait_for_function(find, arg=alert_id).json_value())


def features_of(page: Page, source: str, alert_id: str) -> list[dict[str, Any]]:
    """What the map has been given of an alert; waits until it has something."""
    find = """async ([source, id]) => {
        const held = await window.tuanyuanMap?.map.getSource(source)?.getData()
        const found = held?.features.filter(one => one.properties.id === id)
        return found ?? [] }"""
    for _ in range(200):
        if found := cast("list[dict[str, Any]]", page.evaluate(find, [source, alert_id])):
            return found
        page.wait_for_timeout(50)
    raise AssertionError(f"the map was given nothing of {alert_id} in {source}")


def fill(page: Page, **values: str) -> None:
    """Type into fields of the form; `__` stands for a dot."""
    for name, value in values.items():
        page.get_by_test_id(f"field-{name.replace('__', '.')}").fill(value)


def serious(page: Page) -> list[str]:
    """What axe-core finds that keeps somebody from using the page."""
    found = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html']} {node['failureSummary']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_page_loads_and_draws_the_map_and_every_chart(open_page: Opener, operator_key: str) -> None:
    page = live(open_page(operator_key))
    expect(page.get_by_test_id("tile-phones")).to_have_text("40 k")
    expect(page.locator(".chart canvas")).to_have_count(12)
    expect(page.get_by_test_id("chart-pings")).to_contain_text("amap")
    expect(page.get_by_test_id("clock")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
    for minutes in (60, 1440):
        page.get_by_test_id(f"span-{minutes}").click()
        expect(page.get_by_test_id("chart-pings")).to_contain_text("amap")
    # Sea, land and coast at least: an empty canvas has one colour.
    expect(page.locator(".maplibregl-canvas")).to_be_visible()
    deadline_s = time.monotonic() + 30
    while True:
        picture = Image.open(io.BytesIO(page.locator(".maplibregl-canvas").screenshot())).convert("RGB")
        drawn = [colour for count, colour in cast(Any, picture.getcolors(1 << 24)) if count > 500]
        if len(drawn) > 1:
            break
        assert time.monotonic() < deadline_s, f"nothing is drawn but {drawn}"
        page.wait_for_timeout(200)


def test_ring_is_seen_growing_by_its_own_schedule(open_page: Opener, operator_key: str, desk: Desk) -> None:
    page = live(open_page(operator_key))
    step = 12_000 / HOUR_MS
    alert_id = desk.publish(schedule=[[step, 100], [None, 300]])
    row = row_of(page, alert_id)
    expect(row).to_have_attribute("data-ring-km", "100")
    expect(row).to_contain_text(re.compile(r"100 km, to 300 km in 0:\d\d"))
    expect(page.get_by_test_id("map")).to_have_attribute("data-rings", re.compile(rf"{alert_id}:100\b"))
    row.click()
    expect(page.get_by_test_id("panel-ring")).to_have_text("100 km")
    expect(page.get_by_test_id("panel-cover")).to_have_text(re.compile(r"^Cover: \d+ cells inside, \d+ at the edge"))
    before = page.get_by_test_id("panel-cover").inner_text()
    expect(page.get_by_test_id("panel-ring")).to_have_text("300 km")
    expect(page.get_by_test_id("map")).to_have_attribute("data-rings", re.compile(rf"{alert_id}:300\b"))
    expect(page.get_by_test_id("panel-cover")).not_to_have_text(before)
    expect(page.get_by_test_id("panel-grows")).to_have_text("Full size reached")
    expect(page.get_by_test_id("panel-told")).to_have_text(re.compile(r"^[\d,]{3,}$"))
    expect(page.get_by_test_id("told-chart")).to_have_attribute("data-points", re.compile(r"^[2-9]|\d\d"))
    desk.close(alert_id)
    expect(page.get_by_test_id("panel-ring")).to_have_text("The search has ended")
    page.keyboard.press("Escape")
    expect(row).to_have_count(0)


def test_labels_are_chinese_where_the_browser_is_and_can_be_changed(open_page: Opener, operator_key: str) -> None:
    page = live(open_page(operator_key, locale="zh-CN"))
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    expect(page.get_by_test_id("connection")).to_have_text("实时")
    expect(page.get_by_role("heading", name="进行中的警报")).to_be_visible()
    expect(page.get_by_test_id("chart-lag")).to_contain_text("分片延迟")
    page.get_by_test_id("language").click()
    expect(page.locator("html")).to_have_attribute("lang", "en")
    expect(page.get_by_test_id("connection")).to_have_text("Live")
    page.reload()
    expect(page.get_by_test_id("connection")).to_have_text("Live")


def test_theme_follows_the_system_and_can_be_changed(open_page: Opener, operator_key: str) -> None:
    page = live(open_page(operator_key, color_scheme="light"))
    expect(page.locator("html")).to_have_attribute("data-theme", "light")
    page.get_by_test_id("theme").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_keeps_anybody_from_using_it(open_page: Opener, officer_key: str, desk: Desk, theme: str) -> None:
    alert_id = desk.publish()
    page = open_page(color_scheme=theme)
    expect(page.get_by_test_id("sign-in")).to_be_visible()
    assert serious(page) == []
    page.get_by_test_id("key").fill(officer_key)
    page.keyboard.press("Enter")
    expect(row_of(live(page), alert_id)).to_be_visible()
    assert serious(page) == []
    row_of(page, alert_id).click()
    expect(page.get_by_test_id("panel-words")).to_contain_text("王小明")
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.get_by_test_id("desk-new").click()
    page.get_by_test_id("desk-submit").click()  # with its errors
    expect(page.get_by_test_id("field-child.name")).to_have_attribute("aria-invalid", "true")
    assert serious(page) == []
    desk.close(alert_id)


def test_page_is_readable_on_a_phone(open_page: Opener, operator_key: str) -> None:
    page = live(open_page(operator_key, viewport={"width": 390, "height": 844}, locale="zh-CN"))
    expect(page.get_by_test_id("alerts")).to_be_visible()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390, "nothing has to be scrolled sideways"


# --- marks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["actual", "exercise"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_mark_is_drawn_at_its_place_and_a_click_on_it_opens_the_alert(
    open_page: Opener, operator_key: str, desk: Desk, theme: str, status: str
) -> None:
    audience = ["amap"] if status == "exercise" else None
    place = {"lat": 45.0, "lng": 90.0}  # apart from the other tests' alerts
    alert_id = desk.publish(status=status, location=place, audience=audience)
    page = live(open_page(operator_key, handle=True, color_scheme=theme))
    mark = mark_of(page, alert_id)
    assert re.fullmatch(r"100 km → \d+ km [\d:]+", mark["text"])
    expected = page.evaluate("(({ x, y }) => [x, y])(window.tuanyuanMap.map.project([90, 45]))")
    assert (mark["x"], mark["y"]) == pytest.approx(expected, abs=1)
    map_box = page.locator(".map").bounding_box()
    assert map_box
    x, y = map_box["x"] + mark["x"], map_box["y"] + mark["y"]
    shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    token = "exercise" if status == "exercise" else "alert"
    colour = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{token}').trim()")
    dot = cast("tuple[int, int, int]", shot.getpixel((round(x), round(y))))
    assert "#{:02x}{:02x}{:02x}".format(*dot) == colour
    assert page.locator(".map .maplibregl-marker").count() == 0, "an element would be laid out anew in each frame"
    page.mouse.click(*point_at(page, alert_id))
    expect(page.get_by_test_id("panel")).to_have_attribute("data-alert", alert_id)
    page.keyboard.press("Escape")
    expect(row_of(page, alert_id)).to_be_visible()
    desk.close(alert_id)
    expect(row_of(page, alert_id)).to_have_count(0)
    page.wait_for_function("id => !window.tuanyuanMap.marksShown().some(mark => mark.id === id)", arg=alert_id)


@pytest.mark.parametrize("lng", [75.0, 104.0, 134.0])
def test_label_is_whole_at_either_edge_of_a_phone(open_page: Opener, operator_key: str, desk: Desk, lng: float) -> None:
    alert_id = desk.publish(location={"lat": 48.0, "lng": lng})
    page = live(open_page(operator_key, handle=True, viewport={"width": 390, "height": 844}))
    mark_of(page, alert_id)
    width = page.locator(".map").evaluate("element => element.clientWidth")
    # Selected, without the map's flying there: nothing else may take the label's place.
    page.evaluate("id => window.tuanyuanMap.select(id)", alert_id)
    page.wait_for_function(
        "id => window.tuanyuanMap.marksShown().find(mark => mark.id === id)?.side !== 'bare'", arg=alert_id
    )
    mark = mark_of(page, alert_id)
    assert mark["box"]["left"] >= 0
    assert mark["box"]["left"] + mark["box"]["width"] <= width
    desk.close(alert_id)


def test_ring_around_a_pole_ends_at_the_edge_of_the_map(open_page: Opener, operator_key: str, desk: Desk) -> None:
    polar = desk.publish(location={"lat": 86.0, "lng": 20.0}, schedule=[[None, 1000]])
    near = desk.publish(location={"lat": 80.0, "lng": 175.0}, schedule=[[None, 300]])
    page = live(open_page(operator_key, handle=True))
    (ring,) = features_of(page, "rings", polar)
    (points,) = ring["geometry"]["coordinates"]
    assert points[0] == points[-1]
    assert max(lat for _, lat in points) == 85.06
    assert (min(lng for lng, _ in points), max(lng for lng, _ in points)) == (-160, 200)
    # 10 degrees of latitude from the pole the 300 km are 15 degrees and more of longitude, beyond the antimeridian.
    (ring,) = features_of(page, "rings", near)
    (points,) = ring["geometry"]["coordinates"]
    assert points[0] == points[-1]
    assert max(abs(lng - 175) for lng, _ in points) == pytest.approx(15.7, abs=0.2)
    assert min(lat for _, lat in points) == pytest.approx(80 - 300 / 111.195, abs=0.01)
    # No piece of a cover lies across the whole map.
    for alert_id in (polar, near):
        for cell in features_of(page, "covers", alert_id):
            shapes = cell["geometry"]["coordinates"]
            loops = (
                [loop for shape in shapes for loop in shape] if cell["geometry"]["type"] == "MultiPolygon" else shapes
            )
            for loop in loops:
                if max(lat for _, lat in loop) < 85:
                    assert max(lng for lng, _ in loop) - min(lng for lng, _ in loop) < 60
    desk.close(polar)
    desk.close(near)


# --- whose key it is --------------------------------------------------------------------------------------------------


def test_key_leaves_the_address_and_the_browser(open_page: Opener, operator_key: str) -> None:
    page = live(open_page(operator_key))
    assert "key" not in page.url
    expect(page.get_by_test_id("desk-new")).to_be_hidden()
    page.get_by_test_id("sign-out").click()
    expect(page.get_by_test_id("sign-in")).to_be_visible()
    assert page.evaluate("JSON.stringify([localStorage, sessionStorage])").count(operator_key) == 0


def test_key_is_kept_for_the_device_only_if_asked(open_page: Opener, operator_key: str) -> None:
    page = open_page()
    page.get_by_test_id("key").fill(operator_key)
    page.get_by_test_id("sign-in").click()
    live(page)
    assert page.evaluate("localStorage.getItem('tuanyuan.key')") is None
    page.get_by_test_id("sign-out").click()
    page.get_by_test_id("key").fill(operator_key)
    page.get_by_test_id("remember").check()
    page.get_by_test_id("sign-in").click()
    live(page)
    assert page.evaluate("localStorage.getItem('tuanyuan.key')") == operator_key


@pytest.mark.parametrize("kind", ["wrong", "partner"])
def test_key_that_opens_nothing_here_is_refused_in_words(
    open_page: Opener, deployment: SmallDeployment, kind: str
) -> None:
    key = "ty_wrong" if kind == "wrong" else deployment.accounts.add_partner("page-test").text
    page = open_page(key, may_fail=True)
    words = "not accepted" if kind == "wrong" else "a partner’s key"
    expect(page.get_by_test_id("sign-in-problem")).to_contain_text(words)


# --- the desk ---------------------------------------------------------------------------------------------------------


def test_officer_publishes_edits_and_closes_with_the_keyboard_alone(
    open_page: Opener, officer_key: str, desk: Desk
) -> None:
    page = live(open_page(officer_key))
    page.get_by_test_id("desk-new").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("field-location.lat")).to_be_focused()
    page.keyboard.type("30.66")
    page.keyboard.press("Tab")
    page.keyboard.type("104.06")
    page.get_by_test_id("pin").focus()
    for key in ("ArrowUp", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    expect(page.get_by_test_id("field-location.lat")).to_have_value("30.67000")
    expect(page.get_by_test_id("field-location.lng")).to_have_value("104.08000")
    page.get_by_test_id("field-child.name").focus()
    page.keyboard.type("小红")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("confirm-publish").get_by_test_id("preview-step")).to_have_count(4)
    expect(page.get_by_test_id("confirm-publish-yes")).to_be_focused()
    page.keyboard.press("Escape")  # that was not meant yet
    expect(page.get_by_test_id("confirm-publish")).to_have_count(0)
    expect(page.get_by_test_id("field-child.name")).to_have_value("小红")
    page.get_by_test_id("desk-submit").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("confirm-publish-yes")).to_be_enabled()
    page.keyboard.press("Enter")

    panel = page.get_by_test_id("panel")
    expect(panel).to_be_visible()
    alert_id = panel.get_attribute("data-alert") or ""
    assert desk.alert(alert_id)["location"] == {"lat": 30.67, "lng": 104.08}
    expect(page.get_by_test_id("panel-words")).to_contain_text("小红")

    page.get_by_test_id("panel-edit").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("field-child.name")).to_have_value("小红")
    fill(page, place="天府广场")
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("confirm-edit-yes")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("panel-words")).to_contain_text("天府广场")
    assert desk.alert(alert_id)["revision"] == 2

    page.get_by_test_id("panel-close").focus()
    page.keyboard.press("Enter")
    page.get_by_test_id("close-category").select_option("ran_away")
    page.get_by_test_id("confirm-close-yes").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_test_id("panel-ring")).to_have_text("The search has ended")
    closed = desk.alert(alert_id)
    assert (closed["outcome"], closed["category"]) == ("found", "ran_away")


def test_click_on_the_map_drops_the_pin(open_page: Opener, officer_key: str) -> None:
    page = live(open_page(officer_key))
    page.get_by_test_id("desk-new").click()
    page.locator(".maplibregl-canvas").click(position={"x": 300, "y": 200})
    expect(page.get_by_test_id("pin")).to_be_visible()
    assert 0 < float(page.get_by_test_id("field-location.lat").input_value()) < 60
    page.get_by_test_id("desk-back").click()
    expect(page.get_by_test_id("pin")).to_have_count(0)


def test_what_is_wrong_stands_beside_its_field(open_page: Opener, officer_key: str) -> None:
    page = live(open_page(officer_key, locale="zh-CN", may_fail=True))
    page.get_by_test_id("desk-new").click()
    fill(page, location__lat="95", location__lng="104.06", child__age="18")
    page.get_by_test_id("desk-submit").click()
    problem = page.locator(".field:has([data-testid='field-location.lat']) .problem")
    expect(problem).to_have_text("请输入 -90 到 90 之间的纬度")
    expect(page.get_by_test_id("field-location.lat")).to_be_focused()
    expect(page.locator(".field:has([data-testid='field-child.age']) .problem")).to_have_text("0 到 17 岁")
    # What only the desk knows: it says so in its own words.
    fill(page, location__lat="30.66", child__age="6", child__name="小红")
    page.locator("summary").click()
    fill(page, division="123")
    page.get_by_test_id("desk-submit").click()
    expect(page.get_by_test_id("confirm-publish-yes")).to_be_enabled()
    page.get_by_test_id("confirm-publish-yes").click()
    expect(page.get_by_test_id("confirm-publish-problem")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_test_id("field-division")).to_have_attribute("aria-invalid", "true")
    expect(page.locator(".field:has([data-testid='field-division']) .problem")).not_to_be_empty()


# --- a loss of the server ---------------------------------------------------------------------------------------------


def test_loss_of_the_server_is_shown_within_3_s_and_ends_by_itself(
    open_page: Opener, officer_key: str, deployment: SmallDeployment
) -> None:
    page = open_page(may_fail=True)
    page.clock.install()  # the page's own clock: this machine's, until it is stopped
    page.get_by_test_id("key").fill(officer_key)
    page.get_by_test_id("sign-in").click()
    live(page)
    page.get_by_test_id("desk-new").click()
    fill(page, location__lat="30.66", child__name="小红")
    banner = page.get_by_test_id("banner")
    expect(banner).to_be_hidden()
    deployment.stop_gateway(signal.SIGKILL)
    try:
        page.clock.pause_at(page.evaluate("Date.now() + 1"))
        page.clock.run_for(3_000)
        expect(banner).to_be_visible()
        expect(banner).to_contain_text("Connection lost: what is shown is of")
        expect(page.locator("html")).to_have_attribute("data-connection", "lost")
        assert float(page.locator(".tiles").evaluate("element => getComputedStyle(element).opacity")) < 0.9
        page.clock.resume()
    finally:
        deployment.start_gateway()
    expect(banner).to_be_hidden()
    live(page)
    # What was typed is still there, and the form goes on.
    expect(page.get_by_test_id("field-child.name")).to_have_value("小红")
    fill(page, location__lng="104.06")
    page.get_by_test_id("desk-submit").click()
    expect(page.get_by_test_id("confirm-publish").get_by_test_id("preview-step")).to_have_count(4)


def test_what_was_typed_outlives_a_reload(open_page: Opener, officer_key: str) -> None:
    page = live(open_page(officer_key))
    page.get_by_test_id("desk-new").click()
    fill(page, child__name="小红", place="天府广场")
    page.reload()
    live(page)
    page.get_by_test_id("desk-new").click()
    expect(page.get_by_test_id("field-place")).to_have_value("天府广场")
    page.get_by_test_id("sign-out").click()
    expect(page.get_by_test_id("sign-in")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0
