"""What a message of the Common Alerting Protocol 1.2 says, as values; read from XML and written to it.

Only what matters to an alert for a missing child is kept; the rest of a message (effective, incidents, geocodes, …) is
checked by the schema and passed over. Element names are CAP's own. Times in ms since 1970; CAP knows whole seconds.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone

from lxml import etree

from flows.alert_json import event_time_ms
from gateway.cap_xml import CAP_NAMESPACE, CAP_TIME, CapRefused, brief, satisfies_schema, text_of

INFOS_MAX = 16
REFERENCES_MAX = 200
ADDRESSES_MAX = 64
IDENTIFIER_CHARS_MAX = 300

BEIJING = timezone(timedelta(hours=8))
"""Times are written as people at the desk read them."""

_FIRST = datetime(1, 1, 2, tzinfo=UTC)
_FIRST_S = int(_FIRST.timestamp())
_SECONDS = int(datetime(9999, 12, 30, tzinfo=UTC).timestamp()) - _FIRST_S

_CAP = f"{{{CAP_NAMESPACE}}}"
_UNFIT = re.compile(r"[\s,<&]")
_CIRCLE = re.compile(r"([+-]?\d{1,3}(?:\.\d{1,15})?),([+-]?\d{1,3}(?:\.\d{1,15})?) +(\d{1,5}(?:\.\d{1,15})?)", re.ASCII)
_SENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d", re.ASCII)
"""As the schema writes every time of a message; what stands in `references` it does not look at."""
_ADDRESS = re.compile(r'"([^"]*)"|([^\s"]+)')
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Reference:
    """Another message, named as CAP names it: by sender, identifier and time of sending, together unique."""

    sender: str
    identifier: str
    sent_ms: int

    def __str__(self) -> str:
        return f"{self.sender},{self.identifier},{cap_time(self.sent_ms)}"


@dataclass(frozen=True, slots=True)
class Circle:
    """A place in WGS-84 degrees, and the km around it."""

    lat: float
    lng: float
    km: float

    def __str__(self) -> str:
        return f"{_decimal(self.lat)},{_decimal(self.lng)} {_decimal(self.km)}"


@dataclass(frozen=True, slots=True)
class CapInfo:
    """What one language says. None, or empty: the message has no such element, or an empty one."""

    language: str = "en-US"
    event: str = ""
    event_codes: tuple[tuple[str, str], ...] = ()
    onset_ms: int | None = None
    expires_ms: int | None = None
    sender_name: str | None = None
    headline: str | None = None
    description: str | None = None
    instruction: str | None = None
    web: str | None = None
    contact: str | None = None
    parameters: tuple[tuple[str, str], ...] = ()
    photo_url: str | None = None
    """The first resource of a kind `image/…` that has a uri."""
    area: str = ""
    """Description of the first area."""
    circles: tuple[Circle, ...] = ()
    polygon_count: int = 0
    geocodes: tuple[tuple[str, str], ...] = ()
    """Of all areas."""
    categories: tuple[str, ...] = ("Rescue",)
    response_types: tuple[str, ...] = ()
    urgency: str = "Immediate"
    severity: str = "Severe"
    certainty: str = "Likely"


@dataclass(frozen=True, slots=True)
class CapMessage:
    """One message."""

    identifier: str
    sender: str
    sent_ms: int
    status: str
    kind: str
    """`msgType`: Alert, Update, Cancel, Ack, Error."""
    scope: str
    addresses: tuple[str, ...] = ()
    restriction: str | None = None
    references: tuple[Reference, ...] = ()
    infos: tuple[CapInfo, ...] = ()
    note: str | None = None

    @property
    def reference(self) -> Reference:
        """What others call this message."""
        return Reference(self.sender, self.identifier, self.sent_ms)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_message(alert: etree._Element) -> CapMessage:
    """The values of an element that satisfies the schema (`cap_xml.parse_cap`). Raises CapRefused."""
    infos = alert.findall(f"{_CAP}info")
    if len(infos) > INFOS_MAX:
        raise CapRefused("meaning", "info", f"at most {INFOS_MAX} of them", f"{len(infos)}")
    return CapMessage(
        identifier=_name(alert, "identifier"),
        sender=_name(alert, "sender"),
        sent_ms=_time_ms(alert, "sent", "sent"),
        status=_text(alert, "status") or "",
        kind=_text(alert, "msgType") or "",
        scope=_text(alert, "scope") or "",
        addresses=_addresses(alert),
        restriction=_text(alert, "restriction"),
        references=_references(alert),
        infos=tuple(_info(info) for info in infos),
        note=_text(alert, "note"),
    )


def _text(parent: etree._Element, name: str) -> str | None:
    element = parent.find(f"{_CAP}{name}")
    return (text_of(element) or None) if element is not None else None


def _name(alert: etree._Element, name: str) -> str:
    """CAP 1.2, 3.2.1: neither spaces nor commas nor < nor &, so that `references` can be read."""
    text = _text(alert, name) or ""
    if not 1 <= len(text) <= IDENTIFIER_CHARS_MAX or _UNFIT.search(text):
        expected = f"1 to {IDENTIFIER_CHARS_MAX} characters without spaces, commas, < and &"
        raise CapRefused("meaning", name, expected, brief(text), _line(alert.find(f"{_CAP}{name}")))
    return text


def _line(element: etree._Element | None) -> int | None:
    return None if element is None else element.sourceline


def _moment_ms(text: str | None, name: str) -> int:
    """Raises ValueError, also for a time within hours of the calendar's ends, which cannot be written in Beijing's."""
    time_ms = event_time_ms(text, name)
    if event_time_ms(cap_time(time_ms), name) != time_ms:
        raise ValueError(f"{name} must have a date in Beijing, got {text}")
    return time_ms


def _time_ms(parent: etree._Element, name: str, path: str) -> int:
    text = _text(parent, name)
    try:
        return _moment_ms(text, name)
    except ValueError:
        raise CapRefused("meaning", path, CAP_TIME, brief(text), _line(parent.find(f"{_CAP}{name}"))) from None


def _optional_time_ms(info: etree._Element, name: str) -> int | None:
    return None if info.find(f"{_CAP}{name}") is None else _time_ms(info, name, f"info/{name}")


def _addresses(alert: etree._Element) -> tuple[str, ...]:
    """Names between spaces; in quotation marks those that hold one (CAP 1.2, 3.2.1)."""
    text = _text(alert, "addresses") or ""
    if _ADDRESS.sub("", text).strip():
        raise CapRefused("meaning", "addresses", 'names between spaces, "with quotation marks" if need be', brief(text))
    names = tuple((quoted or plain).strip() for quoted, plain in _ADDRESS.findall(text))
    if len(names) > ADDRESSES_MAX:
        raise CapRefused("meaning", "addresses", f"at most {ADDRESSES_MAX} names", f"{len(names)}")
    return names


def _references(alert: etree._Element) -> tuple[Reference, ...]:
    words = (_text(alert, "references") or "").split()
    if len(words) > REFERENCES_MAX:
        raise CapRefused("meaning", "references", f"at most {REFERENCES_MAX} messages", f"{len(words)}")
    return tuple(parse_reference(word) for word in words)


def parse_reference(text: str) -> Reference:
    """A message named as sender,identifier,sent. Raises CapRefused."""
    parts = text.split(",")
    if len(parts) == 3 and parts[0] and parts[1] and _SENT.fullmatch(parts[2]):
        try:
            return Reference(parts[0], parts[1], _moment_ms(parts[2], "sent"))
        except ValueError:
            pass  # refused below, like any other word that is no reference
    raise CapRefused("meaning", "references", "sender,identifier,sent between spaces", brief(text))


def _info(info: etree._Element) -> CapInfo:
    areas = info.findall(f"{_CAP}area")
    return CapInfo(
        language=_text(info, "language") or "en-US",
        event=_text(info, "event") or "",
        event_codes=_named_values(info, "eventCode"),
        onset_ms=_optional_time_ms(info, "onset"),
        expires_ms=_optional_time_ms(info, "expires"),
        sender_name=_text(info, "senderName"),
        headline=_text(info, "headline"),
        description=_text(info, "description"),
        instruction=_text(info, "instruction"),
        web=_text(info, "web"),
        contact=_text(info, "contact"),
        parameters=_named_values(info, "parameter"),
        photo_url=_photo_url(info),
        area=(_text(areas[0], "areaDesc") or "") if areas else "",
        circles=tuple(_circle(circle) for area in areas for circle in area.findall(f"{_CAP}circle")),
        polygon_count=sum(len(area.findall(f"{_CAP}polygon")) for area in areas),
        geocodes=tuple(code for area in areas for code in _named_values(area, "geocode")),
        categories=_texts(info, "category"),
        response_types=_texts(info, "responseType"),
        urgency=_text(info, "urgency") or "",
        severity=_text(info, "severity") or "",
        certainty=_text(info, "certainty") or "",
    )


def _texts(info: etree._Element, name: str) -> tuple[str, ...]:
    return tuple(text_of(element) for element in info.findall(f"{_CAP}{name}"))


def _named_values(parent: etree._Element, name: str) -> tuple[tuple[str, str], ...]:
    pairs = parent.findall(f"{_CAP}{name}")
    return tuple((_text(pair, "valueName") or "", _text(pair, "value") or "") for pair in pairs)


def _photo_url(info: etree._Element) -> str | None:
    for resource in info.findall(f"{_CAP}resource"):
        uri = _text(resource, "uri")
        if uri is not None and (_text(resource, "mimeType") or "").lower().startswith("image/"):
            return uri
    return None


def _circle(element: etree._Element) -> Circle:
    text = text_of(element)
    match = _CIRCLE.fullmatch(text)
    if match is not None:
        lat, lng, km = (float(number) for number in match.groups())
        if abs(lat) <= 90 and abs(lng) <= 180:
            return Circle(lat, lng, km)
    expected = '"lat,lng km" in degrees (WGS-84) and km, like "30.6,114.3 100"'
    raise CapRefused("meaning", "info/area/circle", expected, brief(text), element.sourceline)


# --- writing ----------------------------------------------------------------------------------------------------------


def xml_text(text: str) -> str:
    """Text with a gap shown for each thing that XML cannot hold: control characters, halves of surrogate pairs."""
    return _NOT_XML.sub("\ufffd", text)


def cap_time(time_ms: int) -> str:
    """A time as CAP writes it, in Beijing; what is below a second is cut off. Years have four digits, 0001 to 9999."""
    moment = _FIRST + timedelta(seconds=max(0, min(_SECONDS, time_ms // 1000 - _FIRST_S)))
    return moment.astimezone(BEIJING).isoformat()


def _decimal(number: float) -> str:
    """Without an exponent, to 1e-7: a centimetre of latitude, a tenth of a millimetre of a radius."""
    text = f"{number:.7f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def write_message(message: CapMessage) -> etree._Element:
    """The message as an `alert` element, which satisfies the schema and which `read_message` reads back."""
    alert = etree.Element(f"{_CAP}alert", nsmap={None: CAP_NAMESPACE})
    _add(alert, "identifier", message.identifier)
    _add(alert, "sender", message.sender)
    _add(alert, "sent", cap_time(message.sent_ms))
    _add(alert, "status", message.status)
    _add(alert, "msgType", message.kind)
    _add(alert, "scope", message.scope)
    _add(alert, "restriction", message.restriction)
    _add(alert, "addresses", " ".join(f'"{name}"' if " " in name else name for name in message.addresses) or None)
    _add(alert, "note", message.note)
    _add(alert, "references", " ".join(map(str, message.references)) or None)
    for info in message.infos:
        _add_info(alert, info)
    assert satisfies_schema(alert), f"CAP of {message.identifier!r} must satisfy its schema"
    return alert


def _add_info(alert: etree._Element, info: CapInfo) -> None:
    element = etree.SubElement(alert, f"{_CAP}info")
    _add(element, "language", info.language)
    for category in info.categories:
        _add(element, "category", category)
    _add(element, "event", info.event)
    for response_type in info.response_types:
        _add(element, "responseType", response_type)
    _add(element, "urgency", info.urgency)
    _add(element, "severity", info.severity)
    _add(element, "certainty", info.certainty)
    _add_pairs(element, "eventCode", info.event_codes)
    _add(element, "onset", None if info.onset_ms is None else cap_time(info.onset_ms))
    _add(element, "expires", None if info.expires_ms is None else cap_time(info.expires_ms))
    _add(element, "senderName", info.sender_name)
    _add(element, "headline", info.headline)
    _add(element, "description", info.description)
    _add(element, "instruction", info.instruction)
    _add(element, "web", info.web)
    _add(element, "contact", info.contact)
    _add_pairs(element, "parameter", info.parameters)
    if info.photo_url is not None:
        resource = etree.SubElement(element, f"{_CAP}resource")
        _add(resource, "resourceDesc", "photo")
        _add(resource, "mimeType", "image/jpeg")
        _add(resource, "uri", info.photo_url)
    if info.circles:
        area = etree.SubElement(element, f"{_CAP}area")
        _add(area, "areaDesc", info.area)
        for circle in info.circles:
            _add(area, "circle", str(circle))
        _add_pairs(area, "geocode", info.geocodes)


def _add(parent: etree._Element, name: str, text: str | None) -> None:
    if text is not None:
        etree.SubElement(parent, f"{_CAP}{name}").text = xml_text(text)


def _add_pairs(parent: etree._Element, name: str, pairs: Sequence[tuple[str, str]]) -> None:
    for value_name, value in pairs:
        pair = etree.SubElement(parent, f"{_CAP}{name}")
        _add(pair, "valueName", value_name)
        _add(pair, "value", value)


def message_bytes(message: CapMessage) -> bytes:
    """The message as a document, UTF-8."""
    return bytes(etree.tostring(write_message(message), encoding="utf-8", xml_declaration=True, pretty_print=True))
