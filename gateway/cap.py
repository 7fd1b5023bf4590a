"""CAP 1.2 over HTTP: officers' systems post messages; anybody reads a public alert as the message that stands for it.

    POST /v1/cap                    Alert, Update, Cancel -> publish, update, close, by way of the alert desk
    GET  /v1/alerts/{id}/cap        the newest message of an alert

A message is taken once, whoever sends it how often: its sender, identifier and time are its name, which is claimed in
`cap:{desk}:<digest>` before anything is done, and leads later messages to the alert that it made. Everything an officer
may not do, the desk refuses as for JSON; every message and every refusal stands in the audit log, without its words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast
from urllib.parse import quote

import anyio.to_thread
import msgspec
from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import Response

from flows.desk import DeskAlert
from gateway.accounts import AnyAccount, Caller, OfficerAccount
from gateway.alert_models import AlertId, CloseRequest, EditRequest, PublishRequest, Receipt, Strict, Time
from gateway.alert_views import headline_of, photo_url, words_of
from gateway.audit_log import DONE, REFUSED
from gateway.cap_alerts import AlertWords, alert_id_of, alert_message, desk_events, history
from gateway.cap_messages import CapMessage, Reference, cap_time, message_bytes, read_message
from gateway.cap_orders import CapOrder, message_digest, read_order
from gateway.cap_signatures import NO_CERTIFICATES, CapCertificates, Signed, utc_now
from gateway.cap_xml import CAP_BYTES_MAX, CapRefused, brief, parse_cap
from gateway.cases import Case, Words, read_case
from gateway.config import GatewayConfig
from gateway.desk_service import DeskService, page_url
from gateway.errors import Problem, responses
from gateway.identity import REFUSALS_BURST, REFUSALS_PER_S, OfficerDep, caller_of
from gateway.runtime import Gateway, gateway_of

CAP_XML = "application/cap+xml"
_XML_TYPES = (CAP_XML, "application/xml", "text/xml")
CLAIM_S = 24 * 3600
"""How long a message whose fate is not known keeps its name: as long as the desk remembers what was begun for it."""
MESSAGE_S = 400 * 24 * 3600
"""How long a message that was done can be referred to: longer than any alert is open."""

_STATUSES = {"too_large": 413, "media_type": 415, "not_xml": 400, "document_type": 400, "unknown": 404, "begun": 409}
"""Of refusals by their reason; 422 for all others."""

_M = TypeVar("_M", bound=BaseModel)

router = APIRouter(tags=["CAP"])


def body_limits(config: GatewayConfig) -> Mapping[str, int]:
    """XML of any configuration is bounded alike."""
    return {"/v1/cap": CAP_BYTES_MAX}


class CapDesk:
    """What the endpoints share: certificates, read once, and the desk."""

    def __init__(self, gateway: Gateway) -> None:
        """Raises ValueError for a folder of certificates that holds something else; OSError."""
        folder = gateway.config.cap_certificates
        self.must_be_signed = folder is not None
        self.certificates = NO_CERTIFICATES if folder is None else CapCertificates.read(folder)
        self.service = DeskService(gateway)

    def stop(self) -> None:
        """Nothing runs."""


def start(gateway: Gateway) -> CapDesk:
    """Read the certificates. Raises ValueError, OSError: then the gateway does not start."""
    return CapDesk(gateway)


# --- posting ----------------------------------------------------------------------------------------------------------


class CapAnswer(Strict):
    """What a message did."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "done": "publish",
                    "status": "Actual",
                    "alert_id": "a-7k3f9x2m4q",
                    "revision": 1,
                    "at": "2026-05-01T14:41:07.205+08:00",
                    "url": "https://alerts.example.org/a/a-7k3f9x2m4q",
                    "copied": True,
                    "signed_by": None,
                    "notes": ["the circle's 25 km are not used: the ring follows the schedule of the platform"],
                }
            ]
        }
    )

    done: Literal["publish", "update", "close", "none"] = Field(
        description="`none`: the message is sound, but of status Test, Draft or System, or asks for what is so "
        "already: nobody was told anything."
    )
    status: str = Field(description="The message's own status.", examples=["Actual"])
    alert_id: AlertId | None = Field(description="null: no alert was touched.")
    revision: int | None = Field(ge=1, examples=[1])
    at: Time | None
    url: str | None = Field(
        description="The alert's public page.", examples=["https://alerts.example.org/a/a-7k3f9x2m4q"]
    )
    copied: bool | None = Field(
        description="Whether it stands in every shard's log, so that phones are being told. If not it will by itself."
    )
    signed_by: str | None = Field(
        description="Owner of the certificate that signed the message.", examples=["CN=cap@police.example.cn"]
    )
    notes: list[str] = Field(description="What of the message was not used, and why.")


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept under a message's name."""

    digest: str
    """SHA-256 of what the message says, hex: another message may not take its name."""
    actor: str
    """Who sent it first."""
    answer: dict[str, Any] | None = None
    """`CapAnswer`, as JSON; None: begun."""


def message_key(reference: Reference) -> str:
    """Where a message's name is kept."""
    return f"cap:{{desk}}:{message_digest(reference)}"


_EXAMPLE = """<?xml version="1.0" encoding="UTF-8"?>
<alert xmlns="urn:oasis:names:tc:emergency:cap:1.2">
  <identifier>2026-330106-17</identifier><sender>cap@police.example.cn</sender>
  <sent>2026-05-01T14:40:00+08:00</sent><status>Actual</status><msgType>Alert</msgType><scope>Public</scope>
  <info>
    <language>zh-CN</language><category>Rescue</category><event>儿童失踪</event>
    <urgency>Immediate</urgency><severity>Severe</severity><certainty>Likely</certainty>
    <eventCode><valueName>SAME</valueName><value>CAE</value></eventCode>
    <onset>2026-05-01T14:30:00+08:00</onset>
    <headline>寻找王小明,男,6岁</headline><description>红色外套,蓝色书包</description>
    <contact>0571-88001122</contact>
    <area><areaDesc>西湖区文三路</areaDesc><circle>30.2741,120.1551 100</circle></area>
  </info>
</alert>
"""


@router.post(
    "/v1/cap",
    summary="Publish, edit or close an alert by a CAP 1.2 message",
    response_model=CapAnswer,
    responses=responses(400, 401, 403, 404, 409, 413, 415),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": f"One `alert` of CAP 1.2, UTF-8, at most {CAP_BYTES_MAX} bytes, without a document type.",
            "content": {
                media_type: {"schema": {"type": "string", "maxLength": CAP_BYTES_MAX}, "example": _EXAMPLE}
                for media_type in _XML_TYPES
            },
        }
    },
)
async def post_cap(request: Request, caller: OfficerDep) -> CapAnswer:
    """A message of msgType Alert publishes, Update edits, Cancel closes the alert that its references name.

    Needed: eventCode SAME=CAE, one circle, and the same of both in every info. `onset` is when the child went missing;
    without it the message's `sent`. Status Test, Draft and System: the message is checked, and nobody is told. The same
    message again is answered as the first time. A message that is not taken is answered with `element`, `expected`,
    `came` and, where known, `line`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    body = await request.body()
    return await anyio.to_thread.run_sync(_take, gateway_of(request), caller, media_type, body)


def _take(gateway: Gateway, caller: Caller[OfficerAccount], media_type: str, body: bytes) -> CapAnswer:
    """Everything about one message. Raises Problem; redis.RedisError."""
    desk = gateway.service(CapDesk)
    account = desk.service.check_desk(caller, "cap.message")
    try:
        if media_type not in _XML_TYPES:
            raise CapRefused("media_type", "message", f"content of type {', '.join(_XML_TYPES)}", brief(media_type))
        message, signed = _read(desk, body, gateway.desk.now_ms())
        _check_sender(message, signed, account)
        order = read_order(message, gateway.desk.now_ms())
        if order.only_checked:
            if order.action != "close":
                _publication(order)
            details = {"message": message_digest(message.reference), "status": message.status}
            gateway.audit.append(caller.actor, "cap.checked", message.identifier, DONE, details)
            return _answer("none", message, signed, order)
        alert_id = None if order.action == "publish" else _alert_of(gateway, order.references)
        return _claimed(gateway, caller, message, signed, order, alert_id)
    except CapRefused as refused:
        raise _problem(gateway, caller, body, refused) from None


def _read(desk: CapDesk, body: bytes, now_ms: int) -> tuple[CapMessage, Signed | None]:
    """A message, and who signed it. Of a signed one only what was signed is read."""
    signed = desk.certificates.verify(body, utc_now(now_ms))
    if signed is None and desk.must_be_signed:
        # Whoever's message is not even CAP 1.2 hears that first.
        parse_cap(body)
        raise CapRefused("signature", "Signature", "an XML signature by a certificate that is configured here", "none")
    return read_message(parse_cap(body if signed is None else signed.document)), signed


def _check_sender(message: CapMessage, signed: Signed | None, account: OfficerAccount) -> None:
    """Nobody sends in another's name: the certificate names the sender, or without one the officer's account does."""
    if signed is not None:
        if not signed.speaks_for(message.sender):
            expected = f"a sender that the certificate of {signed.subject} names"
            raise CapRefused("signature", "sender", expected, brief(message.sender))
        return
    name = sender_name(account.name)
    if message.sender != name and not message.sender.startswith(f"{name}@"):
        raise CapRefused("meaning", "sender", f"the account's name, {name!r} or {f'{name}@…'!r}", brief(message.sender))


def sender_name(account_name: str) -> str:
    """An account's name as CAP can carry it: what it must not hold (CAP 1.2, 3.2.1) is a hyphen."""
    return "-".join(account_name.translate(str.maketrans(",<&", "   ")).split())


def _problem(gateway: Gateway, caller: Caller[OfficerAccount], body: bytes, refused: CapRefused) -> Problem:
    """The refusal as an answer, and as a row: where and why, none of the words that came."""
    gateway.buckets.check(f"refusals:{caller.actor}", "refusals", REFUSALS_PER_S, REFUSALS_BURST)
    target = f"sha256:{hashlib.sha256(body).hexdigest()}"
    details = {"reason": refused.reason, "element": refused.element, "line": refused.line}
    gateway.audit.append(caller.actor, "cap.message", target, REFUSED, details)
    more: dict[str, Any] = {
        "reason": refused.reason,
        "element": refused.element,
        "expected": refused.expected,
        "came": refused.came,
    }
    if refused.line is not None:
        more["line"] = refused.line
    return Problem(_STATUSES.get(refused.reason, 422), "cap-refused", str(refused), **more)


def _alert_of(gateway: Gateway, references: tuple[Reference, ...]) -> str:
    """The one alert that the messages referred to are about; those that nobody here knows are passed over."""
    own_sender = gateway.config.base_url
    found: set[str] = set()
    others = [reference for reference in references if reference.sender != own_sender]
    for reference in references:
        if reference.sender == own_sender and (alert_id := alert_id_of(reference.identifier)) is not None:
            found.add(alert_id)
    if others:
        raws = cast("list[bytes | None]", gateway.client.mget([message_key(reference) for reference in others]))
        for raw in raws:
            claimed = None if raw is None else msgspec.json.decode(raw, type=Claimed)
            if claimed is not None and claimed.answer is not None:
                found.add(claimed.answer["alert_id"])
    if not found:
        came = brief(" ".join(map(str, references)))
        raise CapRefused("unknown", "references", "a message that made an alert here", came)
    if len(found) > 1:
        raise CapRefused("meaning", "references", "messages about one alert", f"about {len(found)}")
    return found.pop()


def _claimed(
    gateway: Gateway,
    caller: Caller[OfficerAccount],
    message: CapMessage,
    signed: Signed | None,
    order: CapOrder,
    alert_id: str | None,
) -> CapAnswer:
    """Do what the message asks for, if it was not done before."""
    client, key = gateway.client, message_key(message.reference)
    mine = Claimed(digest=hashlib.sha256(repr(message).encode()).hexdigest(), actor=caller.actor)
    if not client.set(key, msgspec.json.encode(mine), nx=True, ex=CLAIM_S):
        raw = cast("bytes | None", client.get(key))
        known = mine if raw is None else msgspec.json.decode(raw, type=Claimed)
        if known.digest != mine.digest:
            raise CapRefused(
                "meaning",
                "identifier",
                "a new identifier for a new message",
                f"{brief(message.identifier)}, used before",
            )
        if known.answer is not None:
            return CapAnswer.model_validate(known.answer)
        if known.actor != caller.actor:
            expected = "the account that sent this message before: whether it was done is not known yet"
            raise CapRefused("begun", "identifier", f"{expected}, {known.actor}", caller.actor)
    idempotency_key = key.rpartition(":")[2]
    details = {"message": idempotency_key, "sender": message.sender, "signed_by": signed and signed.subject[:200]}
    with gateway.audit.recording(caller.actor, f"cap.{order.action}", message.identifier, details) as result:
        try:
            receipt = _do(gateway.service(CapDesk).service, gateway, caller, order, alert_id, f"cap-{idempotency_key}")
        except Problem as problem:
            result["error"] = problem.type
            if problem.status_code < 500:
                client.delete(key)  # nothing was done: a message corrected may come under the same name
            raise
        except CapRefused:
            client.delete(key)
            raise
        result["alert_id"] = receipt.alert_id
    answer = _answer(cast(Any, receipt.event), message, signed, order, receipt)
    kept = msgspec.structs.replace(mine, answer=answer.model_dump(mode="json"))
    client.set(key, msgspec.json.encode(kept), ex=MESSAGE_S)
    return answer


def _answer(
    done: Literal["publish", "update", "close", "none"],
    message: CapMessage,
    signed: Signed | None,
    order: CapOrder,
    receipt: Receipt | None = None,
) -> CapAnswer:
    return CapAnswer.model_construct(
        done=done,
        status=message.status,
        alert_id=receipt and receipt.alert_id,
        revision=receipt and receipt.revision,
        at=receipt and receipt.at,
        url=receipt and receipt.url,
        copied=receipt and receipt.copied,
        signed_by=signed and signed.subject,
        notes=list(order.notes),
    )


def _do(
    service: DeskService,
    gateway: Gateway,
    caller: Caller[OfficerAccount],
    order: CapOrder,
    alert_id: str | None,
    idempotency_key: str,
) -> Receipt:
    if order.action == "publish":
        return service.publish(caller, _publication(order), idempotency_key)
    assert alert_id is not None, "references named it"
    known = gateway.desk.show(alert_id)
    if known is not None and known.alert.status != order.status:
        raise CapRefused(
            "meaning", "status", f"that of the alert, {known.alert.status}: it never changes", order.status
        )
    if order.action == "update":
        return service.update(caller, alert_id, _edit(order), idempotency_key=idempotency_key)
    closing = _valid(CloseRequest, {"outcome": order.outcome, "category": order.category})
    return service.close(caller, alert_id, closing, idempotency_key=idempotency_key)


# --- orders as requests of the desk -----------------------------------------------------------------------------------

_ELEMENTS = {
    "division": "info/area/geocode",
    "location": "info/area/circle",
    "missing_since": "info/onset",
    "schedule": "info/parameter",
    "expires_at": "info/expires",
    "audience": "addresses",
    "child": "info/parameter",
    "headline": "info/headline",
    "place": "info/area/areaDesc",
    "text": "info/description",
    "contact": "info/contact",
    "category": "info/parameter",
}
"""Where in a message a field of the desk comes from."""


def _publication(order: CapOrder) -> PublishRequest:
    fields = _fields(order) | {"status": order.status}
    if order.division is not None:
        fields["division"] = order.division
    return _valid(PublishRequest, {name: value for name, value in fields.items() if value not in (None, "")})


def _edit(order: CapOrder) -> EditRequest:
    """An Update stands for the whole message before it: what it leaves out of the words is gone.

    Times and a schedule that it does not name stay, so that no ring shrinks for want of an element.
    """
    fields = _fields(order)
    unsaid = [name for name in ("missing_since", "expires_at", "schedule", "contact") if fields[name] in (None, "")]
    return _valid(EditRequest, {name: value for name, value in fields.items() if name not in unsaid})


def _fields(order: CapOrder) -> dict[str, Any]:
    words, circle = order.words, order.circle
    assert circle is not None, "a revision has a circle"
    age: Any = words.age or None
    if words.age.isascii() and words.age.isdigit() and len(words.age) <= 3:
        age = int(words.age)
    return {
        "location": {"lat": circle.lat, "lng": circle.lng},
        "missing_since": None if order.missing_since_ms is None else cap_time(order.missing_since_ms),
        "expires_at": None if order.expires_at_ms is None else cap_time(order.expires_at_ms),
        "schedule": None if order.schedule is None else [list(step) for step in order.schedule],
        "audience": None if order.audience is None else list(order.audience),
        "child": {
            "name": words.name,
            "sex": words.sex or "unknown",
            "age": age,
            "clothes": words.clothes,
            "features": words.features,
        },
        "headline": words.headline,
        "place": words.place,
        "text": words.text,
        "contact": words.contact,
    }


def _valid(model: type[_M], fields: dict[str, Any]) -> _M:
    """The desk's own request; what does not fit is said in CAP's names. Raises CapRefused."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        path = [str(part) for part in first["loc"]]
        element = _ELEMENTS.get(path[0], "info") if path else "info"
        name = f" ({path[-1]})" if len(path) > 1 else ""
        came = first["input"]
        expected = first["msg"].removeprefix("Value error, ") + name
        raise CapRefused("meaning", element, expected, brief(came if isinstance(came, str) else repr(came))) from None


# --- reading ----------------------------------------------------------------------------------------------------------


def public_words(gateway: Gateway, known: DeskAlert, case: Case | None) -> AlertWords:
    """What everybody may read of an open alert."""
    words = words_of(known, case) or Words()
    child = words.child
    return AlertWords(
        headline=words.headline or headline_of(words),
        text=words.text,
        place=words.place,
        contact=words.contact,
        name=child.name,
        sex=child.sex if child.sex != "unknown" else "",
        age="" if child.age is None else str(child.age),
        clothes=child.clothes,
        features=child.features,
        photo_url=photo_url(gateway, case) or "",
    )


def cap_url(gateway: Gateway, alert_id: str) -> str:
    """Where an alert is read as CAP."""
    return f"{gateway.config.base_url}/v1/alerts/{quote(alert_id, safe='')}/cap"


def is_public(known: DeskAlert) -> bool:
    """Exercises, and alerts that were meant for some partners alone, are for nobody else."""
    return known.alert.status == "actual" and known.alert.audience is None


def current_message(gateway: Gateway, known: DeskAlert, case: Case | None) -> CapMessage:
    """The message that stands for an alert now. Raises redis.RedisError."""
    past = history(known, desk_events(gateway.client, known), gateway.desk.now_ms())
    words = AlertWords() if past.is_ended else public_words(gateway, known, case)
    return alert_message(past, words, gateway.config.base_url, page_url(gateway, known.alert.alert_id))


class CapXml(Response):
    """A CAP message."""

    media_type = CAP_XML


@router.get(
    "/v1/alerts/{alert_id}/cap",
    summary="An alert as a CAP 1.2 message",
    response_class=Response,
    responses={
        200: {"description": "One `alert` of CAP 1.2.", "content": {CAP_XML: {"schema": {"type": "string"}}}},
        **responses(401, 403, 404),
    },
)
def get_cap(
    request: Request, alert_id: Annotated[str, Path(min_length=1, max_length=64, examples=["a-7k3f9x2m4q"])]
) -> Response:
    """The newest message of an alert: Alert, Update (edited, or its ring grew), or Cancel: the search has ended.

    For everybody; exercises and alerts for some partners alone are for officers of their jurisdiction.
    """
    gateway = gateway_of(request)
    known = gateway.desk.show(alert_id)
    if known is not None and is_public(known):
        case = read_case(gateway.client, alert_id)
    else:
        known, case = _of_officer(gateway, caller_of(request), alert_id)
    return CapXml(message_bytes(current_message(gateway, known, case)), headers={"Cache-Control": "no-cache"})


def _of_officer(gateway: Gateway, caller: Caller[AnyAccount] | None, alert_id: str) -> tuple[DeskAlert, Case | None]:
    """Raises Problem 404, the same for what is not there and for what is not public; 403 for another jurisdiction."""
    if caller is None or caller.kind != "officer":
        raise Problem(404, "no-such-alert", "there is no such public alert")
    return gateway.service(CapDesk).service.view(cast(Caller[OfficerAccount], caller), alert_id)
