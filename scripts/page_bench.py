"""What the operator's page costs: compressed bytes, frames per second, time of the main thread, memory over hours.

    python -m scripts.page_bench --hours 2
    python -m scripts.page_bench --hours 0       # no memory: two minutes

The page is asked to show 10,000 cells and 50 rings with their covers, by a stand-in for the gateway that sends the
same events at any pace: hours pass within minutes. The map pans and zooms for 10 s, with something else in every frame.
A frame is one that the map has drawn (its `render` event), not a tick of the browser's clock.

Frames depend on the graphics card; without one (SwiftShader) the processor draws them, on the cores that the page
needs. So they are measured twice, each time with an empty map as well, for what that costs is the browser's:

* everything;
* everything but the pixels. ANGLE has a back end that draws none (`--use-angle=null`); Chromium may refuse it, as
  Debian's does ("gl=disabled"). Then WebGL's three drawing calls return at once, and whatever leads to them is done:
  the page's scripts, style and layout, its workers, tiles, buffers, uniforms, states, the marks' canvas, and the
  browser's own composition of the page. What a graphics card takes for its pixels is not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import shutil
import socket
import statistics
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import h3
import orjson
import uvicorn
from playwright.sync_api import Browser, BrowserType, CDPSession, Page, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from gateway.page import FOLDER, PageFiles
from gateway.view_cover import ZONE_RESOLUTION, cover_shape
from scripts.screenshots import CHROMIUM_ARGUMENTS, CHROMIUM_NAMES

CELLS, RINGS = 10_000, 50
PARTNERS = ("amap", "baidu", "chuxing", "dianxin", "ditu", "zhifu")
SHARDS = 8
DAY_MS = 86_400_000
FRAMES_S = 10
FRAME_MS = 1000 / 60
MB = 1 << 20
NULL_ARGUMENTS = [
    *("--no-sandbox", "--ignore-gpu-blocklist", "--use-gl=angle", "--use-angle=null"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"),
]
HANDLE = "window.tuanyuanBench = true"
DRAWS_NOTHING = """
for (const name of ['drawElements', 'drawArrays', 'clear'])
  WebGL2RenderingContext.prototype[name] = () => { window.drawsSwallowed = (window.drawsSwallowed ?? 0) + 1 }
"""
PATH = """
window.tuanyuanPath = map => {
  const start = map.getCenter(), zoom = map.getZoom()
  return s => ({
    center: [start.lng + 6 * Math.sin(s * 1.9), start.lat + 4 * Math.sin(s * 1.3)],
    zoom: zoom + 0.9 * Math.sin(s * 0.8),
  })
}
"""
"""The way that the map goes: where it is after so many seconds."""
MOVE = """seconds => new Promise(resolve => {
  const map = window.tuanyuanMap.map, at = window.tuanyuanPath(map), start = map.getCenter(), begin = performance.now()
  const times = []
  let moved = 0, before = map.project(start)
  const count = () => {
    times.push(performance.now())
    const here = map.project(start)
    moved += Number(Math.hypot(here.x - before.x, here.y - before.y) > 0.5)
    before = here
  }
  map.on('render', count)
  const step = () => {
    const s = (performance.now() - begin) / 1000
    if (s >= seconds) {
      map.off('render', count)
      map.jumpTo(at(0))
      resolve({ times, moved })
      return
    }
    map.jumpTo(at(s))
    requestAnimationFrame(step)
  }
  requestAnimationFrame(step)
})"""
LOOK = """async seconds => {
  const map = window.tuanyuanMap.map, at = window.tuanyuanPath(map)
  const seen = { density: 0, ring: 0, marks: Infinity }
  for (let stop = 0; stop < 4; stop += 1) {
    const idle = map.once('idle')
    map.jumpTo(at((stop + 0.5) * seconds / 4))
    await idle
    for (const layer of ['density', 'ring'])
      seen[layer] = Math.max(seen[layer], map.queryRenderedFeatures({ layers: [layer] }).length)
    seen.marks = Math.min(seen.marks, window.tuanyuanMap.marksShown().length)
  }
  map.jumpTo(at(0))
  return seen
}"""
"""What is on the map at four places of the way. Not while it moves: looking costs a frame."""
HOLDS = """async () => {
  const map = window.tuanyuanMap.map
  const of = async name => (await map.getSource(name).getData()).features
  const [cells, rings, covers] = [await of('density'), await of('rings'), await of('covers')]
  return { cells: cells.length, rings: rings.filter(ring => ring.properties.kind === 'ring').length,
           covers: new Set(covers.map(cell => cell.properties.id)).size }
}"""


class StandIn:
    """The gateway's part of the view, with made-up figures. `pace`: events of one second, so many a second."""

    def __init__(self, cell_count: int = CELLS, ring_count: int = RINGS) -> None:
        self.pace = 1.0
        self.sent_s = 0
        self.cell_count, self.ring_count = cell_count, ring_count
        self._files = PageFiles()
        self._random = random.Random(1)
        self._start_ms = round(time.time() * 1000) - 1_000
        self._cells = sorted(h3.grid_disk(h3.latlng_to_cell(33.0, 112.0, 4), 62))[:cell_count]
        self._alerts = [self._alert(number) for number in range(ring_count)]
        self._covers: dict[str, bytes] = {}
        self.app = Starlette(
            routes=[
                Route("/v1/view/stream", self._stream),
                Route("/v1/view/history", self._history),
                Route("/v1/view/map", self._map),
                Route("/v1/view/alerts/{id}/cover", self._cover),
                Route("/v1/view/alerts/{id}/told", self._told),
                Route("/{path:path}", self._page),
            ]
        )

    def _page(self, request: Request) -> Response:
        return self._files.answer(request, request.url.path)

    def _alert(self, number: int) -> dict[str, Any]:
        lat, lng = self._random.uniform(22, 44), self._random.uniform(98, 122)
        radius = self._random.choice([100, 200, 300, 500])
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._start_ms / 1000))
        return {
            "id": f"a-{number:012d}",
            "revision": 1,
            "status": "actual",
            "state": "open",
            "location": {"lat": lat, "lng": lng},
            "missing_since": since,
            "published_at": since,
            "schedule": [[48, radius], [None, min(1000, radius * 2)]],
            "ring_km": radius,
            "next_growth_ms": self._start_ms + 2 * DAY_MS,
            "next_ring_km": min(1000, radius * 2),
            "expires_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._start_ms / 1000 + 3 * 86_400)),
            "audience": None,
            "told": 1200,
            "delivered": 1100,
            "acknowledged": 1000,
            "retracted": None,
        }

    def _figures(self, second: int) -> dict[str, float]:
        wave = 1 + 0.2 * math.sin(second / 300) + 0.05 * self._random.random()
        figures = {"matches_per_s": 900 * wave, "devices_live": 8_200_000, "dead_letters": 0, "lag_ms": 12 * wave}
        for name in ("publish_to_queue", "ping_to_queue"):
            figures |= {f"{name}_p50_ms": 8 * wave, f"{name}_p99_ms": 40 * wave}
        for partner in PARTNERS:
            figures[f"pings_per_s:{partner}"] = 150_000 * wave
            figures[f"queue_entries:{partner}"] = 300 * wave
            figures[f"queue_pending:{partner}"] = 20 * wave
        for shard in range(SHARDS):
            figures[f"lag_ms:{shard}"] = 12 * wave
            figures[f"checkpoint_age_ms:{shard}"] = second % 60 * 1000
        for name in ("server", "flow", "gateway"):
            figures[f"{name}_memory_bytes"] = 800 * MB * wave
        return figures

    async def _stream(self, _request: Request) -> Response:
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[bytes]:
        def event(name: str, data: object) -> bytes:
            return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(data) + b"\n\n"

        hello = {"version": "bench", "server_time_ms": self._start_ms, "step_s": 1, "scope": "", "role": "operator"}
        yield event("hello", hello | {"name": "bench"})
        due_s = time.monotonic()
        while True:
            at_ms = self._start_ms + 1000 * self.sent_s
            figures = {"at_ms": at_ms, "figures": self._figures(self.sent_s), "alarms": []}
            yield event("figures", figures)
            if self.sent_s % 10 == 0:
                for alert in self._alerts:
                    alert["told"] += 10
                yield event("alerts", {"at_ms": at_ms, "alerts": self._alerts})
            if self.sent_s % 60 == 0:
                yield event("map", {"at_ms": at_ms})
            self.sent_s += 1
            due_s = max(due_s + 1 / self.pace, time.monotonic() - 1)
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))

    def _history(self, request: Request) -> Response:
        minutes = int(request.query_params["minutes"])
        step_ms = 5_000 * max(1, minutes * 12 // 300)
        end_ms = (self._start_ms + 1000 * self.sent_s) // step_ms * step_ms
        at_ms = list(range(end_ms - minutes * 60_000, end_ms + 1, step_ms))
        names = self._figures(0)
        series = {
            name: [value * (1 + 0.1 * math.sin(i / 9)) for i in range(len(at_ms))] for name, value in names.items()
        }
        return Response(orjson.dumps({"step_s": step_ms // 1000, "at_ms": at_ms, "series": series}))

    def _map(self, _request: Request) -> Response:
        cells = [[cell, 20 + round(10 ** self._random.uniform(1, 5))] for cell in self._cells]
        at_ms = self._start_ms + 1000 * self.sent_s
        return Response(orjson.dumps({"at_ms": at_ms, "resolution": 4, "cells": cells, "shards_missing": []}))

    def _cover(self, request: Request) -> Response:
        alert_id = request.path_params["id"]
        if alert_id not in self._covers:
            alert = next(alert for alert in self._alerts if alert["id"] == alert_id)
            shape = cover_shape(alert["location"]["lat"], alert["location"]["lng"], alert["ring_km"])
            body = {"ring_km": alert["ring_km"], "inside": shape.inside, "edge": shape.edge, "next": None}
            about = {"alert_id": alert_id, "revision": 1, "resolution": ZONE_RESOLUTION}
            self._covers[alert_id] = orjson.dumps(about | body)
        return Response(self._covers[alert_id])

    def _told(self, _request: Request) -> Response:
        return Response(orjson.dumps({"at_ms": [self._start_ms], "told": [1200], "resolved": [None]}))


@contextmanager
def served(stand_in: StandIn) -> Iterator[str]:
    """Its address, on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(stand_in.app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listening.close()


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="of the stream, for memory; 0: none (default: 2)")
    parser.add_argument("--pace", type=float, default=40.0, help="seconds of the stream per second (default: 40)")
    options = parser.parse_args()
    chromium = next((path for name in CHROMIUM_NAMES if (path := shutil.which(name)) is not None), None)
    if chromium is None:
        sys.exit("Chromium is needed; on Debian: apt-get install chromium")
    compressed = sum(path.stat().st_size for path in FOLDER.rglob("*.gz"))
    print(f"compressed: {compressed / 1e6:.2f} MB, all of it loaded before the page is whole")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        measure(browser, StandIn(0, 0), "everything")
        measure(browser, StandIn(), "everything", options.hours, options.pace)
        null = launch_null(playwright.chromium, chromium)
        for stand_in in (StandIn(0, 0), StandIn()):
            measure(null or browser, stand_in, "everything but the pixels", draws_nothing=null is None)
        browser.close()
        if null is not None:
            null.close()


def launch_null(chromium: BrowserType, path: str) -> Browser | None:
    """With the back end that draws nothing; None if this Chromium does not have WebGL with it."""
    # Playwright asks for the software renderer by itself, which would be taken instead.
    ignored = ["--enable-unsafe-swiftshader"]
    browser = chromium.launch(executable_path=path, args=NULL_ARGUMENTS, ignore_default_args=ignored)
    found = renderer(page := browser.new_page())
    page.close()
    if "null" in found.lower():
        return browser
    browser.close()
    print(f"ANGLE's null back end: refused by this Chromium (WebGL: {found}); WebGL's drawing calls return at once")
    return None


def measure(
    browser: Browser, stand_in: StandIn, what: str, hours: float = 0, pace: float = 1, draws_nothing: bool = False
) -> None:
    """Show what the stand-in has, and measure frames; over so many hours memory, too."""
    with served(stand_in) as url, browser.new_context(viewport={"width": 1920, "height": 1080}) as context:
        page = context.new_page()
        session = context.new_cdp_session(page)
        page.add_init_script(HANDLE + PATH + (DRAWS_NOTHING if draws_nothing else ""))
        show(page, session, url, stand_in)
        print(f"measured: {what}")
        measure_frames(page, session, stand_in)
        if draws_nothing:
            calls = page.evaluate("window.drawsSwallowed ?? 0")
            assert calls > 0, "no drawing call was made"
            print(f"drawing calls that drew nothing: {calls:,}")
        if hours:
            measure_memory(page, session, stand_in, hours, pace)


def show(page: Page, session: CDPSession, url: str, stand_in: StandIn) -> None:
    """Load the page and wait until all is drawn; fails if the map does not hold it."""
    session.send("Performance.enable")
    page.goto(f"{url}/#key=ty_bench")
    page.locator(f'[data-testid="map"][data-cells="{stand_in.cell_count}"]').wait_for()
    wanted = {"cells": stand_in.cell_count, "rings": stand_in.ring_count, "covers": stand_in.ring_count}
    deadline_s = time.monotonic() + 60
    while (held := page.evaluate(HOLDS)) != wanted:
        assert time.monotonic() < deadline_s, f"the map's sources hold {held}, not {wanted}"
        page.wait_for_timeout(500)
    page.wait_for_timeout(4_000)  # tiles are made of them
    shown = f"{held['cells']:,} cells, {held['rings']} rings, {held['covers']} covers in the map's sources"
    print(f"shown: {shown}, 1920 x 1080, {renderer(page)}", flush=True)


def renderer(page: Page) -> str:
    """What draws."""
    return str(
        page.evaluate(
            """() => { const gl = document.createElement('canvas').getContext('webgl2')
                       return gl === null ? 'none' : gl.getParameter(gl.RENDERER) }"""
        )
    )


def metrics(session: CDPSession) -> dict[str, float]:
    """Chromium's own, by name."""
    return {metric["name"]: metric["value"] for metric in session.send("Performance.getMetrics")["metrics"]}


def measure_frames(page: Page, session: CDPSession, stand_in: StandIn) -> None:
    """Pan and zoom in every frame; fails if the map did not move, or if cells, rings or marks were not on it."""
    before = metrics(session)
    made = page.evaluate(MOVE, FRAMES_S)
    after = metrics(session)
    times, seen = made["times"], page.evaluate(LOOK, FRAMES_S)
    assert made["moved"] >= 0.9 * len(times), f"the map moved in {made['moved']} of {len(times)} frames"
    if stand_in.cell_count:
        assert seen["density"] > 0, "no cell was on the map"
        assert seen["ring"] > 0, "no ring was on the map"
        assert seen["marks"] > 0, "no mark was on the map"
    steps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    median, p99 = statistics.median(steps), steps[int(0.99 * len(steps))]
    late = sum(step > 1.5 * FRAME_MS for step in steps) / len(steps)
    names = ("TaskDuration", "ScriptDuration", "RecalcStyleDuration", "LayoutDuration")
    spent, script, style, layout = (1000 * (after[name] - before[name]) / len(times) for name in names)
    print(f"panning and zooming: {len(times) / FRAMES_S:.1f} frames/s drawn by the map, which moved in {made['moved']}")
    print(f"between two frames: median {median:.1f} ms, p99 {p99:.1f} ms; {late:.1%} came a frame late or more")
    print(f"seen on the way: {seen['density']:,} pieces of cells, {seen['ring']} of rings, {seen['marks']} marks")
    print(
        f"main thread: {spent:.1f} ms a frame, of it script {script:.1f}, style {style:.2f}, layout {layout:.2f} ms "
        "(60 frames/s leave 16.7 ms; what is neither is the browser's)",
        flush=True,
    )


def measure_memory(page: Page, session: CDPSession, stand_in: StandIn, hours: float, pace: float) -> None:
    """Used heap after a collection, ten times over the hours of the stream."""
    stand_in.pace = pace
    used = []
    for part in range(11):
        due_s = part * hours * 360
        while stand_in.sent_s < due_s:
            page.wait_for_timeout(500)
        session.send("HeapProfiler.collectGarbage")
        used.append(metrics(session)["JSHeapUsedSize"] / MB)
        print(
            f"after {stand_in.sent_s / 3600:.2f} h of the stream: {used[-1]:.1f} MiB, {nodes(session):,} nodes",
            flush=True,
        )
    print(f"heap over {hours:g} h: {used[1]:.1f} -> {used[-1]:.1f} MiB, at most {max(used):.1f}")


def nodes(session: CDPSession) -> int:
    """Of the document, and of what was taken out of it and is still held."""
    return int(metrics(session)["Nodes"])


if __name__ == "__main__":
    main()
