"""Pictures of the operator's page for the README: a small world, three alerts, a browser. `make screenshots`.

Takes some minutes: phones are shown a minute late, and charts need something to show.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from loadtest.world import World
from scripts.small_deployment import SmallDeployment

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
]
PHONES, PINGS_PER_S = 400_000, 6_000
BYTES_MAX = 300_000
RUN_BEFORE_S = 200
WAIT_MS = 60_000
DESKTOP = {"width": 1920, "height": 1080}
PHONE = {"width": 390, "height": 844}
PLACES = {
    "杭州": (30.2741, 120.1551),
    "成都": (30.6570, 104.0660),
    "北京": (39.9042, 116.4074),
    "武汉": (30.5928, 114.3055),
}


def main() -> None:
    """Write every picture."""
    chromium = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name)) is not None), None)
    if chromium is None:
        sys.exit("Chromium is needed; on Debian: apt-get install chromium fonts-noto-cjk")
    IMAGES.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="tuanyuan-screenshots-") as folder,
        SmallDeployment(Path(folder), shard_count=4) as deployment,
        sync_playwright() as playwright,
    ):
        key = deployment.accounts.add_officer("省厅 值班", "000000", "ministry").text
        with deployment.phones(World(1, PHONES), PINGS_PER_S):
            play(deployment.url, key)
            browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
            take_all(browser, deployment.url, key)
            browser.close()


def play(url: str, key: str) -> None:
    """Some minutes of a day: alerts now and then, each told to phones."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as desk:
        publish(desk, "北京", 95 * 60, {"name": "李小红", "sex": "female", "age": 8}, "海淀区中关村大街")
        time.sleep(RUN_BEFORE_S / 3)
        publish(desk, "成都", 25 * 60, {"name": "小明", "sex": "male", "age": 6, "clothes": "红色外套"}, "春熙路步行街")
        publish(desk, "武汉", 10 * 60, {"name": "演习儿童"}, "江汉路", status="exercise", audience=["amap"])
        time.sleep(RUN_BEFORE_S / 3)
        publish(
            desk,
            "杭州",
            58 * 60,
            {"name": "王小明", "sex": "male", "age": 6, "clothes": "红色外套，蓝色书包", "features": "左眉有一道疤"},
            "西湖区文三路沃尔玛门口",
        )
        time.sleep(RUN_BEFORE_S / 3)


def publish(desk: httpx.Client, place: str, ago_s: int, child: dict[str, Any], words: str, **more: Any) -> None:
    """An alert whose child has been missing for so long."""
    lat, lng = PLACES[place]
    since = datetime.now(UTC) - timedelta(seconds=ago_s + random.Random(place).randrange(30))
    body = {
        "location": {"lat": lat, "lng": lng},
        "missing_since": since.isoformat(timespec="seconds"),
        "child": child,
        "place": words,
        "contact": "0571-88001122",
    }
    answer = desk.post("/v1/alerts", json=body | more)
    if not answer.is_success:
        sys.exit(f"the desk refuses: {answer.status_code} {answer.text}")


def take_all(browser: Browser, url: str, key: str) -> None:
    """Both themes, both languages, a wall and a phone; an alert's panel, the desk's form, what is lost."""
    take(browser, url, key, "view-dark", DESKTOP, "dark", "zh-CN", lambda page: None)
    take(browser, url, key, "view-light", DESKTOP, "light", "en-GB", lambda page: None)
    take(browser, url, key, "alert-dark", DESKTOP, "dark", "en-GB", show_alert)
    take(browser, url, key, "desk-light", DESKTOP, "light", "zh-CN", fill_form)
    take(browser, url, key, "confirm-dark", DESKTOP, "dark", "zh-CN", ask_first)
    take(browser, url, key, "phone-light", PHONE, "light", "zh-CN", lambda page: None)
    take(browser, url, key, "phone-desk-dark", PHONE, "dark", "zh-CN", show_form)


def take(browser: Browser, url: str, key: str, name: str, size: Any, theme: Any, language: str, prepare: Any) -> None:
    """One picture, of at most BYTES_MAX."""
    context = browser.new_context(viewport=size, color_scheme=theme, locale=language, reduced_motion="reduce")
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(f"{url}/#key={key}")
    page.locator('[data-testid="connection"][data-state="live"]').wait_for()
    page.locator('[data-testid="map"][data-cells]').wait_for()
    page.locator('[data-testid="alert-row"]').first.wait_for()
    prepare(page)
    page.wait_for_timeout(3_000)
    path = IMAGES / f"{name}.png"
    page.screenshot(path=path)
    context.close()
    with Image.open(path) as taken:
        picture = taken.convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > BYTES_MAX:
        picture.quantize(256, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(IMAGES.parent.parent)}: {path.stat().st_size:,} bytes")


def show_alert(page: Page) -> None:
    """The panel of the alert last published."""
    page.get_by_test_id("alert-row").first.click()
    page.get_by_test_id("panel-words").get_by_text("王小明").wait_for()


def show_form(page: Page) -> None:
    """The desk's form, with the beginning of an alert in it."""
    page.get_by_test_id("desk-new").click()
    lat, lng = PLACES["武汉"]
    for name, value in {
        "location.lat": str(lat),
        "location.lng": str(lng),
        "place": "江岸区黎黄陂路",
        "child.name": "陈小雨",
        "child.age": "7",
        "child.clothes": "黄色雨衣",
    }.items():
        page.get_by_test_id(f"field-{name}").fill(value)
    page.get_by_test_id("field-child.sex").select_option("female")


def fill_form(page: Page) -> None:
    """The form, and how many phones it would reach."""
    show_form(page)
    page.get_by_test_id("desk-preview").click()
    page.get_by_test_id("preview-step").first.wait_for()
    page.get_by_test_id("field-location.lat").scroll_into_view_if_needed()


def ask_first(page: Page) -> None:
    """The question before publishing."""
    show_form(page)
    page.get_by_test_id("desk-submit").click()
    page.get_by_test_id("preview-step").first.wait_for()


if __name__ == "__main__":
    main()
