"""The audit log: rows are chained, and whatever is done to them afterwards shows."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import orjson
import pytest
import redis

from flows.embedded import EmbeddedServer
from flows.log import LogId
from flows.metrics import Metrics
from flows.server import connect
from gateway.audit_log import (
    AUDIT_LOG_KEY,
    BEGUN,
    DONE,
    FAILED,
    REFUSED,
    TAIL_MISSING,
    AuditLog,
    Break,
    Head,
    HeadFile,
    last_rows,
    read_head,
    read_rows,
    verify,
)
from gateway.keys import Sealer
from tests.flows.waiting import memory_limit

Entry = tuple[LogId, dict[bytes, bytes]]


@pytest.fixture
def sealer(tmp_path: Path) -> Sealer:
    return Sealer.read(tmp_path / "gateway.key")


@pytest.fixture
def head_file(tmp_path: Path) -> HeadFile:
    return HeadFile(tmp_path / "audit-log.head")


@pytest.fixture
def log(client: redis.Redis, sealer: Sealer, head_file: HeadFile) -> AuditLog:
    return AuditLog(client, sealer, head_file, Metrics())


def fill(log: AuditLog, count: int = 6) -> None:
    for number in range(1, count + 1):
        log.append("officer:西湖 值班", "alert.publish", f"a{number}", DONE, {"revision": number})


def breaks_of(client: redis.Redis, sealer: Sealer | None, *heads: Head) -> list[Break]:
    following = read_head(client)[1]
    return verify(read_rows(client), sealer, heads, following - 1)[1]


def rewrite(client: redis.Redis, change: Callable[[list[Entry]], None]) -> None:
    """What somebody does who can write to the server: read it all, delete it, write it again as they like."""
    entries = list(read_rows(client))
    change(entries)
    client.delete(AUDIT_LOG_KEY)
    for number, (_, fields) in enumerate(entries, 1):
        client.xadd(AUDIT_LOG_KEY, cast(Any, fields), id=f"{number}-0")


def edited(fields: dict[bytes, bytes], **members: Any) -> dict[bytes, bytes]:
    """A row with other members and the hash that goes with them; its seal cannot be made."""
    row = orjson.dumps(orjson.loads(fields[b"row"]) | members)
    return fields | {b"row": row, b"hash": hashlib.sha256(row).hexdigest().encode()}


def test_rows_are_numbered_and_each_holds_the_hash_of_the_one_before(log: AuditLog, client: redis.Redis) -> None:
    first = log.append("officer:x", "alert.publish", "a1", BEGUN, {"level": "county"})
    second = log.append("officer:x", "alert.publish", "a1", DONE)
    assert (first.number, second.number) == (1, 2)
    assert first.previous == "0" * 64
    assert second.previous == first.hash
    assert last_rows(client, 10) == [first, second]
    assert last_rows(client, 1) == [second]


def test_an_untouched_log_has_no_breaks(
    log: AuditLog, client: redis.Redis, sealer: Sealer, head_file: HeadFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.audit_log.READ_COUNT", 5)  # so that it takes several reads
    fill(log, 23)
    kept = head_file.read()
    assert kept is not None and kept.number == 23
    assert verify(read_rows(client), sealer, [kept], 23) == (23, [])


def test_an_empty_log_is_whole(client: redis.Redis, sealer: Sealer) -> None:
    assert verify(read_rows(client), sealer, [], read_head(client)[1] - 1) == (0, [])


def test_a_row_that_was_edited_is_found(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log)

    def change(entries: list[Entry]) -> None:
        fields = entries[2][1]
        entries[2] = entries[2][0], fields | {b"row": fields[b"row"].replace(b'"a3"', b'"a9"')}

    rewrite(client, change)
    assert breaks_of(client, sealer) == [Break(3, "was edited: its hash is another one")]


def test_a_row_that_was_edited_together_with_its_hash_is_found(
    log: AuditLog, client: redis.Redis, sealer: Sealer
) -> None:
    fill(log)

    def change(entries: list[Entry]) -> None:
        entries[2] = entries[2][0], edited(entries[2][1], target="a9")

    rewrite(client, change)
    assert breaks_of(client, sealer) == [
        Break(3, "was not written by a gateway with this key file: its seal is wrong"),
        Break(4, "does not follow row 3 as it is now: one was exchanged"),
    ]
    assert breaks_of(client, None) == [Break(4, "does not follow row 3 as it is now: one was exchanged")]


def test_a_chain_that_was_rewritten_to_its_end_lacks_the_seals(
    log: AuditLog, client: redis.Redis, sealer: Sealer
) -> None:
    fill(log)

    def change(entries: list[Entry]) -> None:
        previous = b""
        for index in range(2, 6):
            more = {"target": "a9"} if index == 2 else {"previous": previous.decode()}
            entries[index] = entries[index][0], edited(entries[index][1], **more)
            previous = entries[index][1][b"hash"]

    rewrite(client, change)
    assert breaks_of(client, None) == []  # the chain alone is whole again: anybody can hash
    assert [broken.number for broken in breaks_of(client, sealer)] == [3, 4, 5, 6]


@pytest.mark.parametrize("gone", [1, 3, 5])
def test_a_row_that_was_deleted_is_missed(log: AuditLog, client: redis.Redis, sealer: Sealer, gone: int) -> None:
    fill(log)
    client.xdel(AUDIT_LOG_KEY, f"{gone}-0")
    assert breaks_of(client, sealer) == [Break(gone + 1, f"follows row {gone - 1}: {gone} missing")]


def test_a_row_that_was_deleted_is_missed_also_when_the_others_close_up(
    log: AuditLog, client: redis.Redis, sealer: Sealer
) -> None:
    fill(log)
    rewrite(client, lambda entries: entries.pop(2) and None)
    found = breaks_of(client, sealer)
    assert found[0] == Break(4, "stands at 3-0, where it was not written")
    assert Break(4, "follows row 2: 3 missing") in found


def test_rows_that_were_exchanged_are_found(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log)

    def change(entries: list[Entry]) -> None:
        entries[2], entries[3] = entries[3], entries[2]

    rewrite(client, change)
    found = breaks_of(client, sealer)
    assert Break(3, "stands behind row 4: rows were reordered or inserted") in found
    assert {broken.number for broken in found} >= {3, 4}


def test_a_row_that_was_inserted_is_found(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log)
    rewrite(client, lambda entries: entries.insert(2, ((0, 0), edited(entries[1][1], number=3, target="a9"))))
    found = breaks_of(client, sealer)
    assert Break(3, "was not written by a gateway with this key file: its seal is wrong") in found
    assert Break(3, "stands behind row 3: rows were reordered or inserted") in found


def test_a_row_that_was_written_twice_is_found(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log)
    rewrite(client, lambda entries: entries.insert(3, entries[2]))
    assert Break(3, "stands behind row 3: rows were reordered or inserted") in breaks_of(client, sealer)


def test_something_else_in_the_log_is_found(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log, 2)
    client.xadd(AUDIT_LOG_KEY, {"x": "y"}, id="3-0")
    assert breaks_of(client, sealer) == [
        Break(3, "is no row of the audit log"),
        Break(3, "was written, and is missing: the log ends with row 2"),
    ]


def test_an_end_that_was_deleted_shows_in_the_server_itself(log: AuditLog, client: redis.Redis, sealer: Sealer) -> None:
    fill(log)
    client.xdel(AUDIT_LOG_KEY, "5-0", "6-0")
    assert breaks_of(client, sealer) == [Break(6, "was written, and is missing: the log ends with row 4")]


def test_an_end_that_was_cut_off_without_a_trace_shows_against_a_head_kept_elsewhere(
    log: AuditLog, client: redis.Redis, sealer: Sealer, head_file: HeadFile
) -> None:
    fill(log)
    rewrite(client, lambda entries: entries.__delitem__(slice(4, None)))
    assert breaks_of(client, sealer) == []  # what is left is whole
    kept = head_file.read()
    assert kept is not None
    assert breaks_of(client, sealer, kept) == [Break(6, "was seen, and is missing: the end was cut off")]


def test_an_end_that_was_cut_off_and_grew_again_is_another_one(
    log: AuditLog, client: redis.Redis, sealer: Sealer, head_file: HeadFile
) -> None:
    fill(log)
    kept = head_file.read()
    assert kept is not None
    rewrite(client, lambda entries: entries.__delitem__(slice(4, None)))
    fill(AuditLog(client, sealer, None, Metrics()), 3)  # on a machine that has seen nothing
    assert breaks_of(client, sealer, kept) == [Break(6, "is another row than the one that was seen under this number")]


def test_a_gateway_that_finds_the_log_shorter_says_so_for_ever(
    log: AuditLog, client: redis.Redis, sealer: Sealer, head_file: HeadFile
) -> None:
    fill(log)
    kept = head_file.read()
    rewrite(client, lambda entries: entries.__delitem__(slice(4, None)))
    metrics = Metrics()
    started_again = AuditLog(client, sealer, head_file, metrics)
    row = started_again.append("officer:x", "alert.publish", "a7", DONE)
    assert [alarm.kind for alarm in metrics.alarms.current()] == ["audit_log"]
    assert row.number == 8
    said = last_rows(client, 2)[0]
    assert (said.number, said.action, said.outcome) == (7, TAIL_MISSING, FAILED)
    assert said.details["seen"] == str(kept)
    assert [broken.number for broken in breaks_of(client, sealer)] == [7, 7]


def test_a_log_that_was_deleted_is_missed_whole(
    log: AuditLog, client: redis.Redis, sealer: Sealer, head_file: HeadFile
) -> None:
    fill(log)
    client.delete(AUDIT_LOG_KEY)
    kept = head_file.read()
    assert kept is not None
    assert breaks_of(client, sealer, kept) == [Break(6, "was seen, and is missing: the end was cut off")]
    log.append("officer:x", "alert.publish", "a7", DONE)  # this process knows what it wrote last
    assert breaks_of(client, sealer) == [Break(7, "follows row 0: 1 to 6 missing")]


def test_several_gateways_append_to_one_chain(
    server: EmbeddedServer, client: redis.Redis, sealer: Sealer, head_file: HeadFile
) -> None:
    def gateway(name: str) -> None:
        own = connect(server.url)
        log = AuditLog(own, sealer, head_file, Metrics())
        for number in range(50):
            log.append(f"officer:{name}", "alert.publish", f"{name}{number}", DONE)
        own.close()

    threads = [threading.Thread(target=gateway, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    kept = head_file.read()
    assert kept is not None and kept.number == 150
    count, breaks = verify(read_rows(client), sealer, [kept], 150)
    assert (count, breaks) == (150, [])
    targets = [row.target for row in last_rows(client, 1000)]
    for name in "abc":  # nobody's rows are lost or out of order
        assert [target for target in targets if target[0] == name] == [f"{name}{number}" for number in range(50)]


def test_an_action_leaves_a_row_before_it_and_one_behind_it(log: AuditLog, client: redis.Redis) -> None:
    with log.recording("officer:x", "alert.close", "a1", {"revision": 2}) as result:
        assert [row.outcome for row in last_rows(client, 10)] == [BEGUN]
        result["desk_id"] = "17-0"
    assert [(row.outcome, row.details) for row in last_rows(client, 10)] == [
        (BEGUN, {"revision": 2}),
        (DONE, {"desk_id": "17-0"}),
    ]


def test_an_action_that_fails_says_so(log: AuditLog, client: redis.Redis) -> None:
    with pytest.raises(KeyError), log.recording("officer:x", "alert.close", "a1"):
        raise KeyError("a1")
    assert [(row.outcome, row.details) for row in last_rows(client, 1)] == [(FAILED, {"error": "KeyError"})]


def test_an_action_that_cannot_be_written_down_does_not_happen(log: AuditLog, client: redis.Redis) -> None:
    log.append("officer:x", "alert.publish", "a1", REFUSED)
    happened = []
    with (
        memory_limit(client, 1),
        pytest.raises(redis.OutOfMemoryError),
        log.recording("officer:x", "alert.publish", "a2"),
    ):
        happened.append("a2")
    assert happened == []
    assert len(last_rows(client, 10)) == 1


def test_an_action_is_not_done_while_the_server_is_away(own_server: EmbeddedServer, sealer: Sealer) -> None:
    client = connect(own_server.url)
    log = AuditLog(client, sealer, None, Metrics())
    own_server.close()
    happened = []
    with pytest.raises(redis.ConnectionError), log.recording("officer:x", "alert.publish", "a2"):
        happened.append("a2")
    assert happened == []
    client.close()


def test_details_are_few_and_texts_are_short(log: AuditLog, client: redis.Redis) -> None:
    with pytest.raises(ValueError, match="must be below 2048 bytes"):
        log.append("officer:x", "alert.publish", "a1", DONE, {"words": "x" * 3000})
    row = log.append("officer:x", "alert.publish", "\ud800" + "长" * 300, DONE)
    assert len(row.target) == 256
    assert last_rows(client, 1) == [row]


def test_a_head_file_only_rises(head_file: HeadFile) -> None:
    assert head_file.read() is None
    for number in (9, 10, 3):
        head_file.raise_to(Head(number, f"{number:064x}"))
    assert head_file.read() == Head(10, f"{10:064x}")


def test_a_head_file_that_cannot_be_written_stops_nobody(
    client: redis.Redis, sealer: Sealer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "audit-log.head"
    folder.mkdir()
    log = AuditLog(client, sealer, HeadFile(folder), Metrics())
    fill(log, 3)
    assert len(last_rows(client, 10)) == 3
    assert [record.message for record in caplog.records if "cannot be kept" in record.message]


@pytest.mark.parametrize("text", ["", "17", "17:abc", "x:" + "0" * 64, "17:" + "G" * 64])
def test_a_head_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="a head must be"):
        Head.parse(text)
