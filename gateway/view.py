"""The operator's view over HTTP: a stream of figures and alerts, 24 hours of history, the map, covers; and `/metrics`.

    GET /v1/view/stream               Server-Sent Events: hello; figures each second; alerts; map
    GET /v1/view/history              figures over the last 15 minutes to 24 hours
    GET /v1/view/map                  where live phones are: coarse cells, none under 20, a minute late
    GET /v1/view/alerts/{id}/cover    a ring as the matcher covers it, and its next step
    GET /v1/view/alerts/{id}/told     phones told over time
    GET /metrics                      everything, for Prometheus

For operators, and for officers with a desk, who see the alerts of their jurisdiction. `/metrics` is for operators.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Annotated, Any, cast

import anyio.to_thread
import orjson
import redis
from fastapi import APIRouter, Header, Path, Query, Request
from starlette.responses import Response, StreamingResponse

from flows.alert_json import ALERT_ID_CHARS_MAX
from flows.desk import DeskAlert
from flows.metrics import read_stats_at
from gateway.accounts import Caller, OfficerAccount, OperatorAccount
from gateway.alert_views import ring_now
from gateway.desk_service import DeskService
from gateway.errors import Problem, responses
from gateway.feeds import accepts_gzip, matches
from gateway.identity import OperatorDep, ViewerDep
from gateway.jurisdiction import prefix_of
from gateway.runtime import Gateway, gateway_of
from gateway.view_alerts import read_told
from gateway.view_cover import ZONE_RESOLUTION, cover_shape
from gateway.view_history import MINUTES_MAX, MINUTES_MIN, POINTS_MAX
from gateway.view_hub import SAMPLE_S, Latest, Listener, ViewHub
from gateway.view_hub import start as start
from gateway.view_map import Document
from gateway.view_metrics import exposition
from gateway.view_models import EVENTS, AlertCover, DensityMap, HistoryAnswer, ToldOverTime, event_schemas

__all__ = ["router", "start"]

WAIT_S = 0.25
FIRST_AGE_MS_MAX = 2_500
"""Figures that are older are not sent to whoever has just connected."""
"""A stream looks so often whether the gateway is stopping."""
KEY_CHECKED_EVERY_S = 10.0
"""A stream whose key is not valid any more ends within this time."""

router = APIRouter(tags=["view"], responses=responses(400, 401, 403))
Viewer = Caller[OfficerAccount | OperatorAccount]
AlertIdPath = Annotated[
    str, Path(min_length=1, max_length=ALERT_ID_CHARS_MAX, description="The alert's id.", examples=["a-7k3f9x2m4q"])
]
IfNoneMatch = Annotated[
    str | None, Header(max_length=1_000, description="ETags that are at hand: 304 if one still holds.")
]


def _hub(gateway: Gateway) -> ViewHub:
    return gateway.service(ViewHub)


def scope_of(gateway: Gateway, caller: Viewer, action: str) -> str:
    """What the codes of divisions begin with whose alerts the caller sees: nothing, for operators.

    Raises Problem 403, audited, for an officer without a desk.
    """
    if isinstance(caller.account, OfficerAccount):
        account = DeskService(gateway).check_desk(cast("Caller[OfficerAccount]", caller), action)
        return prefix_of(account.division)
    return ""


def _alert(gateway: Gateway, caller: Viewer, alert_id: str) -> DeskAlert:
    """An alert that the caller may see. Raises Problem 403, audited; 404."""
    if isinstance(caller.account, OfficerAccount):
        return DeskService(gateway).view(cast("Caller[OfficerAccount]", caller), alert_id)[0]
    known = gateway.desk.show(alert_id)
    if known is None:
        raise Problem(404, "no-such-alert", "there is no alert of this id")
    return known


EVENT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["event", "data"],
    "properties": {
        "event": {"enum": list(EVENTS)},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
"""Of each event, field by field."""


# --- the stream -------------------------------------------------------------------------------------------------------


@router.get(
    "/v1/view/stream",
    summary="Figures and alerts, live",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Server-Sent Events: `hello`, then each second `figures`; `alerts` when they changed and "
            "every 10 s; `map` when there is a newer one. A comment each second without anything else. What each holds "
            "stands under `x-events`.",
            "content": {
                "text/event-stream": {
                    "schema": EVENT_SCHEMA,
                    "example": 'event: hello\ndata: {"version":"0.1.0","server_time_ms":1777617000000,"step_s":1,'
                    '"scope":"","role":"operator","name":"control room"}\n\n',
                }
            },
        },
        **responses(422, 429, 503),
    },
    openapi_extra={"x-events": event_schemas()},
)
async def stream(
    request: Request,
    caller: ViewerDep,
    seconds: Annotated[
        int | None, Query(ge=0, le=86_400, description="End after so long; else it goes on until somebody ends it.")
    ] = None,
) -> Response:
    """Goes on until the reader ends it, the gateway stops, or the key is not valid any more. Bounded in number."""
    gateway = gateway_of(request)
    scope = await anyio.to_thread.run_sync(scope_of, gateway, caller, "view.stream")
    hub = _hub(gateway)
    listener = hub.listen(caller.actor, asyncio.get_running_loop())
    request.scope["state"]["endless"] = True
    events = _events(gateway, hub, listener.changed, caller, scope, seconds)
    return _Stream(events, headers={"X-Accel-Buffering": "no"}, media_type="text/event-stream", hub=hub, of=listener)


class _Stream(StreamingResponse):
    """Gives its listener up at its end, also where the reader has gone before the first event."""

    def __init__(self, *args: Any, hub: ViewHub, of: Listener, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hub, self._listener = hub, of

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._hub.leave(self._listener)


def event_bytes(name: str, data: bytes) -> bytes:
    """One Server-Sent Event; JSON has no line ends."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


async def _events(
    gateway: Gateway, hub: ViewHub, changed: asyncio.Event, caller: Viewer, scope: str, seconds: int | None
) -> AsyncIterator[bytes]:
    hello = {
        "version": version("tuanyuan"),
        "server_time_ms": hub.now_ms(),
        "step_s": round(SAMPLE_S),
        "scope": scope,
        "role": caller.kind,
        "name": caller.name,
    }
    sent = Latest()
    if hub.now_ms() - hub.latest.figures_at_ms > FIRST_AGE_MS_MAX:
        # The server may be away: old figures would pass for its being there. The next ones come at once, if it is.
        sent.figures_number = hub.latest.figures_number
    yield event_bytes("hello", orjson.dumps(hello)) + _news(hub.latest, sent, scope)
    started_s = sent_s = checked_s = time.monotonic()
    while not gateway.stopping.is_set():
        now_s = time.monotonic()
        if seconds is not None and now_s - started_s >= seconds:
            return
        if now_s - checked_s >= KEY_CHECKED_EVERY_S:
            checked_s = now_s
            if not await anyio.to_thread.run_sync(_is_valid, gateway, caller):
                return
        try:
            async with asyncio.timeout(WAIT_S):
                await changed.wait()
        except TimeoutError:
            pass
        changed.clear()
        news = _news(hub.latest, sent, scope)
        if not news and time.monotonic() - sent_s >= SAMPLE_S:
            news = b": beat\n\n"
        if news:
            yield news
            sent_s = time.monotonic()


def _news(latest: Latest, sent: Latest, scope: str) -> bytes:
    """Events that have not been sent, the newest of each kind; `sent` is brought up to them."""
    news = b""
    if latest.figures_number > sent.figures_number:
        sent.figures_number = latest.figures_number
        news += event_bytes("figures", latest.figures_of_parts if scope else latest.figures)
    if latest.alerts_number > sent.alerts_number:
        sent.alerts_number = latest.alerts_number
        shown = b",".join(alert for division, alert in latest.alerts if division.startswith(scope))
        news += event_bytes("alerts", b'{"at_ms":%d,"alerts":[%b]}' % (latest.alerts_at_ms, shown))
    if latest.map_number > sent.map_number:
        sent.map_number = latest.map_number
        news += event_bytes("map", orjson.dumps({"at_ms": latest.map_at_ms}))
    return news


def _is_valid(gateway: Gateway, caller: Viewer) -> bool:
    """Whether a key still opens anything; while the server is away: yes."""
    try:
        found = gateway.accounts.find(caller.key_id)
    except redis.RedisError:
        return True
    return found is not None and found.usable


# --- what is fetched --------------------------------------------------------------------------------------------------


def _answered(request: Request, document: Document) -> Response:
    """200 with the bytes, or 304."""
    compressed = accepts_gzip(request.headers.get("accept-encoding", ""))
    etag = document.compressed_etag if compressed else document.etag
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding, Authorization"}
    if_none_match = ",".join(request.headers.getlist("if-none-match"))
    if if_none_match and matches(if_none_match, etag):
        return Response(status_code=304, headers=headers)
    if compressed:
        headers["Content-Encoding"] = "gzip"
    return Response(
        document.compressed if compressed else document.body, headers=headers, media_type="application/json"
    )


_UNCHANGED = {"description": "What If-None-Match names still holds; no body."}


@router.get(
    "/v1/view/history",
    summary="Figures over the last minutes or hours",
    response_model=HistoryAnswer,
    responses={304: _UNCHANGED, **responses(422, 503)},
)
def history(
    request: Request,
    caller: ViewerDep,
    minutes: Annotated[int, Query(ge=MINUTES_MIN, le=MINUTES_MAX, description="How far back.")] = MINUTES_MIN,
    _if_none_match: IfNoneMatch = None,
) -> Response:
    """At even distances, at most some hundred points, whatever the span. Steps of 5 s are kept for 24 hours."""
    gateway = gateway_of(request)
    scope_of(gateway, caller, "view.history")
    return _answered(request, _hub(gateway).history_document(minutes))


@router.get(
    "/v1/view/map",
    summary="Where live phones are",
    response_model=DensityMap,
    responses={304: _UNCHANGED, **responses(503)},
)
def density_map(request: Request, caller: ViewerDep, _if_none_match: IfNoneMatch = None) -> Response:
    """Coarse cells with 20 phones or more, in tens, counted at least a minute ago. The stream says when it is newer."""
    gateway = gateway_of(request)
    scope_of(gateway, caller, "view.map")
    hub = _hub(gateway)
    return _answered(request, hub.maps.shown(hub.now_ms()))


@router.get(
    "/v1/view/alerts/{alert_id}/cover",
    summary="A ring as the matcher covers it",
    response_model=AlertCover,
    responses={304: _UNCHANGED, **responses(404, 503)},
)
def cover(request: Request, caller: ViewerDep, alert_id: AlertIdPath, _if_none_match: IfNoneMatch = None) -> Response:
    """Cells wholly inside of the ring, cells that its edge crosses, and the same for the ring's next step."""
    gateway = gateway_of(request)
    known = _alert(gateway, caller, alert_id)
    now_ms = gateway.desk.now_ms()
    ring = ring_now(known, now_ms)
    if ring is None:
        raise Problem(404, "not-open", "the alert is closed: it has no ring any more")
    alert = known.alert
    body: dict[str, Any] = {
        "alert_id": alert.alert_id,
        "revision": alert.revision,
        "resolution": ZONE_RESOLUTION,
        **_ring(alert.lat, alert.lng, ring.km),
        "next": None,
    }
    if ring.next_growth is not None and ring.next_km is not None:
        body["next"] = {"at_ms": ring.next_growth, **_ring(alert.lat, alert.lng, ring.next_km)}
    return _answered(request, Document.of(orjson.dumps(body)))


def _ring(lat: float, lng: float, km: float) -> dict[str, Any]:
    shape = cover_shape(lat, lng, km)
    return {"ring_km": km, "inside": shape.inside, "edge": shape.edge}


@router.get(
    "/v1/view/alerts/{alert_id}/told",
    summary="Phones told over time",
    response_model=ToldOverTime,
    responses=responses(404, 503),
)
def told(request: Request, caller: ViewerDep, alert_id: AlertIdPath) -> Response:
    """Of the alert, and of its end; rounded as all counts are. Kept for five weeks after the last change."""
    gateway = gateway_of(request)
    _alert(gateway, caller, alert_id)
    found = read_told(gateway.client, alert_id, POINTS_MAX)
    body = {"at_ms": found.at_ms, "told": found.told, "resolved": found.resolved}
    return Response(orjson.dumps(body), media_type="application/json")


# --- Prometheus -------------------------------------------------------------------------------------------------------


@router.get(
    "/metrics",
    summary="Everything, for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Text exposition format, or OpenMetrics where it is asked for.",
            "content": {
                "text/plain": {"schema": {"type": "string"}},
                "application/openmetrics-text": {"schema": {"type": "string"}},
            },
        },
        **responses(503),
    },
)
def metrics(request: Request, _caller: OperatorDep) -> Response:
    """Counters, gauges and histograms of all flow processes and gateways, added up, in base units.

    A counter here never falls while this gateway runs, whichever process ends: scrape every gateway, not a balancer.
    """
    gateway = gateway_of(request)
    stats, _ = read_stats_at(gateway.client)
    body, media_type = exposition(stats, _hub(gateway).counters, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": media_type})
