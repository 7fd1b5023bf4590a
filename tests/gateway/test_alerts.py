"""The alert desk over HTTP: who may, what is told to whom, once, and with a row for everything."""

from __future__ import annotations

import threading
from typing import Any, cast

import msgpack
import pytest
import redis

from flows.desk import Desk
from flows.log import log_key, push_key
from flows.metrics import Metrics
from flows.tallies import tally_key
from gateway.accounts import Caller
from gateway.alert_models import CloseRequest, PublishRequest, moment
from gateway.cases import case_key, photo_key, read_case
from gateway.desk_service import DeskService
from gateway.errors import Problem
from gateway.handover import GROUP, handed_key
from gateway.runtime import Gateway
from geoindex.entries import DEFAULT_SCHEDULE, Alert, AlertClose, AlertRevision
from tests.gateway.conftest import HANGZHOU, XIHU, Http, Keys
from tests.gateway.desk import HOUR_MS, audited, desk_events, now_ms, published, wanted


def county_caller(gateway: Gateway, keys: Keys) -> Caller[Any]:
    caller = gateway.accounts.authenticate(keys.county)
    assert caller is not None
    return caller


# --- publishing -------------------------------------------------------------------------------------------------------


def test_published_alert_stands_in_every_log_when_the_answer_comes(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
) -> None:
    answer = http.post("/v1/alerts", key=keys.county, json=wanted())
    assert answer.status_code == 201
    receipt = answer.json()
    alert_id = receipt["alert_id"]
    assert answer.headers["location"] == f"/v1/alerts/{alert_id}"
    assert answer.headers["etag"] == '"1"'
    assert (receipt["event"], receipt["revision"], receipt["copied"]) == ("publish", 1, True)
    assert receipt["url"] == f"https://alerts.example.org/a/{alert_id}"
    assert [type(event).__name__ for event in desk_events(client)] == ["AlertRevision"]
    assert all(client.xlen(log_key(shard)) == 2 for shard in range(2))  # settings, and the alert
    known = gateway.desk.show(alert_id)
    assert known is not None
    assert (known.alert.schedule, known.alert.audience, known.content) == (DEFAULT_SCHEDULE, None, {})
    assert known.alert.expires_at_ms == known.alert.missing_since_ms + 72 * HOUR_MS


def test_words_of_a_child_are_in_the_case_and_in_no_stream(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found", "category": "killed"})
    case = read_case(client, alert_id)
    assert case is not None and case.words is not None
    assert (case.words.child.name, case.division, case.category) == ("王小明", XIHU, "killed")
    for key in cast("list[bytes]", client.keys("*")):
        held = client.xrange(key) if client.type(key) == b"stream" else client.dump(key)
        if key.decode() != case_key(alert_id):
            assert "王小明".encode() not in (held if isinstance(held, bytes) else b"".join(_parts(held))), key
            assert b"killed" not in repr(held).encode() or key == b"statistics:{desk}", key


def _parts(entries: Any) -> list[bytes]:
    return [part for _, fields in entries for pair in fields.items() for part in pair]


def test_superior_acts_for_its_parts_and_nobody_for_others(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    for key in (keys.prefecture, keys.province, keys.ministry):
        assert http.get(f"/v1/alerts/{alert_id}", key=key).status_code == 200
    foreign = published(http, keys.ministry, division="110101")
    before = len(audited(client))
    refused = [
        http.get(f"/v1/alerts/{foreign}", key=keys.county),
        http.patch(f"/v1/alerts/{foreign}", key=keys.county, json={"place": "x"}),
        http.post(f"/v1/alerts/{foreign}/close", key=keys.prefecture, json={"outcome": "found"}),
        http.put(f"/v1/alerts/{foreign}/category", key=keys.province, json={"category": None}),
        http.post("/v1/alerts", key=keys.county, json=wanted(division=HANGZHOU)),
        http.get(f"/v1/alerts?division={HANGZHOU}", key=keys.county),
    ]
    assert [answer.status_code for answer in refused] == [403] * 6
    assert audited(client)[before:] == [
        ("alert.view", foreign, "refused"),
        ("alert.update", foreign, "refused"),
        ("alert.close", foreign, "refused"),
        ("alert.category", foreign, "refused"),
        ("alert.publish", "-", "refused"),
        ("alert.list", HANGZHOU, "refused"),
    ]
    assert len(desk_events(client)) == 2


def test_whoever_is_below_county_level_or_no_officer_is_refused_and_written_down(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    answers = [http.post("/v1/alerts", key=key, json=wanted()) for key in (keys.station, keys.amap, keys.operator)]
    assert [answer.status_code for answer in answers] == [403] * 3
    assert "county level or above" in answers[0].json()["detail"]
    assert [outcome for _, _, outcome in audited(client)] == ["refused"] * 3
    assert http.post("/v1/alerts", json=wanted()).status_code == 401
    assert desk_events(client) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": [[1, 9.9], [None, 100]]}, "at least 10 km, got 9.9 km"),
        ({"audience": ["amap", "nobody"]}, "partners of this deployment, got 'nobody'"),
        ({"missing_since": "2026-05-01T14:30"}, "must say its offset"),
        ({"missing_since": "1777617000000"}, "must say its offset"),
        ({"missing_since": moment(now_ms() + HOUR_MS)}, "must not lie in the future"),
        ({"missing_since": moment(now_ms() - 80 * HOUR_MS)}, "expires_at must lie in the future"),
        ({"status": "exercise"}, "an exercise must name its partners"),
        ({"schedule": [[1, None], [None, 100]]}, "km in every step"),
        ({"schedule": [[2, 100], [1, 200], [None, 300]]}, "hours must rise"),
        ({"location": {"lat": 91, "lng": 0}}, "less than or equal to 90"),
        ({"location": {"lat": "30", "lng": 0}}, "valid number"),
        ({"child": {}, "text": " \u200b\n"}, "must say whom to look for"),
        ({"division": "001100"}, "province's digits"),
        ({"division": "330001"}, "a prefecture before a county"),
        ({"expires": "2026-05-01T14:30+08:00"}, "Extra inputs"),
    ],
)
def test_alert_that_cannot_be_is_refused_with_what_was_expected(
    http: Http, keys: Keys, client: redis.Redis, changes: dict[str, Any], expected: str
) -> None:
    answer = http.post("/v1/alerts", key=keys.ministry, json=wanted(**changes))
    assert answer.status_code == 422
    assert expected in answer.text
    assert desk_events(client) == []
    assert client.keys("case:*") == []


def test_exercise_with_a_small_ring_reaches_its_partners_and_never_becomes_actual(
    http: Http, keys: Keys, gateway: Gateway
) -> None:
    alert_id = published(http, keys.county, status="exercise", audience=["amap"], schedule=[[None, 1]])
    known = gateway.desk.show(alert_id)
    assert known is not None
    assert (known.alert.status, known.alert.audience) == ("exercise", ("amap",))
    answers = [
        http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json=body)
        for body in ({"status": "actual"}, {"audience": None})
    ]
    assert [answer.status_code for answer in answers] == [422, 422]


def test_nothing_happens_that_cannot_be_written_to_the_audit_log(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert_id = published(http, keys.county)

    def unwritable(*_: object, **__: object) -> None:
        raise redis.OutOfMemoryError("command not allowed when used memory > 'maxmemory'")

    monkeypatch.setattr(gateway.audit, "append", unwritable)
    answers = [
        http.post("/v1/alerts", key=keys.county, json=wanted()),
        http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json={"place": "x"}),
        http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found"}),
        http.delete(f"/v1/alerts/{alert_id}/photo", key=keys.county),
    ]
    assert [answer.status_code for answer in answers] == [503] * 4
    assert len(desk_events(client)) == 1


def test_nothing_is_acknowledged_by_a_server_that_may_lose_it(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.guards.SETTINGS_INTERVAL_S", 0.0)
    alert_id = published(http, keys.county)
    client.config_set("appendfsync", "everysec")
    try:
        gateway.guards.look()
        refused = [
            http.post("/v1/alerts", key=keys.county, json=wanted(place="elsewhere")),
            http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json={"location": {"lat": 30.0, "lng": 120.0}}),
            http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "cancelled"}),
        ]
    finally:
        client.config_set("appendfsync", "always")
    assert [answer.status_code for answer in refused] == [503] * 3
    assert all("appendfsync" in answer.json()["detail"] and "retry-after" in answer.headers for answer in refused)
    assert len(desk_events(client)) == 1
    gateway.guards.look()
    assert http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "cancelled"}).is_success


def test_every_action_has_a_row_before_and_a_row_after_it(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json={"place": "杭州东站", "revision": 9})
    http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json={"outcome": "found", "category": "drowned"})
    assert audited(client) == [
        ("alert.publish", alert_id, "begun"),
        ("alert.publish", alert_id, "done"),
        ("alert.update", alert_id, "begun"),
        ("alert.update", alert_id, "failed"),
        ("alert.close", alert_id, "begun"),
        ("alert.close", alert_id, "done"),
    ]
    rows = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange("audit-log:{desk}"))
    assert "王小明" not in repr(rows) and "drowned" not in repr(rows)


def test_answer_says_when_copies_are_still_missing_and_a_repetition_when_they_are_in(
    http: Http, keys: Keys, gateway: Gateway, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    body, headers = wanted(), {"Idempotency-Key": "k"}
    with monkeypatch.context() as patched:
        patched.setattr(gateway.guards, "appends_refused", lambda: "the clocks differ")
        answer = http.post("/v1/alerts", key=keys.county, json=body, headers=headers)
        assert (answer.status_code, answer.json()["copied"]) == (202, False)
        assert client.xlen(log_key(0)) == 1
    again = http.post("/v1/alerts", key=keys.county, json=body, headers=headers)
    assert (again.status_code, again.json()) == (201, answer.json() | {"copied": True})
    assert len(desk_events(client)) == 1


# --- once -------------------------------------------------------------------------------------------------------------


def test_request_repeated_under_its_key_is_answered_as_the_first_time_and_made_once(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    body, headers = wanted(), {"Idempotency-Key": "8e03978e"}
    first = http.post("/v1/alerts", key=keys.county, json=body, headers=headers)
    alert_id = first.json()["alert_id"]
    edit = {"place": "杭州东站"}
    edits = [
        http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json=edit, headers={"Idempotency-Key": "e"})
        for _ in range(3)
    ]
    again = http.post("/v1/alerts", key=keys.county, json=body, headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    closings = [
        http.post(
            f"/v1/alerts/{alert_id}/close",
            key=keys.county,
            json={"outcome": "found"},
            headers={"Idempotency-Key": "c"},
        )
        for _ in range(3)
    ]
    for answers in (edits, closings):
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len({answer.text for answer in answers}) == 1
    assert [type(event).__name__ for event in desk_events(client)] == ["AlertRevision", "AlertRevision", "AlertClose"]


def test_other_request_under_the_same_key_is_refused_and_other_officers_keys_are_their_own(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    headers = {"Idempotency-Key": "k"}
    assert http.post("/v1/alerts", key=keys.county, json=wanted(), headers=headers).status_code == 201
    other = http.post("/v1/alerts", key=keys.county, json=wanted(place="elsewhere"), headers=headers)
    assert (other.status_code, other.json()["type"]) == (422, "urn:tuanyuan:problem:idempotency-key-reused")
    assert http.post("/v1/alerts", key=keys.prefecture, json=wanted(), headers=headers).status_code == 201
    assert len(desk_events(client)) == 2


def test_equal_publication_without_a_key_is_taken_for_a_repetition(http: Http, keys: Keys, client: redis.Redis) -> None:
    body = wanted()
    answers = [http.post("/v1/alerts", key=keys.county, json=body).json() for _ in range(2)]
    assert answers[0] == answers[1]
    assert len(desk_events(client)) == 1


def test_equal_publication_after_the_first_was_ended_is_another_alert(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    body = wanted()
    first = http.post("/v1/alerts", key=keys.county, json=body).json()["alert_id"]
    http.post(f"/v1/alerts/{first}/close", key=keys.county, json={"outcome": "cancelled"})
    second = http.post("/v1/alerts", key=keys.county, json=body).json()["alert_id"]
    assert second != first
    assert http.get(f"/v1/alerts/{second}", key=keys.county).json()["state"] == "open"


@pytest.mark.parametrize("after_the_event", [False, True])
def test_publication_that_a_crash_cut_off_is_finished_by_its_repetition(
    http: Http, gateway: Gateway, keys: Keys, client: redis.Redis, after_the_event: bool
) -> None:
    service, caller = DeskService(gateway), county_caller(gateway, keys)
    request = PublishRequest.model_validate(wanted())
    publish = gateway.desk.publish

    class Crash(BaseException):
        pass

    def crashing(*arguments: Any, **named: Any) -> Any:
        if after_the_event:
            publish(*arguments, **named)
        raise Crash

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(gateway.desk, "publish", crashing)
        with pytest.raises(Crash):
            service.publish(caller, request, "k")
    assert len(desk_events(client)) == int(after_the_event)
    receipt = service.publish(caller, request, "k")
    assert (receipt.revision, receipt.copied) == (1, True)
    assert [cast(AlertRevision, event).alert.alert_id for event in desk_events(client)] == [receipt.alert_id]
    assert service.publish(caller, request, "k") == receipt
    assert cast("dict[bytes, bytes]", client.hgetall("statistics:{desk}")).popitem()[1] == b"1"


def test_requests_under_one_key_that_run_at_once_make_one_event(
    gateway: Gateway, keys: Keys, client: redis.Redis
) -> None:
    service, caller = DeskService(gateway), county_caller(gateway, keys)
    request = PublishRequest.model_validate(wanted())
    answers: list[Any] = []
    barrier = threading.Barrier(6)

    def publish() -> None:
        barrier.wait()
        answers.append(service.publish(caller, request, "k"))

    threads = [threading.Thread(target=publish) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6 and len({answer.alert_id for answer in answers}) == 1
    assert len(desk_events(client)) == 1


# --- editing ----------------------------------------------------------------------------------------------------------


def test_edit_changes_what_it_names_and_null_is_the_default_again(
    http: Http, keys: Keys, client: redis.Redis, gateway: Gateway
) -> None:
    alert_id = published(http, keys.county, schedule=[[None, 50]], audience=["amap"])
    edit = {
        "location": {"lat": 30.3, "lng": 120.2},
        "schedule": None,
        "audience": None,
        "child": {"age": None, "clothes": "蓝色"},
        "text": None,
    }
    answer = http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json=edit, headers={"If-Match": '"1"'})
    assert (answer.status_code, answer.json()["revision"], answer.headers["etag"]) == (200, 2, '"2"')
    known, case = gateway.desk.show(alert_id), read_case(client, alert_id)
    assert known is not None and case is not None and case.words is not None
    assert (known.alert.lat, known.alert.schedule, known.alert.audience) == (30.3, DEFAULT_SCHEDULE, None)
    child = case.words.child
    assert (child.name, child.age, child.clothes, case.words.text, case.words.place) == (
        "王小明",
        None,
        "蓝色",
        "",
        "文三路",
    )


def test_edit_of_words_alone_is_a_revision_and_one_that_changes_nothing_is_none(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county)
    for event in ("update", "none", "none"):
        answer = http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json={"place": "杭州东站"})
        assert (answer.json()["event"], answer.json()["revision"]) == (event, 2)
    assert len(desk_events(client)) == 2


def test_losing_edit_is_told_so_as_it_asked(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    path = f"/v1/alerts/{alert_id}"
    assert http.patch(path, key=keys.county, json={"place": "a"}).status_code == 200
    stale = [
        http.patch(path, key=keys.county, json={"place": "b"}, headers={"If-Match": '"1"'}),
        http.patch(path, key=keys.county, json={"place": "b", "revision": 1}),
        http.post(f"{path}/close", key=keys.county, json={"outcome": "found"}, headers={"If-Match": '"1"'}),
        http.post(f"{path}/close", key=keys.county, json={"outcome": "found", "revision": 1}),
    ]
    assert [answer.status_code for answer in stale] == [412, 409, 412, 409]
    assert {answer.json()["known_revision"] for answer in stale} == {2}
    assert http.patch(path, key=keys.county, json={"place": "b"}, headers={"If-Match": "x"}).status_code == 400
    assert len(desk_events(client)) == 2


def test_alert_that_never_was_or_was_closed_cannot_be_edited(http: Http, keys: Keys) -> None:
    assert http.patch("/v1/alerts/a-never", key=keys.ministry, json={"place": "x"}).status_code == 404
    alert_id = published(http, keys.county)
    path = f"/v1/alerts/{alert_id}"
    assert http.post(f"{path}/close", key=keys.county, json={"outcome": "cancelled"}).status_code == 200
    answers = [
        http.patch(path, key=keys.county, json={"place": "x"}),
        http.post(f"{path}/close", key=keys.county, json={"outcome": "found"}),
        http.delete(f"{path}/photo", key=keys.county),
    ]
    assert [answer.status_code for answer in answers] == [409] * 3
    assert "was closed as cancelled, and stays so" in answers[0].json()["detail"]


@pytest.mark.parametrize(
    ("edits", "alarmed"),
    [
        ([{"lat": 30.28}, {"lat": 30.29}], False),
        ([{"lat": 30.28}, {"lat": 30.29}, {"lat": 30.30}], True),
        ([{"km": 90}, {"km": 80}, {"lat": 30.28}], True),
        ([{"km": 110}, {"km": 120}, {"km": 130}], False),
        ([{"lat": 31.0}], False),  # 81 km, of a ring of 100 km
        ([{"lat": 31.3}], True),  # 114 km
    ],
)
def test_ring_that_wanders_or_closes_in_raises_an_alarm(
    http: Http, keys: Keys, client: redis.Redis, metrics: Metrics, edits: list[dict[str, float]], alarmed: bool
) -> None:
    alert_id = published(http, keys.county, schedule=[[None, 100]])
    for edit in edits:
        body = (
            {"location": {"lat": edit["lat"], "lng": 120.1551}} if "lat" in edit else {"schedule": [[None, edit["km"]]]}
        )
        assert http.patch(f"/v1/alerts/{alert_id}", key=keys.county, json=body).status_code == 200
    alarms = [alarm for alarm in metrics.alarms.current() if alarm.kind == "alert_moved"]
    assert [alarm.source for alarm in alarms] == [alert_id] * alarmed
    assert (("alert.moved-often", alert_id, "done") in audited(client)) == alarmed


# --- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "category", "status"),
    [
        ("found", "killed", 200),
        ("found", "false_report_dispute", 200),
        ("found", None, 200),
        ("false_report", "false_report_dispute", 200),
        ("false_report", "lost", 422),
        ("cancelled", None, 200),
        ("cancelled", "lost", 422),
    ],
)
def test_category_belongs_to_its_outcome(
    http: Http, keys: Keys, outcome: str, category: str | None, status: int
) -> None:
    alert_id = published(http, keys.county)
    closing = {"outcome": outcome, "category": category}
    assert http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json=closing).status_code == status


def test_closing_tells_the_flow_the_outcome_and_nothing_of_the_category(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county)
    closing = {"outcome": "found", "category": "killed"}
    assert http.post(f"/v1/alerts/{alert_id}/close", key=keys.county, json=closing).status_code == 200
    assert desk_events(client)[-1] == AlertClose(alert_id, 2, "found", (0, 0))
    view = http.get(f"/v1/alerts/{alert_id}", key=keys.county).json()
    assert (view["state"], view["outcome"], view["category"], view["ring"]) == ("closed", "found", "killed", None)


def test_category_can_be_said_and_corrected_later_and_the_statistics_follow(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county)
    path = f"/v1/alerts/{alert_id}"
    assert http.put(f"{path}/category", key=keys.county, json={"category": "lost"}).status_code == 409
    http.post(f"{path}/close", key=keys.county, json={"outcome": "found"})
    for category in ("lost", "ran_away", "ran_away"):
        assert http.put(f"{path}/category", key=keys.county, json={"category": category}).status_code == 200
    figures = http.get("/v1/statistics", key=keys.county).json()
    assert (figures["closed"], figures["found_not_said"]["count"]) == (1, 0)
    assert (figures["categories"]["lost"]["count"], figures["categories"]["ran_away"]["count"]) == (0, 1)
    assert http.put(f"{path}/category", key=keys.county, json={"category": "unheard_of"}).status_code == 422


# --- looking ----------------------------------------------------------------------------------------------------------


def test_alert_shows_ring_and_figures_per_partner_and_no_count_under_20(
    http: Http, keys: Keys, client: redis.Redis
) -> None:
    alert_id = published(http, keys.county, missing_since=moment(now_ms() - HOUR_MS * 3 // 2))
    for shard, told in ((0, {"amap": 1200, "baidu": 19}), (1, {"amap": 67})):
        fields = {"told": told, "resolved": {"amap": 21}, "at_ms": 1, "log_id": [1, 0]}
        client.hset(tally_key(shard), alert_id, cast(bytes, msgpack.packb(fields)))
    counts = {"delivered": 140, "acknowledged": 99}
    for what, count in counts.items():
        field = cast(bytes, msgpack.packb([alert_id, "amap", "alert", what]))
        client.hset(handed_key(0), cast(Any, field), str(count))
    view = http.get(f"/v1/alerts/{alert_id}", key=keys.county).json()
    assert view["partners"] == [
        {"partner": "amap", "told": 1200, "retracted": 40, "delivered": 140, "acknowledged": 90},
        {"partner": "baidu", "told": "<20", "retracted": "<20", "delivered": "<20", "acknowledged": "<20"},
    ]
    assert (view["ring"]["km"], view["ring"]["next_km"]) == (200, 300)
    assert view["ring"]["next_growth"].endswith("+08:00")
    assert view["child"]["name"] == "王小明"
    assert view["state"] == "open"


def test_partner_that_reads_its_queue_by_itself_is_shown_as_such(http: Http, keys: Keys, client: redis.Redis) -> None:
    alert_id = published(http, keys.county)
    client.xgroup_create(push_key(0, "baidu"), "their-own", mkstream=True)
    client.xgroup_create(push_key(0, "amap"), GROUP, mkstream=True)
    amap, baidu = http.get(f"/v1/alerts/{alert_id}", key=keys.county).json()["partners"]
    assert (amap["delivered"], baidu["delivered"], baidu["acknowledged"]) == ("<20", None, None)


def test_list_holds_the_jurisdictions_alerts_in_pages_last_first(http: Http, keys: Keys, gateway: Gateway) -> None:
    mine = [published(http, keys.county, place=str(number)) for number in range(5)]
    published(http, keys.ministry, division="110101")
    http.post(f"/v1/alerts/{mine[2]}/close", key=keys.county, json={"outcome": "found"})

    def ids(query: str, key: str = keys.county) -> list[str]:
        return [alert["alert_id"] for alert in http.get(f"/v1/alerts?{query}", key=key).json()["alerts"]]

    assert ids("") == [mine[4], mine[3], mine[1], mine[0]]
    assert ids("state=closed") == [mine[2]]
    assert ids("state=all&division=330106", keys.province) == mine[::-1]
    assert len(ids("", keys.ministry)) == 5
    first = http.get("/v1/alerts?limit=3", key=keys.county).json()
    second = http.get(f"/v1/alerts?limit=3&before={first['next']}", key=keys.county).json()
    assert [alert["alert_id"] for alert in first["alerts"] + second["alerts"]] == ids("")
    assert second["next"] is None
    assert http.get("/v1/alerts?before=a-never", key=keys.county).status_code == 404


def test_alert_of_the_terminal_is_the_ministrys(http: Http, keys: Keys, gateway: Gateway) -> None:
    at_ms = now_ms()
    gateway.desk.publish(
        Alert("t1", 1, 30.0, 120.0, at_ms, DEFAULT_SCHEDULE, at_ms + HOUR_MS), {"headline": "寻人", "contact": "110"}
    )
    assert http.get("/v1/alerts/t1", key=keys.province).status_code == 403
    view = http.get("/v1/alerts/t1", key=keys.ministry).json()
    assert (view["division"], view["headline"], view["contact"]) == (None, "寻人", "110")
    assert http.patch("/v1/alerts/t1", key=keys.ministry, json={"place": "x"}).status_code == 409
    moved = http.patch("/v1/alerts/t1", key=keys.ministry, json={"location": {"lat": 30.1, "lng": 120}})
    assert (moved.status_code, moved.json()["revision"]) == (200, 2)
    assert http.post("/v1/alerts/t1/close", key=keys.ministry, json={"outcome": "found"}).status_code == 200


# --- the service itself -----------------------------------------------------------------------------------------------


def test_alert_id_of_the_callers_choice_is_taken_once(gateway: Gateway, keys: Keys) -> None:
    service, caller = DeskService(gateway), county_caller(gateway, keys)
    request = PublishRequest.model_validate(wanted())
    assert service.publish(caller, request, "message-1", "cap-1").alert_id == "cap-1"
    assert service.publish(caller, request, "message-1", "cap-1").revision == 1
    with pytest.raises(Problem) as caught:
        service.publish(caller, request, "message-2", "cap-1")
    assert (caught.value.status_code, caught.value.type) == (409, "id-taken")


def test_closing_that_loses_to_another_is_refused_and_counts_nothing(
    gateway: Gateway, keys: Keys, client: redis.Redis
) -> None:
    service, caller = DeskService(gateway), county_caller(gateway, keys)
    alert_id = service.publish(caller, PublishRequest.model_validate(wanted())).alert_id
    Desk(client).close(alert_id, "cancelled")
    with pytest.raises(Problem) as caught:
        service.close(caller, alert_id, CloseRequest(outcome="found", category="lost"))
    assert (caught.value.status_code, caught.value.type) == (409, "closed")
    assert not any(b":found:" in field for field in cast("dict[bytes, bytes]", client.hgetall("statistics:{desk}")))
    assert client.exists(photo_key(alert_id)) == 0
