"""XML of the Common Alerting Protocol 1.2: hostile bytes in, an element tree that satisfies the OASIS schema out.

    bytes ─size─> UTF-8 ─marks, namespaces─> prolog without DOCTYPE ─parser─> depth ─version─> schema ─> alert

What costs an attacker little and us much is turned away before the parser sees it: size, a DOCTYPE (and with it every
entity that XML does not define itself), another encoding than UTF-8 (which would hide a DOCTYPE), a flood of elements
or of namespaces. The parser itself loads nothing: no DTD, no entity, no network, no XInclude, no schema that a message
names.
"""

from __future__ import annotations

import re
import threading
from functools import cache
from importlib.resources import files

from lxml import etree

CAP_NAMESPACE = "urn:oasis:names:tc:emergency:cap:1.2"
SIGNATURE_NAMESPACE = "http://www.w3.org/2000/09/xmldsig#"
CAP_BYTES_MAX = 262_144
"""Ten times the largest real message that we have seen, which carries two signatures and 40 areas."""
MARKS_MAX = 20_000
"""Of "<" in a message: bounds elements, and with them the memory of the tree (about 200 bytes each)."""
NAMESPACES_MAX = 64
"""Of "xmlns": canonical XML costs elements times namespaces. Real messages have one to three."""
DEPTH_MAX = 16
"""CAP needs 5, an XML signature inside of it 8."""

_OLD_NAMESPACES = {
    "http://www.incident.com/cap/1.0": "1.0",
    "urn:oasis:names:tc:emergency:cap:1.0": "1.0",
    "urn:oasis:names:tc:emergency:cap:1.1": "1.1",
}
_ENCODING = re.compile(r"""<\?xml\b[^>]{0,200}?\bencoding\s{0,9}=\s{0,9}["']([A-Za-z0-9._-]{1,40})["']""")
_BRIEF_CHARS_MAX = 80


class CapRefused(ValueError):
    """A message that is not accepted: in which place, what was expected, what came.

    `reason`: `media_type`, `too_large`, `not_xml`, `document_type`, `version`, `schema`, `signature`, `meaning`,
    `unknown` (what it refers to), `begun` (by another account). `element`: a path of CAP's names, say
    "info/area/circle". `line`: where known, counted from 1.
    """

    def __init__(self, reason: str, element: str, expected: str, came: str, line: int | None = None) -> None:
        place = element if line is None else f"{element} (line {line})"
        super().__init__(f"{place}: expected {expected}, got {came}")
        self.reason = reason
        self.element = element
        self.expected = expected
        self.came = came
        self.line = line


def brief(text: str | None) -> str:
    """What came, fit for a message: quoted, cut, on one line."""
    if text is None:
        return "nothing"
    return repr(text if len(text) <= _BRIEF_CHARS_MAX else text[: _BRIEF_CHARS_MAX - 1] + "…")


def parse_cap(body: bytes) -> etree._Element:
    """The `alert` element of a message that satisfies the schema of CAP 1.2. Raises CapRefused."""
    root = parse_xml(body)
    _check_version(root)
    _check_schema(root)
    return root


def parse_xml(body: bytes) -> etree._Element:
    """The root of bytes that may come from anybody. Raises CapRefused."""
    if len(body) > CAP_BYTES_MAX:
        raise CapRefused("too_large", "message", f"at most {CAP_BYTES_MAX} bytes", f"{len(body)}")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CapRefused("not_xml", "message", "UTF-8", f"byte 0x{body[error.start]:02x} at {error.start}") from None
    encoding = _ENCODING.match(text)
    if encoding and encoding[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise CapRefused("not_xml", "message", "encoding UTF-8", encoding[1])
    for what, limit, count in (
        ("marks '<'", MARKS_MAX, text.count("<")),
        ("namespace declarations", NAMESPACES_MAX, text.count("xmlns")),
    ):
        if count > limit:
            raise CapRefused("too_large", "message", f"at most {limit} {what}", f"{count}")
    _refuse_document_type(text)
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
    )
    try:
        root = etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        raise CapRefused("not_xml", "message", "well-formed XML", error.msg or "other bytes", error.lineno) from None
    _check_depth(root)
    return root


_SPACE = re.compile(r"[ \t\r\n]*")


def _refuse_document_type(text: str) -> None:
    """A DOCTYPE can only stand ahead of the root, among comments, instructions and white space (XML 1.0, 2.8)."""
    position = 0
    while True:
        space = _SPACE.match(text, position)
        assert space is not None, "nothing is enough for it"
        position = space.end()
        if text.startswith("<?", position):
            end = text.find("?>", position) + 2
        elif text.startswith("<!--", position):
            end = text.find("-->", position + 4) + 3
        else:
            break
        if end <= position:
            return  # never closed: the parser says so
        position = end
    if text.startswith("<!", position):
        came = text[position : position + 40].partition("\n")[0]
        line = text.count("\n", 0, position) + 1
        expected = "XML without a document type and without entities"
        raise CapRefused("document_type", "message", expected, brief(came), line)


def _check_depth(root: etree._Element) -> None:
    elements, depth = [root], 1
    while elements:
        if depth > DEPTH_MAX:
            raise CapRefused("too_large", "message", f"elements at most {DEPTH_MAX} deep", "deeper ones")
        elements = [child for element in elements for child in element]
        depth += 1


def _check_version(root: etree._Element) -> None:
    name = etree.QName(root)
    if name.namespace == CAP_NAMESPACE and name.localname == "alert":
        return
    expected = f"'alert' of CAP 1.2 (namespace {CAP_NAMESPACE})"
    if name.namespace in _OLD_NAMESPACES and name.localname == "alert":
        came = f"CAP {_OLD_NAMESPACES[name.namespace]} (namespace {name.namespace})"
    else:
        came = f"{brief(name.localname)} of namespace {brief(name.namespace or '')}"
    raise CapRefused("version", "alert", expected, came, root.sourceline)


# --- the schema -------------------------------------------------------------------------------------------------------

_schema_lock = threading.Lock()
"""A validator keeps the log of its last run in itself."""


@cache
def _schema() -> etree.XMLSchema:
    source = files("gateway").joinpath("data/CAP-v1.2.xsd").read_bytes()
    return etree.XMLSchema(etree.fromstring(source, etree.XMLParser(resolve_entities=False, no_network=True)))


_NAMESPACE = re.compile(r"\{[^{}']*\}")
_EXPECTED = re.compile(r"Expected is (?:one of )?\( (.*) \)\.$")
_SET = re.compile(r"is not an element of the set (\{.*\})\.$")
_TYPE = re.compile(r"is not a valid value of the (?:local )?atomic type(?: 'xs:(\w+)')?\.$")
_TIME_ELEMENTS = ("sent", "effective", "onset", "expires")
_ELEMENT = re.compile(r"Element '([^']*)'")
CAP_TIME = "a time like 2026-05-01T18:00:00+08:00 (seconds, and an offset that is no letter)"


def _check_schema(root: etree._Element) -> None:
    schema = _schema()
    with _schema_lock:
        if schema.validate(root):
            return
        first = schema.error_log[0]
    raise _schema_refusal(_element_at(root, first.path), first.message)


def _element_at(root: etree._Element, path: str | None) -> etree._Element:
    """What a validator's path leads to; of an element with a prefix, which no path can say, the one around it."""
    while path:
        try:
            return root.xpath(path)[0]
        except (etree.XPathEvalError, IndexError):
            path = path.rpartition("/")[0]
    return root


def _schema_refusal(node: etree._Element, message: str) -> CapRefused:
    """The validator's first complaint about an element in our words."""
    message = _NAMESPACE.sub("", message.replace(f"{{{SIGNATURE_NAMESPACE}}}*", "Signature"))
    about = _ELEMENT.match(message)
    name = about[1] if about is not None else etree.QName(node).localname
    path = element_path(node)
    expected = message.partition(": ")[2] or message
    came = brief(text_of(node))
    if (wanted := _EXPECTED.search(message)) is not None:
        expected = wanted[1].replace(", ", " or ")
        if "Missing child element" in message:
            expected, came = f"element {expected} in it", "its end"
        else:
            parent = node.getparent() if etree.QName(node).localname == name else node
            path = element_path(node if parent is None else parent)
            expected, came = f"element {expected} here", f"element {brief(name)}"
    elif (values := _SET.search(message)) is not None:
        expected = "one of " + values[1].strip("{}").replace("'", "")
    elif name in _TIME_ELEMENTS and ("facet 'pattern'" in message or _TYPE.search(message)):
        expected = CAP_TIME
    elif (kind := _TYPE.search(message)) is not None:
        expected = f"a value of type {kind[1] or 'of CAP 1.2'}"
    elif len(expected) > 2 * _BRIEF_CHARS_MAX:
        expected = expected[: 2 * _BRIEF_CHARS_MAX] + "…"
    return CapRefused("schema", path, expected, came, node.sourceline)


def text_of(element: etree._Element) -> str:
    """An element's own text without what stands around it: comments and instructions inside do not cut it short."""
    return "".join(element.xpath("text()", smart_strings=False)).strip()


def element_path(element: etree._Element) -> str:
    """Where an element stands, in CAP's names, without the root: "info/area/circle"; the root itself: "alert"."""
    names = [etree.QName(node).localname for node in (element, *element.iterancestors())]
    return "/".join(reversed(names[:-1])) or names[-1]


def satisfies_schema(root: etree._Element) -> bool:
    """Whether a tree is CAP 1.2 by the letter of the schema."""
    with _schema_lock:
        return bool(_schema().validate(root))
