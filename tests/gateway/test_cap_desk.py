"""CAP over HTTP: messages publish, edit and close by way of the desk, once; alerts are read as messages."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from gateway.audit_log import last_rows
from gateway.cap import message_key, sender_name
from gateway.cap_messages import CapMessage, Reference, cap_time, message_bytes, read_message
from gateway.cap_xml import CAP_BYTES_MAX, parse_cap
from gateway.cases import read_case
from gateway.config import GatewayConfig
from gateway.runtime import Gateway
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS
from tests.gateway.cap_examples import FOLDER, cap_xml, info, parameter
from tests.gateway.conftest import Http, Keys
from tests.gateway.test_cap_signatures import SENDER as SIGNING_SENDER
from tests.gateway.test_cap_signatures import Signer, certified
from tests.gateway.test_cap_signatures import signer as signer

CAP = {"Content-Type": "application/cap+xml"}
WORDS = ("王小明", "红色外套", "文三路", "0571")


@pytest.fixture
def sent_ms() -> int:
    """A whole second ago: what CAP can say, and the desk's clock has seen."""
    return (round(time.time()) - 2) * 1000


def post(http: Http, key: str, body: bytes, **headers: str) -> Any:
    return http.post("/v1/cap", key=key, content=body, headers=CAP | headers)


def onset(sent_ms: int) -> str:
    return f"<onset>{cap_time(sent_ms - 600_000)}</onset>"


def alert_xml(sent_ms: int, **options: Any) -> bytes:
    options.setdefault("infos", [info(times=onset(sent_ms))])
    return cap_xml(sent_ms=sent_ms, **options)


def reference(body: bytes) -> str:
    return str(read_message(parse_cap(body)).reference)


def rows(client: redis.Redis, action: str) -> list[tuple[str, dict[str, Any]]]:
    return [(row.outcome, row.details) for row in last_rows(client, 1000) if row.action == action]


# --- the life of an alert ---------------------------------------------------------------------------------------------


def test_alert_update_and_cancel_publish_edit_and_close(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis, sent_ms: int
) -> None:
    first = alert_xml(sent_ms, infos=[info(times=onset(sent_ms), parameters=parameter("tuanyuan:age", "6"))])
    answer = post(http, keys.county, first)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    alert_id = said["alert_id"]
    assert (said["done"], said["status"], said["revision"], said["copied"]) == ("publish", "Actual", 1, True)
    assert said["url"] == f"https://alerts.example.org/a/{alert_id}"
    known = gateway.desk.show(alert_id)
    assert known is not None
    alert = known.alert
    assert (alert.lat, alert.lng, alert.missing_since_ms) == (30.2741, 120.1551, sent_ms - 600_000)
    assert (alert.schedule, alert.status, alert.audience) == (DEFAULT_SCHEDULE, "actual", None)
    case = read_case(client, alert_id)
    assert case is not None and case.words is not None
    assert (case.division, case.words.headline, case.words.text) == ("330106", "寻找王小明", "红色外套")
    assert (case.words.child.age, case.words.place, case.words.contact) == (6, "西湖区文三路", "0571-88001122")

    shapes = "<circle>30.3,120.2 25</circle>"
    second = alert_xml(
        sent_ms, identifier="18", kind="Update", references=reference(first), infos=[info(times="", shapes=shapes)]
    )
    said = post(http, keys.county, second).json()
    assert (said["done"], said["alert_id"], said["revision"]) == ("update", alert_id, 2)
    known = gateway.desk.show(alert_id)
    assert known is not None
    assert (known.alert.lat, known.alert.missing_since_ms) == (30.3, sent_ms - 600_000)
    case = read_case(client, alert_id)
    assert case is not None and case.words is not None
    assert case.words.child.age is None  # an Update stands for the whole message before it

    parameters = parameter("tuanyuan:outcome", "found") + parameter("tuanyuan:category", "lost")
    third = cap_xml(
        identifier="19",
        sent_ms=sent_ms,
        kind="Cancel",
        references=f"{reference(first)} {reference(second)} other,unknown,{cap_time(sent_ms)}",
        infos=[info(parameters=parameters)],
    )
    said = post(http, keys.county, third).json()
    assert (said["done"], said["alert_id"], said["revision"]) == ("close", alert_id, 3)
    known = gateway.desk.show(alert_id)
    assert known is not None and known.outcome == "found"
    case = read_case(client, alert_id)
    assert case is not None and case.category == "lost"
    assert [outcome for outcome, _ in rows(client, "cap.publish")] == ["begun", "done"]
    assert [outcome for outcome, _ in rows(client, "cap.close")] == ["begun", "done"]


def test_the_same_message_again_is_answered_as_the_first_time(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis, sent_ms: int
) -> None:
    body = alert_xml(sent_ms)
    first = post(http, keys.county, body)
    assert post(http, keys.county, body).json() == first.json()
    pretty = body.replace(b"<scope>", b"\n   <scope>")
    assert post(http, keys.county, pretty).json() == first.json()
    assert client.zcard("alerts:{desk}") == 1


def test_a_message_whose_answer_was_lost_is_not_done_again(
    http: Http, keys: Keys, client: redis.Redis, sent_ms: int
) -> None:
    body = alert_xml(sent_ms)
    first = post(http, keys.county, body).json()
    key = message_key(read_message(parse_cap(body)).reference)
    kept = client.get(key)
    assert isinstance(kept, bytes)
    begun = re.sub(rb'"answer":\{.*\}\}$', b'"answer":null}', kept)
    assert begun != kept
    client.set(key, begun)  # as it is between the event and its answer
    again = post(http, keys.county, body).json()
    assert (again["alert_id"], again["revision"]) == (first["alert_id"], 1)
    assert client.zcard("alerts:{desk}") == 1
    client.set(key, begun)
    assert post(http, keys.prefecture, body).status_code == 422  # its sender is the county's


def test_another_message_may_not_take_its_name(http: Http, keys: Keys, sent_ms: int) -> None:
    post(http, keys.county, alert_xml(sent_ms))
    other = post(http, keys.county, alert_xml(sent_ms, infos=[info(times=onset(sent_ms), headline="another")]))
    assert (other.status_code, other.json()["element"]) == (422, "identifier")


def test_a_message_that_the_desk_refused_may_come_corrected(
    http: Http, keys: Keys, client: redis.Redis, sent_ms: int
) -> None:
    def with_ring(km: int) -> bytes:
        schedule = parameter("tuanyuan:schedule", f"[[null, {km}]]")
        return alert_xml(sent_ms, infos=[info(times=onset(sent_ms), parameters=schedule)])

    refused = post(http, keys.county, with_ring(9))
    assert (refused.status_code, refused.json()["type"]) == (422, "urn:tuanyuan:problem:ring-too-small")
    assert rows(client, "cap.publish")[-1] == ("failed", {"error": "ring-too-small"})
    assert post(http, keys.county, with_ring(10)).json()["done"] == "publish"


@pytest.mark.parametrize("status", ["Test", "Draft", "System"])
def test_a_message_that_is_no_alert_is_checked_and_reaches_nobody(
    http: Http, keys: Keys, client: redis.Redis, sent_ms: int, status: str
) -> None:
    answer = post(http, keys.county, alert_xml(sent_ms, status=status))
    assert answer.status_code == 200
    assert (answer.json()["done"], answer.json()["status"], answer.json()["alert_id"]) == ("none", status, None)
    assert client.exists("desk") == 0
    ((outcome, details),) = rows(client, "cap.checked")
    assert (outcome, details["status"]) == ("done", status)
    wrong = alert_xml(sent_ms, status=status, infos=[info(parameters=parameter("tuanyuan:age", "old"))])
    assert post(http, keys.county, wrong).json()["element"] == "info/parameter"


def test_an_exercise_reaches_its_partners_and_no_public_page(
    http: Http, keys: Keys, gateway: Gateway, sent_ms: int
) -> None:
    scope = "<scope>Private</scope><addresses>amap</addresses>"
    said = post(http, keys.county, alert_xml(sent_ms, status="Exercise", scope=scope)).json()
    known = gateway.desk.show(said["alert_id"])
    assert known is not None
    assert (known.alert.status, known.alert.audience) == ("exercise", ("amap",))
    path = f"/v1/alerts/{said['alert_id']}/cap"
    assert http.get(path).status_code == 404
    assert http.get(path, key=keys.amap).status_code == 404
    read = read_message(parse_cap(http.get(path, key=keys.county).content))
    assert (read.status, read.scope, read.addresses) == ("Exercise", "Private", ("amap",))
    actual = alert_xml(sent_ms, identifier="18", kind="Update", references=str(read.reference))
    refused = post(http, keys.county, actual)
    assert (refused.status_code, refused.json()["element"]) == (422, "status")


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_refusal_says_where_and_what_and_leaves_a_row_without_words(
    http: Http, keys: Keys, client: redis.Redis, sent_ms: int
) -> None:
    answer = post(http, keys.county, alert_xml(sent_ms, infos=[info(shapes="<circle>文三路</circle>")]))
    assert answer.status_code == 422
    said = answer.json()
    assert said["type"] == "urn:tuanyuan:problem:cap-refused"
    assert (said["reason"], said["element"], said["came"]) == ("meaning", "info/area/circle", "'文三路'")
    assert "lat,lng km" in said["expected"]
    assert said["line"] > 1
    ((outcome, details),) = rows(client, "cap.message")
    assert outcome == "refused"
    assert details == {"reason": "meaning", "element": "info/area/circle", "line": said["line"]}


@pytest.mark.parametrize(
    ("file", "status", "reason"),
    [
        ("xee.cap", 400, "document_type"),
        ("child_abduction_cap11.cap", 422, "version"),
        ("invalid.cap", 422, "schema"),
        ("canada_signed.cap", 422, "signature"),
    ],
)
def test_real_messages_are_refused_over_http(
    http: Http, keys: Keys, client: redis.Redis, file: str, status: int, reason: str
) -> None:
    answer = post(http, keys.county, (FOLDER / file).read_bytes())
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)
    assert [details["reason"] for _, details in rows(client, "cap.message")] == [reason]


def test_bodies_of_another_kind_or_size_are_refused(http: Http, keys: Keys) -> None:
    wrong = http.post("/v1/cap", key=keys.county, content=b"{}", headers={"Content-Type": "application/json"})
    assert (wrong.status_code, wrong.json()["reason"]) == (415, "media_type")
    assert post(http, keys.county, b"x" * (CAP_BYTES_MAX + 1)).status_code == 413
    assert post(http, keys.county, b"").json()["reason"] == "not_xml"


def test_only_officers_with_a_desk_send_messages(http: Http, keys: Keys, client: redis.Redis, sent_ms: int) -> None:
    body = alert_xml(sent_ms)
    assert http.post("/v1/cap", content=body, headers=CAP).status_code == 401
    assert post(http, keys.amap, body).status_code == 403
    assert post(http, keys.station, body).status_code == 403
    assert client.exists("desk") == 0


def test_an_officer_sends_in_nobody_elses_name(http: Http, keys: Keys, sent_ms: int) -> None:
    assert sender_name("西湖 值班") == "西湖-值班"
    assert sender_name(" a,b  <c&d ") == "a-b-c-d"
    for sender in ("西湖-值班x", "杭州-值班@police.example.cn", "https://alerts.example.org"):
        answer = post(http, keys.county, alert_xml(sent_ms, sender=sender))
        assert (answer.status_code, answer.json()["element"]) == (422, "sender")
    assert post(http, keys.county, alert_xml(sent_ms, sender="西湖-值班")).status_code == 200


def test_another_jurisdiction_is_refused(http: Http, keys: Keys, client: redis.Redis, sent_ms: int) -> None:
    geocode = "<geocode><valueName>GB/T 2260</valueName><value>110101</value></geocode>"
    shapes = f"<circle>30,120 25</circle>{geocode}"
    answer = post(http, keys.county, alert_xml(sent_ms, infos=[info(times=onset(sent_ms), shapes=shapes)]))
    assert answer.status_code == 403
    foreign = post(
        http,
        keys.prefecture,
        alert_xml(sent_ms, sender="杭州-值班", infos=[info(times=onset(sent_ms))]),
    ).json()
    theirs = reference(http.get(f"/v1/alerts/{foreign['alert_id']}/cap").content)
    cancel = cap_xml(identifier="20", sent_ms=sent_ms, kind="Cancel", references=theirs, infos=[])
    assert post(http, keys.county, cancel).status_code == 403


def test_references_must_lead_to_one_alert(http: Http, keys: Keys, client: redis.Redis, sent_ms: int) -> None:
    first, second = alert_xml(sent_ms), alert_xml(sent_ms, identifier="18")
    post(http, keys.county, first)
    unknown = cap_xml(identifier="19", sent_ms=sent_ms, kind="Cancel", references=reference(second), infos=[])
    answer = post(http, keys.county, unknown)
    assert (answer.status_code, answer.json()["reason"]) == (404, "unknown")
    assert rows(client, "cap.message")[-1][1]["reason"] == "unknown"
    post(http, keys.county, second)
    both = f"{reference(first)} {reference(second)}"
    answer = post(
        http, keys.county, cap_xml(identifier="19", sent_ms=sent_ms, kind="Cancel", references=both, infos=[])
    )
    assert (answer.status_code, answer.json()["element"]) == (422, "references")


def test_no_key_but_the_case_keeps_words_of_a_message(
    http: Http, keys: Keys, client: redis.Redis, sent_ms: int
) -> None:
    said = post(http, keys.county, alert_xml(sent_ms)).json()
    post(http, keys.county, alert_xml(sent_ms, identifier="18", infos=[info(shapes="")]))
    for key in cast("list[bytes]", client.keys("*")):
        kind = cast(bytes, client.type(key))
        held = repr(client.xrange(key)).encode() if kind == b"stream" else cast(bytes, client.dump(key))
        if key.decode() != f"case:{{desk}}:{said['alert_id']}":
            for word in WORDS:
                assert word.encode() not in held, (key, word)


# --- signatures -------------------------------------------------------------------------------------------------------


class TestSigned:
    """A gateway that demands signatures."""

    @pytest.fixture
    def now_signer(self, signer: Signer) -> Signer:
        return certified(signer.key, datetime.now(UTC) - timedelta(days=1))

    @pytest.fixture
    def config(self, config: GatewayConfig, tmp_path: Path, now_signer: Signer) -> GatewayConfig:
        folder = tmp_path / "certificates"
        folder.mkdir()
        (folder / "police.pem").write_bytes(now_signer.pem)
        return replace(config, cap_certificates=folder)

    def test_a_signed_message_publishes_for_the_sender_that_its_certificate_names(
        self, http: Http, keys: Keys, now_signer: Signer, client: redis.Redis, sent_ms: int
    ) -> None:
        signed = now_signer.sign(alert_xml(sent_ms, sender=SIGNING_SENDER))
        said = post(http, keys.county, signed).json()
        assert (said["done"], said["signed_by"]) == ("publish", "CN=CAP 测试")
        assert rows(client, "cap.publish")[0][1]["signed_by"] == "CN=CAP 测试"

    def test_a_message_of_two_accounts_is_done_once(
        self, http: Http, keys: Keys, now_signer: Signer, client: redis.Redis, sent_ms: int
    ) -> None:
        body = now_signer.sign(alert_xml(sent_ms, sender=SIGNING_SENDER))
        first = post(http, keys.county, body).json()
        assert post(http, keys.prefecture, body).json() == first
        key = message_key(Reference(SIGNING_SENDER, "2026-330106-17", sent_ms))
        kept = client.get(key)
        assert isinstance(kept, bytes)
        client.set(key, re.sub(rb'"answer":\{.*\}\}$', b'"answer":null}', kept))
        begun = post(http, keys.prefecture, body)
        assert (begun.status_code, begun.json()["reason"]) == (409, "begun")
        assert client.zcard("alerts:{desk}") == 1

    def test_without_a_signature_nothing_is_published(
        self, http: Http, keys: Keys, client: redis.Redis, sent_ms: int
    ) -> None:
        answer = post(http, keys.county, alert_xml(sent_ms, sender=SIGNING_SENDER))
        assert (answer.status_code, answer.json()["reason"], answer.json()["came"]) == (422, "signature", "none")
        assert client.exists("desk") == 0

    def test_a_certificate_speaks_for_nobody_else(
        self, http: Http, keys: Keys, now_signer: Signer, sent_ms: int
    ) -> None:
        answer = post(http, keys.county, now_signer.sign(alert_xml(sent_ms)))
        assert (answer.json()["reason"], answer.json()["element"]) == ("signature", "sender")


# --- reading ----------------------------------------------------------------------------------------------------------


def test_an_alert_is_read_as_cap_and_afterwards_as_the_end_of_the_search(http: Http, keys: Keys, sent_ms: int) -> None:
    alert_id = post(http, keys.county, alert_xml(sent_ms)).json()["alert_id"]
    path = f"/v1/alerts/{alert_id}/cap"
    answer = http.get(path)
    assert answer.headers["content-type"] == "application/cap+xml"
    message = read_message(parse_cap(answer.content))
    assert (message.kind, message.sender, message.references) == ("Alert", "https://alerts.example.org", ())
    assert message.infos[0].headline == "寻找王小明"
    closed = http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found", "category": "killed"})
    assert closed.status_code == 200
    text = http.get(path).text
    ended = read_message(parse_cap(text.encode()))
    assert (ended.kind, ended.references) == ("Cancel", (message.reference,))
    assert not any(word in text for word in (*WORDS, "killed", "found"))
    assert http.get("/v1/alerts/a-nothing/cap").status_code == 404


def test_our_own_messages_can_be_referred_to(http: Http, keys: Keys, gateway: Gateway, sent_ms: int) -> None:
    alert_id = post(http, keys.county, alert_xml(sent_ms)).json()["alert_id"]
    ours = read_message(parse_cap(http.get(f"/v1/alerts/{alert_id}/cap").content))
    cancel = CapMessage("20", "西湖-值班", sent_ms, "Actual", "Cancel", "Public", references=(ours.reference,))
    assert post(http, keys.county, message_bytes(cancel)).json()["alert_id"] == alert_id
    known = gateway.desk.show(alert_id)
    assert known is not None and known.outcome == "cancelled"


def test_what_we_write_publishes_the_same_alert_elsewhere(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis, sent_ms: int
) -> None:
    """As another platform would, for whose sender there is an account here."""
    parameters = parameter("tuanyuan:name", "王小明") + parameter("tuanyuan:sex", "male")
    body = alert_xml(sent_ms, infos=[info(times=onset(sent_ms - HOUR_MS), parameters=parameters)])
    first_id = post(http, keys.county, body).json()["alert_id"]
    text = http.get(f"/v1/alerts/{first_id}/cap").text
    # It is an Update by now, as its ring grew: without references it stands for itself.
    text = re.sub(r"<references>.*</references>", "", text).replace("<msgType>Update", "<msgType>Alert")
    text = text.replace("<sender>https://alerts.example.org<", "<sender>西湖-值班<")
    second_id = post(http, keys.county, text.encode()).json()["alert_id"]
    assert second_id != first_id
    alerts = [gateway.desk.show(alert_id) for alert_id in (first_id, second_id)]
    cases = [read_case(client, alert_id) for alert_id in (first_id, second_id)]
    assert alerts[0] is not None and alerts[1] is not None and cases[0] is not None and cases[1] is not None
    assert cases[0].words == cases[1].words
    for name in ("lat", "lng", "missing_since_ms", "schedule", "expires_at_ms", "status", "audience"):
        assert getattr(alerts[0].alert, name) == getattr(alerts[1].alert, name), name


def test_the_name_of_a_message_is_its_sender_identifier_and_time() -> None:
    keys = {message_key(Reference(*parts)) for parts in [("a", "b", 0), ("a", "b", 1), ("b", "a", 0), ("a", "b", 0)]}
    assert len(keys) == 3
