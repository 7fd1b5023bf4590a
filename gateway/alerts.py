"""The alert desk over HTTP: publish, look, edit, close; pictures. What it means is in `gateway.desk_service`.

POST   /v1/alerts                  publish                GET    /v1/alerts            those of the jurisdiction
PATCH  /v1/alerts/{id}             edit                   GET    /v1/alerts/{id}       one, with live figures
POST   /v1/alerts/{id}/close       end                    PUT    /v1/alerts/{id}/category
PUT    /v1/alerts/{id}/photo       a picture              DELETE /v1/alerts/{id}/photo
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import anyio.to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.requests import ClientDisconnect

from flows.alert_json import ALERT_ID_CHARS_MAX
from gateway.alert_models import (
    AlertDetails,
    AlertList,
    CategoryRequest,
    CloseRequest,
    EditRequest,
    PublishRequest,
    Receipt,
)
from gateway.alert_views import PublicAlert, details, list_alerts, public_alerts, summary
from gateway.cases import Sweeper
from gateway.config import GatewayConfig
from gateway.desk_service import DeskService, new_alert_id, page_url
from gateway.edge import too_large
from gateway.errors import Problem, responses
from gateway.idempotency import KEY_CHARACTERS_MAX
from gateway.identity import OfficerDep
from gateway.jurisdiction import DIVISION_PATTERN, division_refusal, prefix_of
from gateway.photos import FORMATS, PhotoRefused, remake
from gateway.refusals import refuse
from gateway.runtime import Gateway, gateway_of

__all__ = ["DeskService", "PublicAlert", "new_alert_id", "page_url", "public_alerts", "router"]

PHOTO_PATH = "/v1/alerts/{alert_id}/photo"
LIMIT_MAX = 200

router = APIRouter(tags=["alert desk"])


def body_limits(config: GatewayConfig) -> Mapping[str, int]:
    """Pictures are larger than other bodies."""
    return {PHOTO_PATH: config.photo_bytes_max}


def start(gateway: Gateway) -> Sweeper:
    """Sweep cases, beside any other gateway that does."""
    sweeper = Sweeper(gateway.client, gateway.config.details_days, gateway.metrics, gateway.clock)
    sweeper.start()
    return sweeper


AlertIdPath = Annotated[
    str, Path(min_length=1, max_length=ALERT_ID_CHARS_MAX, description="The alert's id.", examples=["a-7k3f9x2m4q"])
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=KEY_CHARACTERS_MAX,
        pattern=r"^[!-~]+$",
        description="Any text of your own, another one for each request: sent again within 24 h under the same key, a "
        "request is not made again, and answered as the first time. With another body: 422.",
        examples=["8e03978e-40d5-43e8-bc93-6894a57f9324"],
    ),
]
IfMatch = Annotated[
    str | None,
    Header(max_length=40, description='The revision that was seen, as ETag gave it: "3". 412 if there is a later one.'),
]

_EVENT_RESPONSES = {
    202: {"model": Receipt, "description": "Durable, but not in every shard's log yet. It will be by itself."},
    **responses(400, 401, 403, 409, 413, 422, 429, 503),
}
_EDIT_RESPONSES = {**_EVENT_RESPONSES, **responses(404, 412)}


def _expected_revision(if_match: str | None) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix("W/").strip('"')
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Problem(400, "malformed-if-match", 'If-Match must be one revision, as "3", or *')
    return int(text)


def _conflict(problem: Problem, if_match: str | None) -> Problem:
    """A lost race is 412 to whoever asked with If-Match, and 409 to others."""
    if problem.type != "revision-conflict" or if_match is None:
        return problem
    return Problem(412, problem.type, problem.detail, **problem.more)


def _answered(receipt: Receipt, response: Response, status: int) -> Receipt:
    response.status_code = status if receipt.copied else 202
    response.headers["ETag"] = f'"{receipt.revision}"'
    return receipt


# --- events -----------------------------------------------------------------------------------------------------------


@router.post("/v1/alerts", status_code=201, summary="Publish an alert", responses=_EVENT_RESPONSES)
def publish(
    request: Request,
    response: Response,
    caller: OfficerDep,
    alert: PublishRequest,
    idempotency_key: IdempotencyKey = None,
) -> Receipt:
    """Tell every live phone in the ring, now and as the ring grows. Nobody has to approve it.

    The answer comes when the alert stands in every shard's log. Send an Idempotency-Key, and the same request again if
    no answer arrives: it is published once.
    """
    receipt = DeskService(gateway_of(request)).publish(caller, alert, idempotency_key)
    response.headers["Location"] = f"/v1/alerts/{receipt.alert_id}"
    return _answered(receipt, response, 201)


@router.patch("/v1/alerts/{alert_id}", summary="Edit an open alert", responses=_EDIT_RESPONSES)
def update(
    request: Request,
    response: Response,
    caller: OfficerDep,
    alert_id: AlertIdPath,
    changes: EditRequest,
    idempotency_key: IdempotencyKey = None,
    if_match: IfMatch = None,
) -> Receipt:
    """What is left out stays as it is. Everyone told hears of the edit, then whoever is newly in the ring is told."""
    service = DeskService(gateway_of(request))
    try:
        receipt = service.update(caller, alert_id, changes, _expected_revision(if_match), idempotency_key)
    except Problem as problem:
        raise _conflict(problem, if_match) from None
    return _answered(receipt, response, 200)


@router.post("/v1/alerts/{alert_id}/close", summary="End an alert", responses=_EDIT_RESPONSES)
def close(
    request: Request,
    response: Response,
    caller: OfficerDep,
    alert_id: AlertIdPath,
    closing: CloseRequest,
    idempotency_key: IdempotencyKey = None,
    if_match: IfMatch = None,
) -> Receipt:
    """Everyone told hears that the search has ended, and no more than that. So does whoever opens the public page."""
    service = DeskService(gateway_of(request))
    try:
        receipt = service.close(caller, alert_id, closing, _expected_revision(if_match), idempotency_key)
    except Problem as problem:
        raise _conflict(problem, if_match) from None
    return _answered(receipt, response, 200)


@router.put(
    "/v1/alerts/{alert_id}/category",
    summary="Say how a search ended, once it is known",
    responses=responses(400, 401, 403, 404, 409, 410, 422, 503),
)
def set_category(request: Request, caller: OfficerDep, alert_id: AlertIdPath, category: CategoryRequest) -> Receipt:
    """For the statistics; nobody is told. Possible until the details are erased."""
    return DeskService(gateway_of(request)).set_category(caller, alert_id, category)


# --- the picture ------------------------------------------------------------------------------------------------------


@router.put(
    PHOTO_PATH,
    summary="Put a picture of the child",
    responses=responses(400, 401, 403, 404, 409, 413, 415, 422, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FORMATS},
        }
    },
)
async def put_photo(request: Request, caller: OfficerDep, alert_id: AlertIdPath) -> Receipt:
    """A JPEG, PNG or WebP. It is written anew, at most 1,600 pixels a side: places and names in the file are dropped.

    The public page shows it at once; no phone is told again.
    """
    gateway = gateway_of(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in FORMATS:
        raise Problem(
            415, "unsupported-picture", f"Content-Type must be one of {', '.join(FORMATS)}, got {kind[:50]!r}"
        )
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Problem(400, "broken-off", "the connection ended before the picture did") from None
    if len(body) > gateway.config.photo_bytes_max:
        raise too_large(gateway.config.photo_bytes_max)
    service = DeskService(gateway)

    def put() -> Receipt:
        service.view(caller, alert_id)  # whoever may not does not make us unpack anything
        try:
            photo = remake(body)
        except PhotoRefused as refused:
            raise Problem(422, "unfit-picture", str(refused)) from None
        return service.set_photo(caller, alert_id, photo)

    return await anyio.to_thread.run_sync(put)


@router.delete(
    PHOTO_PATH,
    summary="Take the picture away",
    responses=responses(401, 403, 404, 409, 503),
)
def delete_photo(request: Request, caller: OfficerDep, alert_id: AlertIdPath) -> Receipt:
    """The public page shows none from now on."""
    return DeskService(gateway_of(request)).set_photo(caller, alert_id, None)


# --- looking ----------------------------------------------------------------------------------------------------------


@router.get("/v1/alerts", summary="Alerts of the own jurisdiction", responses=responses(400, 401, 403, 404))
def get_alerts(
    request: Request,
    caller: OfficerDep,
    state: Annotated[Literal["open", "closed", "all"], Query(description="Expired alerts are open.")] = "open",
    division: Annotated[
        str | None, Query(pattern=DIVISION_PATTERN, description="A part of the own jurisdiction.", examples=["330106"])
    ] = None,
    before: Annotated[
        str | None, Query(min_length=1, max_length=ALERT_ID_CHARS_MAX, description="`next` of the answer before.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=LIMIT_MAX)] = 50,
) -> AlertList:
    """The last published first."""
    gateway = gateway_of(request)
    account = DeskService(gateway).check_desk(caller, "alert.list")
    asked = division or account.division
    try:
        refusal = division_refusal(account, asked)
    except ValueError as error:
        raise Problem(422, "does-not-fit", str(error)) from None
    if refusal is not None:
        raise refuse(gateway, caller, "alert.list", asked, refusal)
    try:
        found, following = list_alerts(gateway, prefix_of(asked), state, before, limit)
    except LookupError:
        raise Problem(404, "no-such-alert", "before must be an alert's id, as `next` gave it") from None
    now_ms = gateway.desk.now_ms()
    return AlertList.model_construct(
        alerts=[summary(gateway, known, case, now_ms) for known, case in found], next=following
    )


@router.get("/v1/alerts/{alert_id}", summary="One alert, live", responses=responses(401, 403, 404, 503))
def get_alert(request: Request, response: Response, caller: OfficerDep, alert_id: AlertIdPath) -> AlertDetails:
    """The alert as it is now: its ring, when that grows, and told, delivered, acknowledged, retracted per partner."""
    gateway = gateway_of(request)
    known, case = DeskService(gateway).view(caller, alert_id)
    response.headers["ETag"] = f'"{known.alert.revision}"'
    return details(gateway, known, case, gateway.desk.now_ms())
