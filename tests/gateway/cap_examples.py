"""CAP messages for tests: one that publishes, to be changed in one place at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gateway.cap_messages import cap_time

FOLDER = Path(__file__).parent / "data" / "cap"
"""Messages of the real world."""
NOW_MS = 1_777_617_600_000
"""2026-05-01T14:40:00+08:00."""
SENDER = "西湖-值班@police.example.cn"
"""As the county's officer of `conftest` may call itself."""

INFO = """  <info>
    <language>{language}</language><category>Rescue</category><event>儿童失踪</event>
    <urgency>Immediate</urgency><severity>Severe</severity><certainty>Likely</certainty>
    {codes}
    {times}
    <headline>{headline}</headline><description>{description}</description><contact>0571-88001122</contact>
    {parameters}
    <area><areaDesc>西湖区文三路</areaDesc>{shapes}</area>
  </info>
"""
CODE = "<eventCode><valueName>SAME</valueName><value>CAE</value></eventCode>"
CIRCLE = "<circle>30.2741,120.1551 25</circle>"


def parameter(name: str, value: str) -> str:
    return f"<parameter><valueName>{name}</valueName><value>{value}</value></parameter>"


def info(
    *,
    language: str = "zh-CN",
    codes: str = CODE,
    times: str = f"<onset>{cap_time(NOW_MS - 600_000)}</onset>",
    headline: str = "寻找王小明",
    description: str = "红色外套",
    parameters: str = "",
    shapes: str = CIRCLE,
) -> str:
    return INFO.format(**locals())


def cap_xml(
    *,
    identifier: str = "2026-330106-17",
    sender: str = SENDER,
    sent_ms: int = NOW_MS,
    status: str = "Actual",
    kind: str = "Alert",
    scope: str = "<scope>Public</scope>",
    references: str = "",
    infos: Sequence[str] | None = None,
    head: str = '<?xml version="1.0" encoding="UTF-8"?>\n',
    tail: str = "",
) -> bytes:
    """A message as bytes; what is not given makes a sound one that publishes."""
    named = f"<references>{references}</references>" if references else ""
    body = "".join([info()] if infos is None else infos)
    return (
        f'{head}<alert xmlns="urn:oasis:names:tc:emergency:cap:1.2">\n  <identifier>{identifier}</identifier>'
        f"<sender>{sender}</sender><sent>{cap_time(sent_ms)}</sent><status>{status}</status>"
        f"<msgType>{kind}</msgType>{scope}{named}\n{body}{tail}</alert>\n"
    ).encode()
