"""The public page of an alert: what anybody may know while a child is looked for, and a neutral notice afterwards.

    GET /a/{id}              HTML in Chinese and English: no script, no cookie, nothing from elsewhere
    GET /a/{id}.json         the same for programs
    GET /a/{id}/photo.jpg    the picture; 410 once the search has ended

Once a search has ended the page loses everything about the child at that moment, and says that it has ended, whatever
the outcome: the desk alone keeps the details, for some days. So that nobody else keeps them longer, answers may be kept
for seconds only, and search engines are asked to keep nothing. An exercise says in every line of it that it is one.
"""

from __future__ import annotations

import base64
import hashlib
import re
from html import escape
from typing import Annotated, Any, Literal, cast

import orjson
from fastapi import APIRouter, Path, Request
from pydantic import ConfigDict, Field
from starlette.responses import Response

from flows.alert_json import ALERT_ID_CHARS_MAX
from gateway.alert_models import Child, Location, Ring, Strict, Time, moment
from gateway.alert_views import PublicAlert, child_line, find_public_alert
from gateway.cases import photo_key
from gateway.errors import Problem, responses
from gateway.photos import JPEG_TYPE
from gateway.runtime import Gateway, gateway_of

STYLE = (
    "body{font:1.125rem/1.6 system-ui,sans-serif;max-width:44rem;margin:0 auto;padding:1rem;color:#111;background:#fff}"
    "img{max-width:100%;height:auto}dt{font-weight:700}dd{margin:0 0 .75rem}.text{white-space:pre-line}"
    ".exercise{padding:.75rem;color:#000;background:#fd0;font-weight:700}a{color:#03c}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; img-src 'self'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
ENDED_ZH = "搜寻已结束，感谢您的关注。"
ENDED_EN = "The search has ended. Thank you."
EXERCISE_ZH = "演习：这不是真实警情，没有儿童失踪。"
EXERCISE_EN = "EXERCISE: this is not a real alert, no child is missing."
_TELEPHONE = re.compile(r"\+?[0-9][0-9 -]{1,18}[0-9]")
_SEX = {"female": "女 female", "male": "男 male"}

router = APIRouter(tags=["public"])

AlertIdPath = Annotated[
    str,
    Path(min_length=1, max_length=ALERT_ID_CHARS_MAX + len(".json"), examples=["a-7k3f9x2m4q"]),
]


class PublicPage(Strict):
    """An alert as anybody may read it. Once the search has ended, nothing of the child."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "alert_id": "a-7k3f9x2m4q",
                    "state": "ended",
                    "exercise": False,
                    "notice": f"{ENDED_ZH} {ENDED_EN}",
                    "headline": "搜寻已结束 The search has ended",
                    "child": None,
                    "place": "",
                    "text": "",
                    "contact": "",
                    "photo_url": None,
                    "location": None,
                    "missing_since": None,
                    "ring": None,
                    "changed_at": "2026-05-01T18:02:11.420+08:00",
                    "revision": 4,
                    "url": "https://alerts.example.org/a/a-7k3f9x2m4q",
                }
            ]
        }
    )

    alert_id: str = Field(min_length=1, max_length=ALERT_ID_CHARS_MAX)
    state: Literal["open", "ended"]
    exercise: bool
    notice: str = Field(description="What must be shown above all else; empty for an actual alert that is open.")
    headline: str
    child: Child | None
    place: str
    text: str
    contact: str
    photo_url: str | None
    location: Location | None
    missing_since: Time | None
    ring: Ring | None
    changed_at: Time
    revision: int = Field(ge=1)
    url: str


def public_page(alert: PublicAlert) -> PublicPage:
    """The page for programs."""
    known, words = alert.known, alert.words
    notice = f"{ENDED_ZH} {ENDED_EN}" if alert.ended_at_ms is not None else ""
    if alert.is_exercise:
        notice = f"{EXERCISE_ZH} {EXERCISE_EN} {notice}".strip()
    child = None
    if words is not None:
        described = words.child
        child = Child.model_construct(
            name=described.name,
            sex=described.sex,
            age=described.age,
            clothes=described.clothes,
            features=described.features,
        )
    is_open = alert.ended_at_ms is None
    return PublicPage.model_construct(
        alert_id=known.alert.alert_id,
        state="open" if is_open else "ended",
        exercise=alert.is_exercise,
        notice=notice,
        headline=f"【演习 EXERCISE】{alert.headline}" if alert.is_exercise else alert.headline,
        child=child,
        place=words.place if words is not None else "",
        text=words.text if words is not None else "",
        contact=words.contact if words is not None else "",
        photo_url=alert.photo_url,
        location=Location.model_construct(lat=known.alert.lat, lng=known.alert.lng) if is_open else None,
        missing_since=known.alert.missing_since_ms if is_open else None,
        ring=alert.ring,
        changed_at=known.changed_at_ms if alert.ended_at_ms is None else alert.ended_at_ms,
        revision=known.alert.revision,
        url=alert.page_url,
    )


# --- HTML -------------------------------------------------------------------------------------------------------------


def html_page(alert: PublicAlert) -> str:
    """The page for people."""
    page = public_page(alert)
    mark = "【演习 EXERCISE】" if page.exercise else ""
    parts: list[str] = []
    if page.exercise:
        parts.append(f'<p class="exercise" role="alert">{EXERCISE_ZH}<br><span lang="en">{EXERCISE_EN}</span></p>')
    if page.state == "ended":
        title = f"{mark}搜寻已结束 The search has ended"
        parts.append(f'<h1>{escape(title)}</h1><p>{ENDED_ZH}</p><p lang="en">{ENDED_EN}</p>')
    else:
        title = page.headline
        parts.append(f"<h1>{escape(title)}</h1>")
        parts.append(_details(alert, page))
    content = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="zh-CN">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="robots" content="noindex, noarchive">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{content}\n</main>\n"
        f"</body>\n</html>\n"
    )


def _details(alert: PublicAlert, page: PublicPage) -> str:
    words = alert.words
    assert words is not None, "an open alert has words, or had none ever"
    child = words.child
    rows = [
        ("姓名", "Name", escape(child.name)),
        ("性别", "Sex", _SEX.get(child.sex, "")),
        ("年龄", "Age", "" if child.age is None else f"{child.age} 岁 years"),
        ("衣着", "Clothes", escape(child.clothes)),
        ("特征", "Features", escape(child.features)),
        ("失踪时间", "Missing since", escape(_minute(page.missing_since or 0))),
        ("最后出现地点", "Last seen", escape(words.place)),
        ("联系电话", "Contact", _contact(words.contact)),
        ("更新时间", "Last change", escape(_minute(page.changed_at))),
    ]
    shown = "\n".join(f'<dt>{zh} <span lang="en">{en}</span></dt><dd>{value}</dd>' for zh, en, value in rows if value)
    picture = ""
    if page.photo_url is not None:
        described = escape(child_line(child, "zh") or "失踪儿童")
        english = escape(child_line(child, "en") or "the missing child")
        source = escape(page.photo_url.removeprefix(alert.page_url.rsplit("/a/", 1)[0]))
        picture = f'<p><img src="{source}" alt="照片：{described} (photo: {english})"></p>\n'
    text = f'<p class="text">{escape(words.text)}</p>\n' if words.text else ""
    call = "如有线索，请立即联系上述电话或拨打 110。"
    call_en = "If you have seen the child, call the number above or 110 at once."
    return f'{picture}{text}<dl>\n{shown}\n</dl>\n<p>{call}</p>\n<p lang="en">{call_en}</p>'


def _minute(at_ms: int) -> str:
    return moment(at_ms)[:16].replace("T", " ") + " (UTC+8)"


def _contact(contact: str) -> str:
    """Numbers become links that a phone dials."""
    shown, position = "", 0
    for found in _TELEPHONE.finditer(contact):
        number = re.sub(r"[^0-9+]", "", found[0])
        shown += escape(contact[position : found.start()])
        shown += f'<a href="tel:{number}">{escape(found[0])}</a>'
        position = found.end()
    return shown + escape(contact[position:])


# --- asking -----------------------------------------------------------------------------------------------------------


def _find(gateway: Gateway, alert_id: str) -> PublicAlert:
    alert = find_public_alert(gateway, alert_id)
    if alert is None:
        raise Problem(404, "no-such-alert", "there is no alert of this id")
    return alert


def _answer(request: Request, body: bytes, media_type: str, seconds: int, page: bool) -> Response:
    """The body, or 304 if the client has it."""
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {
        "ETag": etag,
        "Cache-Control": f"public, max-age={seconds}, must-revalidate",
        "X-Robots-Tag": "noindex, noarchive, noimageindex",
    }
    if page:
        headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY
        headers["Content-Language"] = "zh-CN, en"
    if etag in [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]:
        return Response(None, 304, headers)
    return Response(body, 200, headers, media_type)


_NOT_MODIFIED: dict[int | str, dict[str, Any]] = {304: {"description": "It is still what If-None-Match names."}}


@router.get(
    "/a/{alert_id}.json",
    summary="An alert's page, for programs",
    response_model=PublicPage,
    responses={**responses(404), **_NOT_MODIFIED},
)
def get_page_json(request: Request, alert_id: AlertIdPath) -> Response:
    """Open: whom to look for, and where. Afterwards: a neutral notice, whatever the outcome was."""
    gateway = gateway_of(request)
    page = public_page(_find(gateway, alert_id))
    body = orjson.dumps(page.model_dump(mode="json"))
    return _answer(request, body, "application/json", gateway.config.feed_cache_s, page=False)


@router.get(
    "/a/{alert_id}/photo.jpg",
    summary="The picture of an open alert",
    response_class=Response,
    responses={
        200: {"content": {JPEG_TYPE: {"schema": {"type": "string", "format": "binary"}}}, "description": "A JPEG."},
        **responses(404, 410),
        **_NOT_MODIFIED,
    },
)
def get_photo(request: Request, alert_id: AlertIdPath) -> Response:
    """Gone for good once the search has ended."""
    gateway = gateway_of(request)
    alert = _find(gateway, alert_id)
    if alert.ended_at_ms is not None:
        raise Problem(410, "ended", "the search has ended: there is no picture any more")
    jpeg = cast("bytes | None", gateway.client.get(photo_key(alert_id))) if alert.photo_url is not None else None
    if jpeg is None:
        raise Problem(404, "no-picture", "this alert has no picture")
    return _answer(request, jpeg, JPEG_TYPE, gateway.config.feed_cache_s, page=False)


@router.get(
    "/a/{alert_id}",
    summary="An alert's page, for people",
    response_class=Response,
    responses={
        200: {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "HTML, Chinese and English."},
        **responses(404),
        **_NOT_MODIFIED,
    },
)
def get_page(request: Request, alert_id: AlertIdPath) -> Response:
    """What the push of a phone opens."""
    gateway = gateway_of(request)
    body = html_page(_find(gateway, alert_id)).encode()
    return _answer(request, body, "text/html; charset=utf-8", gateway.config.feed_cache_s, page=True)
