"""CAP 1.2: hostile bytes, real messages, what a message means, and what an alert looks like as one."""

from __future__ import annotations

import contextlib
import http.server
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flows.desk import DeskAlert
from gateway.cap_alerts import AlertWords, Step, alert_id_of, alert_message, history, message_identifier
from gateway.cap_messages import (
    CapInfo,
    CapMessage,
    Circle,
    Reference,
    cap_time,
    message_bytes,
    read_message,
    write_message,
)
from gateway.cap_orders import CapOrder, read_order
from gateway.cap_xml import CAP_BYTES_MAX, CapRefused, parse_cap
from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertClose, AlertRevision
from tests.gateway.cap_examples import CIRCLE, CODE, FOLDER, NOW_MS, cap_xml, info, parameter

BASE_URL = "https://alerts.example.org"


def order_of(body: bytes, now_ms: int = NOW_MS) -> CapOrder:
    return read_order(read_message(parse_cap(body)), now_ms)


def refusal_of(body: bytes, now_ms: int = NOW_MS) -> CapRefused:
    with pytest.raises(CapRefused) as caught:
        order_of(body, now_ms)
    return caught.value


# --- messages of the real world ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "reason", "element", "expected", "came"),
    [
        ("child_abduction_cap11.cap", "version", "alert", "'alert' of CAP 1.2", "CAP 1.1"),
        ("earthquake.cap", "version", "alert", "'alert' of CAP 1.2", "CAP 1.1"),
        ("no_optional_fields.cap", "version", "alert", "'alert' of CAP 1.2", "CAP 1.1"),
        ("noaa_errors.cap", "version", "alert", "'alert' of CAP 1.2", "CAP 1.1"),
        ("amber.atom", "version", "alert", "'alert' of CAP 1.2", "'feed' of namespace 'http://www.w3.org/2005/Atom'"),
        ("invalid.cap", "schema", "alert", "element source or scope here", "element 'info'"),
        ("xee.cap", "document_type", "message", "without a document type", "'<!DOCTYPE alert"),
        ("australia.cap", "meaning", "info/eventCode", "SAME=CAE", "non-standard secondary event code=structure_fire"),
        ("canada.cap", "meaning", "info/eventCode", "SAME=CAE", "SAME=SVA"),
        ("canada_signed.cap", "meaning", "info/eventCode", "SAME=CAE", "SAME=WSW"),
    ],
)
def test_a_real_message_is_refused_for_the_right_reason(
    file: str, reason: str, element: str, expected: str, came: str
) -> None:
    refused = refusal_of((FOLDER / file).read_bytes())
    assert (refused.reason, refused.element) == (reason, element)
    assert expected in refused.expected
    assert came in refused.came
    assert str(refused).endswith(f"expected {refused.expected}, got {refused.came}")


def test_a_real_message_of_cap_1_2_is_read_whole() -> None:
    message = read_message(parse_cap((FOLDER / "canada.cap").read_bytes()))
    assert (message.identifier, message.sender) == ("2.49.0.1.124.6bddbc91.2012", "cap@ec.gc.ca")
    assert message.sent_ms == 1_336_000_864_000
    assert (message.status, message.kind, message.scope) == ("Actual", "Update", "Public")
    assert message.references[1] == Reference("cap@ec.gc.ca", "2.49.0.1.124.60f31a3a.2012", 1_335_995_721_000)
    english, french = message.infos
    assert (english.language, french.language) == ("en-CA", "fr-CA")
    assert french.headline == "veille d'orages violents"
    assert (english.polygon_count, english.circles) == (2, ())
    assert ("layer:EC-MSC-SMC:1.0:CLC", "041420") in english.geocodes


def test_empty_words_of_a_schema_are_named() -> None:
    body = (FOLDER / "noaa_errors.cap").read_bytes().replace(b"cap:1.1", b"cap:1.2")
    refused = refusal_of(body)
    assert (refused.reason, refused.element, refused.line) == ("schema", "info/urgency", 17)
    assert refused.expected == "one of Immediate, Expected, Future, Past, Unknown"
    assert refused.came == "''"


@pytest.mark.parametrize(
    ("wrong", "element", "expected"),
    [
        (cap_xml().replace(b"<status>Actual</status>", b""), "alert", "element status here"),
        (cap_xml().replace(b"+08:00</sent>", b"Z</sent>"), "sent", "a time like 2026-05-01T18:00:00+08:00"),
        (cap_xml(infos=[info(times="<onset>yesterday</onset>")]), "info/onset", "a time like"),
        (cap_xml(scope="<scope>Everybody</scope>"), "scope", "one of Public, Restricted, Private"),
        (cap_xml(infos=[info(shapes=f"{CIRCLE}<altitude>high</altitude>")]), "info/area/altitude", "of type decimal"),
        (cap_xml(infos=[info(language="not a language")]), "info/language", "of type language"),
        (cap_xml(tail="<extra xmlns='urn:x'/>"), "alert", "element info or Signature here"),
        (cap_xml(scope="<scope lang='zh'>Public</scope>"), "scope", "attribute 'lang'"),
    ],
)
def test_what_the_schema_does_not_allow_is_named(wrong: bytes, element: str, expected: str) -> None:
    refused = refusal_of(wrong)
    assert (refused.reason, refused.element) == ("schema", element)
    assert expected in refused.expected


# --- attacks ----------------------------------------------------------------------------------------------------------

LAUGHS = (
    "<!DOCTYPE a ["
    + "".join(
        f'<!ENTITY e{n} "{"&e" + str(n - 1) + ";" if n else "ha"}{"&e" + str(n - 1) + ";" if n else "ha"}">'
        for n in range(40)
    )
    + "]>"
)


@pytest.mark.parametrize(
    "body",
    [
        (FOLDER / "xee.cap").read_bytes(),
        cap_xml(head=LAUGHS, identifier="&e39;"),
        cap_xml(head=f"\ufeff<?xml version='1.0'?><!-- <a> --> <?x <!x> ?>\n\t{LAUGHS}"),
        cap_xml(head="<!DOCTYPE alert SYSTEM 'file:///etc/passwd'>"),
        cap_xml(head="<!doctype alert>"),
    ],
)
def test_a_document_type_is_refused_within_10_ms(body: bytes) -> None:
    assert refusal_of(body).reason in ("document_type", "not_xml")
    used_s = []
    for _ in range(5):
        begin_s = time.thread_time()
        refusal_of(body)
        used_s.append(time.thread_time() - begin_s)
    assert min(used_s) < 0.010


@pytest.mark.parametrize(
    ("body", "reason", "came"),
    [
        (b" " * (CAP_BYTES_MAX + 1), "too_large", str(CAP_BYTES_MAX + 1)),
        (cap_xml().decode().encode("utf-16"), "not_xml", "byte 0x"),
        (cap_xml(head="<?xml version='1.0' encoding='UTF-7'?>"), "not_xml", "UTF-7"),
        (cap_xml(head="<?xml version='1.0' encoding='utf-16'?>"), "not_xml", "utf-16"),
        (cap_xml(tail="<a/>" * 30_000), "too_large", "30"),
        (cap_xml(tail=" ".join(f"<a xmlns='u{n}'/>" for n in range(99))), "too_large", "100"),
        (cap_xml(tail="<a>" * 100 + "</a>" * 100), "too_large", "deeper"),
        (cap_xml(tail="<a>" * 9_000 + "</a>" * 9_000), "not_xml", "depth"),
        (cap_xml(identifier="&unknown;"), "not_xml", "Entity"),
        (cap_xml(identifier="\0"), "not_xml", ""),
        (b"", "not_xml", ""),
        (b"{}", "not_xml", ""),
        (b"<!-- never closed", "not_xml", ""),
    ],
)
def test_hostile_bytes_are_refused(body: bytes, reason: str, came: str) -> None:
    refused = refusal_of(body)
    assert refused.reason == reason
    assert came in refused.came


def test_the_most_that_a_message_may_hold_costs_little_memory_and_time() -> None:
    crowded = cap_xml(infos=[info() + "<info><category>x</category></info>" * 4_900])
    attributes = cap_xml(tail="<a " + " ".join(f"a{n}=''" for n in range(20_000)) + "/>")
    long_text = cap_xml(infos=[info(description="x" * 240_000)])
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin_s = time.thread_time()
    for body in (crowded, attributes):
        assert len(body) < CAP_BYTES_MAX
        assert refusal_of(body).reason == "schema"
    assert len(order_of(long_text).words.text) == 240_000
    assert time.thread_time() - begin_s < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 64 << 10


def test_comments_inside_an_element_do_not_cut_it_short() -> None:
    message = read_message(parse_cap(cap_xml(identifier="2026<!-- x -->-17<?x y?>b")))
    assert message.identifier == "2026-17b"


@pytest.fixture
def visited() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server of our own, and the paths that anybody asked it for."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", paths
        server.shutdown()
        thread.join()


def test_nothing_that_a_message_names_is_fetched(visited: tuple[str, list[str]]) -> None:
    url, paths = visited
    named = [
        cap_xml(head=f"<!DOCTYPE alert SYSTEM '{url}/dtd'>"),
        cap_xml(head=f"<?xml-stylesheet href='{url}/xsl' type='text/xsl'?>"),
        cap_xml(tail=f"<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='{url}/include'/>"),
        cap_xml().replace(
            b"<alert ",
            f"<alert xmlns:i='http://www.w3.org/2001/XMLSchema-instance' i:schemaLocation='urn:x {url}/xsd' ".encode(),
        ),
        cap_xml(
            infos=[
                info().replace(
                    "<area>",
                    f"<resource><resourceDesc>x</resourceDesc><mimeType>image/png</mimeType>"
                    f"<uri>{url}/photo</uri></resource><area>",
                )
            ]
        ),
    ]
    outcomes: list[str] = []
    for body in named:
        try:
            outcomes.append(order_of(body).action)
        except CapRefused as refused:
            outcomes.append(refused.reason)
    assert outcomes == ["document_type", "publish", "schema", "publish", "publish"]
    assert paths == []


# --- what a message means ---------------------------------------------------------------------------------------------


def test_an_alert_publishes_where_since_when_and_in_which_words() -> None:
    times = f"<onset>{cap_time(NOW_MS - HOUR_MS)}</onset><expires>{cap_time(NOW_MS + HOUR_MS)}</expires>"
    shapes = f"{CIRCLE}<geocode><valueName>GB/T 2260</valueName><value>330106</value></geocode>"
    order = order_of(cap_xml(infos=[info(times=times, shapes=shapes, parameters=parameter("tuanyuan:age", "6"))]))
    assert order == CapOrder(
        "publish",
        only_checked=False,
        circle=Circle(30.2741, 120.1551, 25.0),
        missing_since_ms=NOW_MS - HOUR_MS,
        expires_at_ms=NOW_MS + HOUR_MS,
        words=AlertWords(
            headline="寻找王小明", text="红色外套", place="西湖区文三路", contact="0571-88001122", age="6"
        ),
        division="330106",
        notes=("the circle's 25 km are not used: the ring follows the schedule of the platform",),
    )


def test_without_onset_the_child_is_missing_since_the_message_was_sent() -> None:
    order = order_of(cap_xml(infos=[info(times="")]))
    assert order.missing_since_ms == NOW_MS
    assert any("onset" in note for note in order.notes)


def test_an_update_without_onset_leaves_the_time_as_it_is() -> None:
    order = order_of(cap_xml(kind="Update", references=f"a,b,{cap_time(NOW_MS)}", infos=[info(times="")]))
    assert (order.action, order.missing_since_ms, order.schedule) == ("update", None, None)
    assert order.references == (Reference("a", "b", NOW_MS),)


def test_a_schedule_comes_in_a_parameter() -> None:
    order = order_of(cap_xml(infos=[info(parameters=parameter("tuanyuan:schedule", "[[0.5, 20], [null, 60]]"))]))
    assert order.schedule == ((0.5, 20.0), (None, 60.0))
    assert order.notes == ()


def test_languages_are_joined_chinese_first() -> None:
    english = info(language="en-US", headline="Looking for Wang Xiaoming", description="Red coat")
    order = order_of(cap_xml(infos=[english, info()]))
    assert order.words.headline == "寻找王小明 / Looking for Wang Xiaoming"
    assert order.words.text == "红色外套\n\nRed coat"
    assert order.words.contact == "0571-88001122"


@pytest.mark.parametrize("status", ["Test", "Draft", "System"])
def test_a_message_that_is_no_alert_is_only_checked(status: str) -> None:
    assert order_of(cap_xml(status=status)).only_checked
    assert refusal_of(cap_xml(status=status, infos=[info(codes="")])).element == "info/eventCode"


def test_an_exercise_names_its_partners() -> None:
    scope = '<scope>Private</scope><addresses>amap "Baidu Maps"</addresses>'
    order = order_of(cap_xml(status="Exercise", scope=scope))
    assert (order.status, order.audience, order.only_checked) == ("exercise", ("amap", "Baidu Maps"), False)
    assert refusal_of(cap_xml(status="Exercise")).expected == "Private, with the partners of the exercise in addresses"


def test_a_cancel_closes_as_cancelled_unless_it_says_how_the_search_ended() -> None:
    references = f"a,b,{cap_time(NOW_MS)} a,c,{cap_time(NOW_MS)}"
    plain = order_of(cap_xml(kind="Cancel", references=references, infos=[]))
    assert (plain.action, plain.outcome, plain.category, len(plain.references)) == ("close", "cancelled", None, 2)
    parameters = parameter("tuanyuan:outcome", "found") + parameter("tuanyuan:category", "lost")
    told = order_of(cap_xml(kind="Cancel", references=references, infos=[info(parameters=parameters)]))
    assert (told.outcome, told.category) == ("found", "lost")


@pytest.mark.parametrize(
    ("body", "element", "expected", "came"),
    [
        (cap_xml(kind="Ack"), "msgType", "Alert, Update or Cancel", "Ack"),
        (cap_xml(kind="Error"), "msgType", "Alert, Update or Cancel", "Error"),
        (cap_xml(kind="Update"), "references", "sender,identifier,sent", "none"),
        (cap_xml(kind="Cancel", infos=[]), "references", "sender,identifier,sent", "none"),
        (cap_xml(kind="Cancel", infos=[], references="x,90,180"), "references", "sender,identifier,sent", "'x,90,180'"),
        (cap_xml(references=f"a,b,{cap_time(0)}"), "references", "none in an Alert", "1"),
        (cap_xml(kind="Update", references="a,b"), "references", "sender,identifier,sent", "'a,b'"),
        (cap_xml(kind="Update", references="a,b,soon"), "references", "sender,identifier,sent", "'a,b,soon'"),
        (cap_xml(sent_ms=NOW_MS + 301_000), "sent", "a time up to now", ""),
        (cap_xml(identifier="a b"), "identifier", "without spaces", "'a b'"),
        (cap_xml(sender="a,b"), "sender", "without spaces", "'a,b'"),
        (cap_xml(infos=[]), "info", "where and whom", "none"),
        (cap_xml(infos=[info(codes="")]), "info/eventCode", "SAME=CAE", "none"),
        (cap_xml(infos=[info(), info(codes=CODE.replace("CAE", "TOR"))]), "info/eventCode", "SAME=CAE", "SAME=TOR"),
        (cap_xml(infos=[info(shapes="")]), "info/area/circle", "one circle", "none"),
        (cap_xml(infos=[info(shapes=CIRCLE * 2)]), "info/area/circle", "one circle", "2 circles"),
        (
            cap_xml(infos=[info(shapes="<polygon>1,1 1,2 2,2 1,1</polygon>")]),
            "info/area/circle",
            "one circle",
            "a polygon alone",
        ),
        (
            cap_xml(infos=[info(), info(shapes="<circle>30.3,120.1551 25</circle>")]),
            "info/area/circle",
            "the same in every info",
            "2 different",
        ),
        (cap_xml(infos=[info(shapes="<circle>91,0 1</circle>")]), "info/area/circle", "lat,lng km", "'91,0 1'"),
        (cap_xml(infos=[info(shapes="<circle>٣٠,120 1</circle>")]), "info/area/circle", "lat,lng km", "'٣٠,120 1'"),
        (cap_xml(infos=[info(shapes="<circle>nan,0 1</circle>")]), "info/area/circle", "lat,lng km", "'nan,0 1'"),
        (
            cap_xml(infos=[info(times=f"<onset>{cap_time(NOW_MS + 301_000)}</onset>")]),
            "info/onset",
            "a time up to now",
            "",
        ),
        (cap_xml(infos=[info(times=f"<expires>{cap_time(NOW_MS)}</expires>")]), "info/expires", "to come", ""),
        (
            cap_xml(scope="<scope>Restricted</scope><restriction>x</restriction>"),
            "scope",
            "Public, or Private",
            "Restr",
        ),
        (cap_xml(scope="<scope>Private</scope>"), "addresses", "partners", "none"),
        (cap_xml(scope="<scope>Public</scope><addresses>amap</addresses>"), "addresses", "none in a Public", "'amap'"),
        (cap_xml(scope='<scope>Private</scope><addresses>"a</addresses>'), "addresses", "quotation marks", "'\"a'"),
        (cap_xml(scope="<scope>Private</scope><addresses>a a</addresses>"), "addresses", "each partner once", "'a a'"),
        (
            cap_xml(infos=[info(parameters=parameter("tuanyuan:schedule", "[[1, 100]]"))]),
            "info/parameter",
            "tuanyuan:schedule like",
            "must be null",
        ),
        (
            cap_xml(infos=[info(parameters=parameter("tuanyuan:schedule", "[" * 5_000))]),
            "info/parameter",
            "tuanyuan:schedule like",
            "[[[",
        ),
        (
            cap_xml(
                kind="Cancel",
                references=f"a,b,{cap_time(0)}",
                infos=[info(parameters=parameter("tuanyuan:outcome", "x"))],
            ),
            "info/parameter",
            "found, false_report, cancelled",
            "'x'",
        ),
    ],
)
def test_what_cannot_be_an_alert_here_is_refused_by_name(body: bytes, element: str, expected: str, came: str) -> None:
    refused = refusal_of(body)
    assert (refused.reason, refused.element) == ("meaning", element)
    assert expected in refused.expected
    assert came in refused.came


# --- an alert as messages ---------------------------------------------------------------------------------------------

ALERT = Alert("a 17,<寻>", 1, 30.0, 114.0, NOW_MS, DEFAULT_SCHEDULE, NOW_MS + 72 * HOUR_MS)
WORDS = AlertWords(headline="寻找王小明", text="孩子可能乘坐公交车", place="文三路", name="王小明", sex="male", age="6")


def known_as(alert: Alert, outcome: str | None = None, changed_at_ms: int = NOW_MS) -> DeskAlert:
    return DeskAlert(alert, outcome, {}, NOW_MS, changed_at_ms)


def test_every_growth_of_a_ring_is_a_message_of_its_own_that_names_all_before_it() -> None:
    published_ms, edited_ms = NOW_MS + 600_000, NOW_MS + 90 * 60_000
    edited = replace(ALERT, revision=2, lat=31.0)
    events: list[tuple[AlertRevision | AlertClose, int]] = [
        (AlertRevision("publish", ALERT, (0, 0)), published_ms),
        (AlertRevision("update", edited, (0, 0)), edited_ms),
    ]
    past = history(known_as(edited), events, NOW_MS + 150 * 60_000)
    assert past.steps == (
        Step(1, 0, published_ms),
        Step(1, 1, NOW_MS + HOUR_MS),
        Step(2, 0, edited_ms),
        Step(2, 1, NOW_MS + 2 * HOUR_MS),
    )
    assert (past.ring_km, past.next_growth_ms) == (300.0, NOW_MS + 3 * HOUR_MS)
    message = alert_message(past, WORDS, BASE_URL, f"{BASE_URL}/a/x")
    assert (message.kind, message.identifier) == ("Update", "a%2017%2C%3C%E5%AF%BB%3E.2.1")
    assert [reference.sent_ms for reference in message.references] == [
        published_ms,
        NOW_MS + HOUR_MS,
        edited_ms,
    ]
    assert message.infos[0].circles == (Circle(31.0, 114.0, 300.0),)
    assert message.infos[0].description == "姓名：王小明；性别：男；年龄：6岁；最后出现地点：文三路\n孩子可能乘坐公交车"


def test_the_first_message_is_an_alert_and_reads_as_the_same_alert() -> None:
    past = history(known_as(ALERT), [(AlertRevision("publish", ALERT, (0, 0)), NOW_MS)], NOW_MS + 1000)
    body = message_bytes(alert_message(past, WORDS, BASE_URL, f"{BASE_URL}/a/x"))
    order = order_of(body, NOW_MS + 1000)
    assert (order.action, order.circle) == ("publish", Circle(30.0, 114.0, 100.0))
    assert (order.missing_since_ms, order.expires_at_ms) == (ALERT.missing_since_ms, ALERT.expires_at_ms)
    assert (order.schedule, order.audience, order.status) == (DEFAULT_SCHEDULE, None, "actual")
    assert order.words == WORDS


@pytest.mark.parametrize("outcome", ["found", "false_report", "cancelled"])
def test_the_end_is_a_cancel_that_says_neither_how_nor_who(outcome: str) -> None:
    closed = replace(ALERT, revision=2)
    events: list[tuple[AlertRevision | AlertClose, int]] = [
        (AlertRevision("publish", ALERT, (0, 0)), NOW_MS),
        (AlertClose(ALERT.alert_id, 2, outcome, (0, 0)), NOW_MS + 90 * 60_000),
    ]
    past = history(known_as(closed, outcome, NOW_MS + 90 * 60_000), events, NOW_MS + 10 * HOUR_MS)
    body = message_bytes(alert_message(past, WORDS, BASE_URL, f"{BASE_URL}/a/x"))
    assert order_of(body, NOW_MS + 10 * HOUR_MS).action == "close"
    text = body.decode()
    assert "The search has ended" in text
    for word in ("王小明", "文三路", "公交车", "circle", outcome if outcome != "cancelled" else "found"):
        assert word not in text
    message = read_message(parse_cap(body))
    assert [reference.identifier.rsplit(".", 2)[1:] for reference in message.references] == [["1", "0"], ["1", "1"]]


def test_the_end_is_the_same_bytes_whatever_the_outcome_was() -> None:
    bodies = set()
    for outcome in ("found", "false_report", "cancelled"):
        closed = replace(ALERT, revision=2)
        events: list[tuple[AlertRevision | AlertClose, int]] = [
            (AlertRevision("publish", ALERT, (0, 0)), NOW_MS),
            (AlertClose(ALERT.alert_id, 2, outcome, (0, 0)), NOW_MS + 5_000),
        ]
        past = history(known_as(closed, outcome, NOW_MS + 5_000), events, NOW_MS + HOUR_MS)
        bodies.add(message_bytes(alert_message(past, WORDS, BASE_URL, f"{BASE_URL}/a/x")))
    assert len(bodies) == 1


def test_an_alert_left_open_ends_by_itself_30_days_past_its_expiry() -> None:
    events: list[tuple[AlertRevision | AlertClose, int]] = [(AlertRevision("publish", ALERT, (0, 0)), NOW_MS)]
    end_ms = ALERT.expires_at_ms + AUTO_CLOSE_MS
    assert not history(known_as(ALERT), events, end_ms - 1).is_ended
    past = history(known_as(ALERT), events, end_ms)
    assert (past.is_ended, past.last) == (True, Step(2, 0, end_ms))


def test_a_ring_does_not_grow_once_the_alert_expired() -> None:
    short = replace(ALERT, expires_at_ms=NOW_MS + 90 * 60_000)
    past = history(known_as(short), [(AlertRevision("publish", short, (0, 0)), NOW_MS)], NOW_MS + 10 * HOUR_MS)
    assert [step.sent_ms for step in past.steps] == [NOW_MS, NOW_MS + HOUR_MS]
    assert past.next_growth_ms is None


def test_the_exercise_of_a_partner_is_private_and_says_that_it_is_none() -> None:
    exercise = replace(ALERT, status="exercise", audience=("amap", "Baidu Maps"))
    past = history(known_as(exercise), [(AlertRevision("publish", exercise, (0, 0)), NOW_MS)], NOW_MS)
    message = alert_message(past, WORDS, BASE_URL, f"{BASE_URL}/a/x")
    order = order_of(message_bytes(message))
    assert (order.status, order.audience) == ("exercise", ("amap", "Baidu Maps"))
    assert message.note == "演习，没有儿童失踪。Exercise: no child is missing."


@given(
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn"]), min_size=1, max_size=64),
    st.integers(1, 1 << 53),
)
def test_the_identifier_of_our_message_leads_back_to_its_alert(alert_id: str, revision: int) -> None:
    if not alert_id.isprintable():
        return
    identifier = message_identifier(alert_id, Step(revision, 3, 0))
    assert not set(identifier) & set(" ,<&")
    assert alert_id_of(identifier) == alert_id


@pytest.mark.parametrize("identifier", ["", "a17", "a17.1", "a17.x.0", ".1.0", "%FF.1.0", "%00.1.0", "a17.1.²"])
def test_an_identifier_that_is_not_ours_leads_nowhere(identifier: str) -> None:
    assert alert_id_of(identifier) is None


def test_times_that_cap_cannot_write_are_written_as_the_nearest_that_it_can() -> None:
    assert cap_time(253_402_300_800_000) == "9999-12-30T08:00:00+08:00"
    assert cap_time(-253_402_300_800_000) == "0001-01-02T08:00:00+08:00"


# --- round trips ------------------------------------------------------------------------------------------------------

names = st.text(
    st.characters(codec="utf-8", exclude_characters=' ,<&"', exclude_categories=["Cc", "Z"]), min_size=1
).map(lambda text: text.replace("\ufffe", "x").replace("\uffff", "x"))
texts = st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cn"]), min_size=1).map(
    str.strip
).filter(bool)
times = st.integers(0, 4_102_444_800).map(lambda seconds: seconds * 1000)
degrees = st.integers(-900_000_000, 900_000_000).map(lambda number: number / 1e7)
pairs = st.lists(st.tuples(names, names), max_size=3).map(tuple)
infos = st.builds(
    CapInfo,
    language=st.sampled_from(["zh-CN", "en-US", "ug-Arab-CN"]),
    event=names,
    event_codes=pairs,
    onset_ms=st.none() | times,
    expires_ms=st.none() | times,
    headline=texts,
    description=texts,
    instruction=texts,
    contact=texts,
    parameters=pairs,
    area=names,
    circles=st.lists(st.builds(Circle, degrees, degrees, st.integers(0, 99_999).map(float)), max_size=2).map(tuple),
)
references = st.lists(st.builds(Reference, names, names, times), max_size=3).map(tuple)
messages = st.builds(
    CapMessage,
    identifier=names,
    sender=names,
    sent_ms=times,
    status=st.sampled_from(["Actual", "Exercise", "System", "Test", "Draft"]),
    kind=st.sampled_from(["Alert", "Update", "Cancel", "Ack", "Error"]),
    scope=st.sampled_from(["Public", "Restricted", "Private"]),
    addresses=st.lists(names, max_size=3).map(tuple),
    references=references,
    infos=st.lists(infos, max_size=3).map(tuple),
    note=texts,
)


@settings(max_examples=150)
@given(messages)
def test_whatever_is_written_satisfies_the_schema_and_is_read_back(message: CapMessage) -> None:
    expected = replace(message, infos=tuple(info if info.circles else replace(info, area="") for info in message.infos))
    assert read_message(parse_cap(message_bytes(message))) == expected


@given(st.text())
def test_words_that_xml_cannot_hold_are_shown_as_gaps(text: str) -> None:
    message = read_message(
        write_message(CapMessage("a", "b", 0, "Actual", "Alert", "Public", note=f"x{text}\0\ud800x"))
    )
    assert message.note is not None
    assert message.note.endswith("\ufffd\ufffdx")


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2_000), st.integers(0, 40))
def test_bytes_that_were_damaged_are_read_or_refused_and_nothing_else(noise: bytes, at: int, cut: int) -> None:
    body = cap_xml()
    with contextlib.suppress(CapRefused):
        order_of(body[:at] + noise + body[at + cut :])


@pytest.mark.parametrize("sent", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_a_time_at_the_ends_of_the_calendar_is_refused(sent: str) -> None:
    written = cap_time(NOW_MS).encode()
    body = cap_xml(sent_ms=NOW_MS)
    assert body.count(written) >= 1
    with pytest.raises(CapRefused) as refusal:
        read_message(parse_cap(body.replace(written, sent.encode(), 1)))
    assert refusal.value.element == "sent"
