"""The alert desk and its relay on a real server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import redis

from flows import desk
from flows.alert_json import AlertRefused
from flows.desk import DESK_KEY, Desk, Relay, RelayThread, RevisionConflict, alert_key
from flows.log import FIRST, LogId, SettingsMismatch, ensure_settings, format_id, last_id, log_key, parse_id, relay_key
from flows.metrics import Metrics
from flows.server import LinkOpener
from flows.wire import decode_entry
from geoindex.entries import AUTO_CLOSE_MS, DEFAULT_SCHEDULE, Alert, AlertClose, AlertRevision, Settings

NOW_MS = round(time.time() * 1000)
ALERT = Alert("a17", 1, 30.0, 114.0, NOW_MS, DEFAULT_SCHEDULE, NOW_MS + 3_600_000)
SETTINGS = Settings(shard_count=4, partners=("amap",), hash_key=7)


@pytest.fixture
def alert_desk(client: redis.Redis) -> Desk:
    return Desk(client)


@pytest.fixture
def logs(client: redis.Redis) -> Settings:
    return ensure_settings(client, SETTINGS)


def events(client: redis.Redis, key: str) -> list[AlertRevision | AlertClose]:
    entries = cast(list[tuple[bytes, dict[bytes, bytes]]], client.xrange(key))
    decoded = [decode_entry(*next(iter(fields.items()))) for _, fields in entries]
    return [entry for entry in decoded if isinstance(entry, AlertRevision | AlertClose)]


# --- the desk ---------------------------------------------------------------------------------------------------------


def test_published_alert_stands_on_the_desk_with_revision_1(client: redis.Redis, alert_desk: Desk) -> None:
    began_ms = time.time() * 1000
    answer = alert_desk.publish(replace(ALERT, revision=9), {"headline": "Missing in Wuhan"})
    assert answer.revision == 1
    assert answer.desk_id == last_id(client, DESK_KEY)
    assert events(client, DESK_KEY) == [AlertRevision("publish", ALERT, (0, 0))]
    known = alert_desk.show("a17")
    assert known is not None
    assert (known.alert, known.outcome, known.content) == (ALERT, None, {"headline": "Missing in Wuhan"})
    assert abs(known.published_at_ms - began_ms) < 600_000


def test_edit_whose_answer_was_lost_is_neither_made_again_nor_refused(
    client: redis.Redis, alert_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute: Any = redis.client.Pipeline._execute_transaction

    def lost(pipeline: Any, *arguments: Any) -> Any:
        execute(pipeline, *arguments)
        pipeline.watching = True  # as it is when no reply has come
        raise redis.ConnectionError("the connection is closed")

    edits: list[Callable[[], object]] = [
        lambda: alert_desk.publish(ALERT),
        lambda: alert_desk.update("a17", {"lat": 31.0}),
        lambda: alert_desk.close("a17", "found"),
    ]
    with monkeypatch.context() as patched:
        patched.setattr(redis.client.Pipeline, "_execute_transaction", lost)
        for edit in edits:
            with pytest.raises(redis.ConnectionError, match="the connection is closed"):
                edit()
    assert [type(event).__name__ for event in events(client, DESK_KEY)] == [
        "AlertRevision",
        "AlertRevision",
        "AlertClose",
    ]


class Beside:
    """A companion that keeps a note of its own, and counts its looks."""

    def __init__(self, client: redis.Redis, refusal: Exception | None = None, disturbances: int = 0) -> None:
        self._client, self._refusal, self._disturbances = client, refusal, disturbances
        self.looks: list[int | None] = []

    def keys(self) -> tuple[str, ...]:
        return ("note:{desk}",)

    def look(self, known: desk.DeskAlert | None, now_ms: int) -> None:
        self.looks.append(None if known is None else known.alert.revision)
        if self._disturbances:
            self._disturbances -= 1
            self._client.set("note:{desk}", "changed by somebody else")
        if self._refusal is not None:
            raise self._refusal

    def write(self, pipeline: Any, state: desk.DeskAlert) -> None:
        pipeline.set("note:{desk}", f"revision {state.alert.revision}")


def test_companion_is_written_with_the_event_or_nothing_is(client: redis.Redis, alert_desk: Desk) -> None:
    alert_desk.publish(ALERT, companion=Beside(client))
    assert client.get("note:{desk}") == b"revision 1"
    with pytest.raises(KeyError, match="no"):
        alert_desk.update("a17", {"lat": 31.0}, companion=Beside(client, KeyError("no")))
    with pytest.raises(RevisionConflict):
        alert_desk.close("a17", "found", 9, companion=Beside(client))
    assert client.get("note:{desk}") == b"revision 1"
    assert len(events(client, DESK_KEY)) == 1


def test_companion_looks_again_when_what_it_saw_has_changed(client: redis.Redis, alert_desk: Desk) -> None:
    beside = Beside(client, disturbances=2)
    alert_desk.publish(ALERT, companion=beside)
    assert beside.looks == [None, None, None]
    assert client.get("note:{desk}") == b"revision 1"
    assert len(events(client, DESK_KEY)) == 1


def test_state_that_cannot_be_read_is_told_and_the_desk_goes_on(client: redis.Redis, alert_desk: Desk) -> None:
    client.rpush(alert_key("a17"), "no state of ours")
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        alert_desk.publish(ALERT)
    assert alert_desk.publish(replace(ALERT, alert_id="a18")).revision == 1, (
        "answers left unread would be taken for these"
    )


def test_id_that_was_published_before_is_refused(alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    with pytest.raises(AlertRefused, match="alert 'a17': was published before and is open; edit it, or take another"):
        alert_desk.publish(ALERT)
    alert_desk.close("a17", "found")
    with pytest.raises(AlertRefused, match="alert 'a17': was published before and was closed as found"):
        alert_desk.publish(ALERT)


def test_faulty_alert_is_refused(client: redis.Redis, alert_desk: Desk) -> None:
    with pytest.raises(AlertRefused, match="alert 'a17': lat must be from -90 to 90 degrees, got 91"):
        alert_desk.publish(replace(ALERT, lat=91.0))
    assert client.exists(DESK_KEY, alert_key("a17")) == 0


def test_update_changes_what_it_says_and_writes_a_complete_revision(client: redis.Redis, alert_desk: Desk) -> None:
    alert_desk.publish(ALERT, {"headline": "Missing", "contact": "110"})
    answer = alert_desk.update("a17", {"lat": 31.0}, content={"headline": "Seen in Jiujiang"})
    assert answer.revision == 2
    assert events(client, DESK_KEY)[1] == AlertRevision("update", replace(ALERT, lat=31.0, revision=2), (0, 0))
    known = alert_desk.show("a17")
    assert known is not None
    assert known.alert == replace(ALERT, lat=31.0, revision=2)
    assert known.content == {"headline": "Seen in Jiujiang", "contact": "110"}


def test_close_ends_the_alert_with_a_revision_of_its_own(client: redis.Redis, alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    assert alert_desk.close("a17", "found").revision == 2
    assert events(client, DESK_KEY)[1] == AlertClose("a17", 2, "found", (0, 0))
    known = alert_desk.show("a17")
    assert known is not None
    assert known.outcome == "found"


def test_closed_alert_stays_as_it_is(alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    alert_desk.close("a17", "false_report")
    with pytest.raises(AlertRefused, match="alert 'a17': was closed as false_report, and stays so"):
        alert_desk.update("a17", {"lat": 1.0})
    with pytest.raises(AlertRefused, match="alert 'a17': was closed as false_report, and stays so"):
        alert_desk.close("a17", "found")


def test_alert_left_open_for_30_days_past_its_expiry_is_closed(alert_desk: Desk) -> None:
    past_ms = NOW_MS - AUTO_CLOSE_MS - 600_000
    alert_desk.publish(replace(ALERT, missing_since_ms=past_ms - 1, expires_at_ms=past_ms))
    with pytest.raises(AlertRefused, match="alert 'a17': was closed as cancelled, and stays so"):
        alert_desk.update("a17", {"lat": 1.0})
    assert alert_desk.list(only_open=True) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda alert_desk: alert_desk.update("b", {"lat": 1.0}), "alert 'b': was never published"),
        (lambda alert_desk: alert_desk.close("b", "found"), "alert 'b': was never published"),
        (lambda alert_desk: alert_desk.close("a17", "lost"), "alert 'a17': outcome must be one of found, false_report"),
        (
            lambda alert_desk: alert_desk.update("a17", {"status": "exercise", "audience": ("amap",)}),
            "alert 'a17': status never changes: it is actual, got 'exercise'",
        ),
        (lambda alert_desk: alert_desk.update("a17", {"lng": 181.0}), "alert 'a17': lng must be from -180 to 180"),
        (lambda alert_desk: alert_desk.update("a17", {"expires_at_ms": 5}), "alert 'a17': expires_at must be after"),
    ],
)
def test_edit_that_cannot_be_is_refused_and_changes_nothing(alert_desk: Desk, change: Any, message: str) -> None:
    alert_desk.publish(ALERT)
    with pytest.raises(AlertRefused) as caught:
        change(alert_desk)
    assert message in str(caught.value)
    known = alert_desk.show("a17")
    assert known is not None
    assert (known.alert, known.outcome) == (ALERT, None)


def test_edit_of_an_older_revision_is_told_the_known_one(alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    assert alert_desk.update("a17", {"lat": 31.0}, expected_revision=1).revision == 2
    with pytest.raises(RevisionConflict) as caught:
        alert_desk.update("a17", {"lat": 32.0}, expected_revision=1)
    assert (caught.value.known, caught.value.expected) == (2, 1)
    assert str(caught.value) == "alert 'a17': the known revision is 2, the edit was made to 1"
    with pytest.raises(RevisionConflict):
        alert_desk.close("a17", "found", expected_revision=1)


def at_once(count: int, act: Any) -> list[object]:
    """What each of `count` threads, started at once, returned or raised."""
    barrier = threading.Barrier(count)
    results: list[object] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            results.append(act(number))
        except (RevisionConflict, AlertRefused) as error:
            results.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == count
    return results


def test_one_of_many_edits_to_the_same_revision_wins(client: redis.Redis, alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    results = at_once(8, lambda number: alert_desk.update("a17", {"lat": float(number)}, expected_revision=1))
    assert sum(isinstance(result, RevisionConflict) for result in results) == 7
    assert len(events(client, DESK_KEY)) == 2


def test_edits_to_whatever_is_there_all_win_one_after_another(client: redis.Redis, alert_desk: Desk) -> None:
    alert_desk.publish(ALERT)
    at_once(8, lambda number: alert_desk.update("a17", {"lat": float(number)}))
    revisions = [event.alert.revision for event in events(client, DESK_KEY) if isinstance(event, AlertRevision)]
    assert revisions == list(range(1, 10))


def test_one_of_many_publishers_of_an_id_wins(client: redis.Redis, alert_desk: Desk) -> None:
    results = at_once(6, lambda number: alert_desk.publish(replace(ALERT, lat=float(number))))
    assert sum(isinstance(result, AlertRefused) for result in results) == 5
    assert len(events(client, DESK_KEY)) == 1


def test_list_has_the_last_published_first(client: redis.Redis, alert_desk: Desk) -> None:
    for alert_id in ("a", "b", "c"):
        alert_desk.publish(replace(ALERT, alert_id=alert_id))
        known = alert_desk.show(alert_id)
        assert known is not None
        published_at_ms = known.published_at_ms
        while alert_desk.now_ms() <= published_at_ms:
            pass
    alert_desk.close("b", "found")
    assert [known.alert.alert_id for known in alert_desk.list()] == ["c", "b", "a"]
    assert [known.alert.alert_id for known in alert_desk.list(only_open=True)] == ["c", "a"]
    assert alert_desk.show("d") is None


# --- the relay --------------------------------------------------------------------------------------------------------


def test_relay_copies_the_desk_to_every_log_in_its_order(client: redis.Redis, alert_desk: Desk, logs: Settings) -> None:
    answers = [alert_desk.publish(ALERT), alert_desk.update("a17", {"lat": 31.0}), alert_desk.close("a17", "found")]
    ids = [answer.desk_id for answer in answers]
    assert Relay(client).copy_pending() == ids[2]
    for shard in range(4):
        assert events(client, log_key(shard)) == [
            AlertRevision("publish", ALERT, ids[0]),
            AlertRevision("update", replace(ALERT, lat=31.0, revision=2), ids[1]),
            AlertClose("a17", 3, "found", ids[2]),
        ]
        assert parse_id(cast(bytes, client.get(relay_key(shard)))) == ids[2]


def test_relay_copies_nothing_twice(client: redis.Redis, alert_desk: Desk, logs: Settings) -> None:
    alert_desk.publish(ALERT)
    for _ in range(3):
        Relay(client).copy_pending()
    assert [len(events(client, log_key(shard))) for shard in range(4)] == [1] * 4


def test_relay_that_has_nothing_to_copy_asks_two_questions_for_all_shards(
    client: redis.Redis, alert_desk: Desk, logs: Settings
) -> None:
    alert_desk.publish(ALERT)
    relay = Relay(client)
    copied = relay.copy_pending()
    client.config_resetstat()
    assert relay.copy_pending() == copied
    asked = {name: found["calls"] for name, found in cast(Any, client.info("commandstats")).items()}
    assert asked == {"cmdstat_xrevrange": 1, "cmdstat_mget": 1, "cmdstat_config|resetstat": 1}


def test_relay_copies_to_the_log_that_lacks_an_event_and_to_no_other(
    client: redis.Redis, alert_desk: Desk, logs: Settings
) -> None:
    first = alert_desk.publish(ALERT)
    relay = Relay(client)
    relay.copy_pending()
    second = alert_desk.close("a17", "found")
    relay._copy_to([2], FIRST)
    client.set(relay_key(1), format_id(FIRST))  # as if its server had lost what it knew: events come twice, with one id
    assert relay.copy_pending() == second.desk_id
    seen = [[event.desk_id for event in events(client, log_key(shard))] for shard in range(4)]
    both = [first.desk_id, second.desk_id]
    assert seen == [both, [first.desk_id, *both], both, both]


def test_relay_copies_more_than_fits_into_one_transaction(
    client: redis.Redis, alert_desk: Desk, logs: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk, "RELAY_EVENTS_MAX", 3)
    alert_desk.publish(ALERT)
    for number in range(10):
        alert_desk.update("a17", {"lat": float(number)})
    Relay(client).copy_pending()
    assert [len(events(client, log_key(shard))) for shard in range(4)] == [11] * 4


def test_relay_that_has_been_overtaken_copies_nothing_twice(
    client: redis.Redis, alert_desk: Desk, logs: Settings
) -> None:
    alert_desk.publish(ALERT)
    last = alert_desk.update("a17", {"lat": 31.0}).desk_id
    relay = Relay(client)
    assert relay.copy_pending() == last
    assert relay._copy_to(range(logs.shard_count), FIRST) == last, "seen: what it was before the other relay's copies"
    for shard in range(logs.shard_count):
        assert len(events(client, log_key(shard))) == 2
        assert client.get(relay_key(shard)) == format_id(last).encode()


def test_publication_takes_two_round_trips_and_its_copies_three(
    client: redis.Redis, alert_desk: Desk, logs: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay = Relay(client)
    alert_desk.publish(ALERT)
    relay.copy_pending()  # from now on connections are open, and the relay knows the logs
    connection_class: Any = cast(Any, client).connection_pool.connection_class
    sent: list[object] = []
    send = connection_class.send_packed_command

    def counted(connection: Any, command: Any, *arguments: Any, **options: Any) -> None:
        sent.append(command)
        send(connection, command, *arguments, **options)

    monkeypatch.setattr(connection_class, "send_packed_command", counted)
    alert_desk.publish(replace(ALERT, alert_id="a18"))
    assert len(sent) == 2
    relay.copy_pending()
    assert len(sent) == 2 + 3


def test_relay_that_died_between_shards_is_completed_by_the_next(
    client: redis.Redis, alert_desk: Desk, logs: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = alert_desk.publish(ALERT)
    copy_to = Relay._copy_to

    def dies_at_shard_2(relay: Relay, shards: list[int], seen: LogId) -> Any:
        if shards == [2]:
            raise redis.ConnectionError("died")
        return copy_to(relay, shards, seen)

    monkeypatch.setattr(Relay, "_copy_to", dies_at_shard_2)
    with pytest.raises(redis.ConnectionError):
        Relay(client, is_cluster=True).copy_pending()
    assert [len(events(client, log_key(shard))) for shard in range(4)] == [1, 1, 0, 0]
    assert not alert_desk.wait_copied(answer.desk_id, 0.0)
    monkeypatch.undo()
    Relay(client).copy_pending()
    assert [len(events(client, log_key(shard))) for shard in range(4)] == [1] * 4
    assert alert_desk.wait_copied(answer.desk_id, 0.0)


@pytest.mark.parametrize("is_cluster", [False, True])
def test_relays_that_run_at_once_leave_each_log_in_desk_order(
    client: redis.Redis, alert_desk: Desk, logs: Settings, is_cluster: bool
) -> None:
    alert_desk.publish(ALERT)
    for number in range(20):
        alert_desk.update("a17", {"lat": float(number)})
    at_once(4, lambda number: Relay(client, is_cluster=is_cluster).copy_pending())
    for shard in range(4):
        ids = [event.desk_id for event in events(client, log_key(shard))]
        assert ids == sorted(set(ids))
        assert len(ids) == 21


def test_desk_entry_that_is_no_event_is_passed_over(client: redis.Redis, alert_desk: Desk, logs: Settings) -> None:
    metrics = Metrics()
    client.xadd(DESK_KEY, {b"publish": b"\xff"})
    client.xadd(DESK_KEY, {b"tick": b"\x81\xa1v\x01"})
    client.xadd(DESK_KEY, {b"a": b"b", b"c": b"d"})
    answer = alert_desk.publish(ALERT)
    assert Relay(client, metrics).copy_pending() == answer.desk_id
    assert metrics.value("malformed_entries_total") == 3 * 4
    assert len(events(client, log_key(3))) == 1


def test_relay_without_logs_says_what_to_do(client: redis.Redis, alert_desk: Desk) -> None:
    answer = alert_desk.publish(ALERT)
    with pytest.raises(SettingsMismatch, match="there are no logs yet to copy alerts to; start `tuanyuan run` first"):
        Relay(client).copy_pending()
    assert not alert_desk.wait_copied(answer.desk_id, 0.0)


def test_waiting_for_copies_ends_when_they_are_in(client: redis.Redis, alert_desk: Desk, logs: Settings) -> None:
    answer = alert_desk.publish(ALERT)
    assert not alert_desk.wait_copied(answer.desk_id, 0.02)
    timer = threading.Timer(0.05, Relay(client).copy_pending)
    timer.start()
    assert alert_desk.wait_copied(answer.desk_id, 5.0)
    timer.join()


def test_relay_thread_copies_what_was_left_and_what_comes(
    client: redis.Redis, alert_desk: Desk, logs: Settings, open_link: LinkOpener
) -> None:
    before = alert_desk.publish(ALERT)
    relay = RelayThread(client, open_link)
    relay.start()
    assert alert_desk.wait_copied(before.desk_id, 5.0)
    for number in range(5):
        answer = alert_desk.update("a17", {"lat": float(number)})
        assert alert_desk.wait_copied(answer.desk_id, 5.0)
    client.client_kill_filter(_type="normal", skipme=True)
    answer = alert_desk.close("a17", "found")
    assert alert_desk.wait_copied(answer.desk_id, 5.0)
    started_s = time.monotonic()
    relay.stop()
    assert time.monotonic() - started_s < 0.5
    assert not any(thread.name == "desk-relay" for thread in threading.enumerate())


def test_relay_thread_waits_for_the_logs_to_begin(client: redis.Redis, alert_desk: Desk, open_link: LinkOpener) -> None:
    answer = alert_desk.publish(ALERT)
    relay = RelayThread(client, open_link)
    relay.start()
    ensure_settings(client, SETTINGS)
    assert alert_desk.wait_copied(answer.desk_id, 5.0)
    relay.stop()
