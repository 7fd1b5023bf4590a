"""Fuzzes everything between the bytes of a CAP message and what it asks of the desk, guided by coverage (atheris).

    python -m tests.fuzz.cap -runs=1000000            begins with the messages of the tests
    python -m tests.fuzz.cap -runs=1000000 corpus     keeps what reached new code in the folder corpus
    python -m tests.fuzz.cap crash-1234               one input again

Options are libFuzzer's (-help=1). An input may be refused by `CapRefused`, and in no other way. One that is read has to
be written again, as something that satisfies the schema and asks for the same.
"""

from __future__ import annotations

import random
import sys
import tempfile
from copy import deepcopy
from pathlib import Path

import atheris
from lxml import etree

with atheris.instrument_imports(include=["gateway.cap_xml", "gateway.cap_messages", "gateway.cap_orders"]):
    from gateway.cap_messages import message_bytes, read_message
    from gateway.cap_orders import read_order
    from gateway.cap_signatures import NO_CERTIFICATES, utc_now
    from gateway.cap_xml import CapRefused, parse_cap

ROOT = Path(__file__).resolve().parent.parent.parent
SEEDS = ROOT / "tests" / "gateway" / "data" / "cap"
NOW_MS = 1_777_617_600_000
INPUT_BYTES_MAX = 8_192

_SOUND = """<alert xmlns="urn:oasis:names:tc:emergency:cap:1.2"><identifier>17</identifier><sender>police</sender>
<sent>2026-05-01T14:40:00+08:00</sent><status>Actual</status><msgType>{kind}</msgType><scope>Private</scope>
<addresses>amap "Baidu Maps"</addresses><note>x</note><references>police,16,2026-05-01T14:00:00+08:00</references>
<info><language>zh-CN</language><category>Rescue</category><event>x</event><urgency>Immediate</urgency>
<severity>Severe</severity><certainty>Likely</certainty><eventCode><valueName>SAME</valueName><value>CAE</value></eventCode>
<onset>2026-05-01T14:30:00+08:00</onset><expires>2026-05-04T14:30:00+08:00</expires><headline>x</headline>
<description>x</description><contact>110</contact>
<parameter><valueName>tuanyuan:schedule</valueName><value>[[1, 100], [null, 500]]</value></parameter>
<parameter><valueName>tuanyuan:outcome</valueName><value>found</value></parameter>
<area><areaDesc>x</areaDesc><circle>30.2741,120.1551 100</circle>
<geocode><valueName>GB/T 2260</valueName><value>330106</value></geocode></area></info></alert>"""
_VOCABULARY = """
alert identifier sender sent status msgType source scope restriction addresses code note references incidents info
language category event responseType urgency severity certainty audience eventCode effective onset expires senderName
headline description instruction web contact parameter resource area resourceDesc mimeType size uri derefUri digest
areaDesc polygon circle geocode altitude ceiling valueName value Actual Exercise Test Alert Update Cancel Public
Private Restricted SAME CAE tuanyuan:schedule tuanyuan:outcome tuanyuan:text xmlns= <!DOCTYPE <!ENTITY <![CDATA[ ]]>
<!-- --> <?xml ?> &amp; &#x0; urn:oasis:names:tc:emergency:cap:1.2 http://www.w3.org/2000/09/xmldsig# Signature
2026-05-01T14:40:00+08:00 0001-01-01T00:00:00+14:00 9999-12-31T24:00:00-14:00 90,180 0.0000001 1e9 nan [[null,1]]
"""
_WORDS = _VOCABULARY.split()


def mutate(body: bytes, size_max: int, seed: int) -> bytes:
    """Mostly a change of the tree, so that the schema is passed often; else of the bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.8:
        try:
            root = etree.fromstring(body, etree.XMLParser(resolve_entities=False, no_network=True))
        except (etree.XMLSyntaxError, ValueError):
            return bytes(atheris.Mutate(body, size_max))
        elements = [element for element in root.iter() if isinstance(element.tag, str)]
        element, other = chance.choice(elements), chance.choice(elements)
        parent = element.getparent()
        action = chance.randrange(6)
        try:
            if action == 0 and parent is not None:
                parent.remove(element)
            elif action == 1 and parent is not None:
                element.addnext(deepcopy(element))
            elif action == 2:
                element.text = chance.choice(_WORDS)
            elif action == 3:
                element.text = (element.text or "") + chance.choice((" ", ",", "", "\n")) + chance.choice(_WORDS)
            elif action == 4:
                element.text = other.text
            else:
                element.text = atheris.Mutate((element.text or "").encode(), 200).decode(errors="replace")
        except ValueError:
            return body  # no XML can hold this text
        changed = bytes(etree.tostring(root, encoding="utf-8"))
        return changed if len(changed) <= size_max else body
    return bytes(atheris.Mutate(body, size_max))


def check(body: bytes) -> None:
    """One input. Whatever is raised is a fault."""
    try:
        NO_CERTIFICATES.verify(body, utc_now(NOW_MS))
        message = read_message(parse_cap(body))
    except CapRefused:
        return
    again = read_message(parse_cap(message_bytes(message)))
    assert again.references == message.references
    try:
        order = read_order(message, NOW_MS)
    except CapRefused:
        return
    if not any(info.polygon_count for info in message.infos) and all(info.circles for info in message.infos):
        assert read_order(again, NOW_MS) == order


def main() -> None:
    """Run libFuzzer with the options of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        dictionary = Path(folder) / "words"
        dictionary.write_text("".join('"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"\n' for word in _WORDS))
        seeds = Path(folder) / "seeds"
        seeds.mkdir()
        for kind in ("Alert", "Update", "Cancel"):
            (seeds / kind).write_text(_SOUND.format(kind=kind))
        given = sys.argv[1:]
        named = [Path(word) for word in given if not word.startswith("-")]
        corpora: list[str] = []
        if not any(path.is_file() for path in named):
            # New inputs go to the first folder; a throw-away one, unless one is named.
            kept = Path(folder) / "kept"
            kept.mkdir()
            corpora = [*([] if named else [str(kept)]), str(seeds), str(SEEDS)]
        options = [f"-dict={dictionary}", f"-max_len={INPUT_BYTES_MAX}", "-timeout=10", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *options, *given, *corpora], check, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
