"""A browser, Debian's Chromium, and a whole small deployment behind the page: server, flow, gateway, phones.

Outside of continuous integration a machine without Chromium skips these tests, loudly; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from loadtest.world import World
from scripts.page_bench import HANDLE
from scripts.screenshots import CHROMIUM_ARGUMENTS, CHROMIUM_NAMES
from scripts.small_deployment import SmallDeployment

WAIT_MS = 30_000
"""For whatever a test waits for: a slow machine is no failure."""
PHONES = 40_000


def chromium_path() -> str:
    """Where Chromium is; skips, or fails where it has to be there."""
    for name in CHROMIUM_NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    words = "NO CHROMIUM: the page is not tested on this machine; on Debian: apt-get install chromium"
    if os.environ.get("CI") == "true":
        pytest.fail(words)
    pytest.skip(words)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Gone behind the tests of the page: its event loop would be in the way of others."""
    path = chromium_path()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDeployment]:
    """One for all tests of the page: each makes what it needs in it, and leaves the gateway running."""
    chromium_path()  # else there is nothing to start it for
    with (
        SmallDeployment(tmp_path_factory.mktemp("deployment")) as deployment,
        deployment.phones(World(1, PHONES), pings_per_s=500),
    ):
        yield deployment


@pytest.fixture(scope="package")
def officer_key(deployment: SmallDeployment) -> str:
    return deployment.accounts.add_officer("部 值班", "000000", "ministry").text


@pytest.fixture(scope="package")
def operator_key(deployment: SmallDeployment) -> str:
    return deployment.accounts.add_operator("control room").text


class Watched:
    """What a page said and asked for."""

    def __init__(self, page: Page) -> None:
        self.errors: list[str] = []
        self.hosts: set[str] = set()
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.hosts.add(urlsplit(request.url.removeprefix("blob:")).netloc))

    def _hear(self, message: ConsoleMessage) -> None:
        # A cover may be asked for in the moment in which its alert is closed.
        if message.type == "error" and not ("404" in message.text and "/cover" in str(message.location)):
            self.errors.append(f"{message.text} {message.location}")


Opener = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, deployment: SmallDeployment) -> Iterator[Opener]:
    """`open_page(key, locale=…)`: the page in a context of its own. Whatever a test does, nothing goes to other hosts.

    `may_fail`: requests may, and the console may name them; it holds nothing else. `handle`: `window.tuanyuanMap` is
    the page's map, as for its benchmark.
    """
    opened: list[tuple[Page, Watched, bool]] = []

    def opener(key: str | None = None, *, may_fail: bool = False, handle: bool = False, **options: Any) -> Page:
        options = {"locale": "en-GB", "viewport": {"width": 1600, "height": 1000}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        opened.append((page, Watched(page), may_fail))
        if handle:
            page.add_init_script(HANDLE)
        page.goto(deployment.url + ("" if key is None else f"/#key={key}"))
        return page

    yield opener
    for page, watched, may_fail in opened:
        page.context.close()
        errors = [error for error in watched.errors if not (may_fail and error.startswith("Failed to load resource:"))]
        assert errors == []
        assert watched.hosts <= {urlsplit(deployment.url).netloc}
