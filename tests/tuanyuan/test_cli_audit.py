"""`audit` and `dead-letters` as an operator meets them: one story on one server, then what each command said."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import redis

from flows.consumers import DELIVERIES_MAX, Consumer
from flows.embedded import EmbeddedServer
from flows.log import done_key, format_id, last_id, log_key, parse_id, push_key
from flows.server import connect
from tests.tuanyuan import Ran, compile_kernels, embedded_flow, run_all, wait_until

PINGS = [f"phone-{number}" for number in range(30)]
QUEUE = push_key(0, "amap")


def settle(client: redis.Redis) -> None:
    head = last_id(client, log_key(0))
    wait_until(lambda: (raw := client.get(done_key(0))) is not None and parse_id(raw) >= head)


def poison(client: redis.Redis) -> None:
    """The first push of amap is handed over again and again, and never acknowledged; then one comes that is none."""
    for _ in range(DELIVERIES_MAX + 1):
        Consumer(client, "amap", 1, "default", "dying").read(entries_max=1, block_s=0)
    last = last_id(client, QUEUE)
    client.xadd(QUEUE, {b"alert": b"\xff"}, id=format_id((last[0], last[1] + 1)))
    reader = Consumer(client, "amap", 1, "default", "reader")
    wait_until(lambda: not reader.acknowledge(reader.read(block_s=0)) and client.xlen("dead:{s0}:amap") == 2)
    client.xdel(QUEUE, format_id((last[0], last[1] + 1)))


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Ran]]:
    folder = tmp_path_factory.mktemp("audit")
    compile_kernels(folder)
    now_ms = round(time.time() * 1000)
    rows = "".join(f"{name},30.0,114.0,{now_ms},{('amap', 'baidu')[index % 2]}\n" for index, name in enumerate(PINGS))
    (folder / "pings.csv").write_text("device_id,lat,lng,observed_at,partner\n" + rows)
    said: dict[str, Ran] = {}

    def play(**commands: list[str]) -> None:
        ran = run_all(list(commands.values()), folder, TUANYUAN_VAR="v")
        said.update(zip(commands, ran, strict=True))

    options = ("--shard-count", "1", "--partner", "amap", "--partner", "baidu", "--checkpoint-interval", "0")
    with embedded_flow("v", *options, folder=folder):
        embedded = EmbeddedServer.find(folder / "v" / "valkey")
        assert embedded is not None
        client = connect(embedded.url)
        place = ["--lat", "30", "--lng", "114", "--missing-since", "now"]
        play(
            none=["dead-letters", "list"],
            none_json=["dead-letters", "list", "--json"],
            send=["send", "pings.csv"],
            publish=["alert", "publish", "a17", *place],
        )
        settle(client)
        play(
            close=["alert", "close", "a17", "--outcome", "found"],
            open=["alert", "publish", "b", *place],
        )
        settle(client)
        play(
            clean=["audit"],
            clean_json=["audit", "--json"],
            one=["audit", "--partner", "baidu", "--json"],
            nobody=["audit", "--partner", "nobody"],
            since=["audit", "--since", "soon"],
        )
        poison(client)
        play(
            list=["dead-letters", "list"],
            list_json=["dead-letters", "list", "amap", "--json"],
            list_other=["dead-letters", "list", "baidu", "--json"],
            list_nobody=["dead-letters", "list", "nobody"],
            replay_what=["dead-letters", "replay", "amap"],
            replay_unknown=["dead-letters", "replay", "amap", "0/1-1"],
        )
        dead, broken = (letter["letter"] for letter in said["list_json"].lines)
        play(
            replay=["dead-letters", "replay", "amap", dead],
            replayed=["dead-letters", "list", "--json"],
            pull=["pull", "amap"],
            drop=["dead-letters", "drop", "amap", broken, "--json"],
            after=["dead-letters", "list", "--json"],
            drop_all=["dead-letters", "drop", "amap", "--all"],
        )
        client.xdel(QUEUE, cast(Any, client.xrange(QUEUE, count=1))[0][0])
        play(faulty=["audit", "--lines", "4"], faulty_json=["audit", "--json"])
        client.set("trimmed:{s0}", format_id(last_id(client, log_key(0))))
        play(unknown=["audit"])
        client.close()
        yield said


def test_audit_of_a_running_flow_says_what_it_vouches_for_and_that_all_is_well(said: dict[str, Ran]) -> None:
    ended = said["clean"]
    assert ended.code == 0
    assert ended.out == "verified: 90 pushes, 0 missed, 0 extra, 0 duplicate, 0 unretracted\n"
    assert "shard 0: from its beginning to 20" in ended.err
    assert "90 pushes owed by 30 pings, 90 compared; 90 pushes in its queues: nothing twice" in ended.err


def test_audit_tells_the_same_in_json(said: dict[str, Ran]) -> None:
    found = said["clean_json"].json
    assert (found["clean"], found["complete"], found["pushes"], found["faults"]) == (True, True, 90, [])
    assert {found[fault] for fault in ("missed", "extra", "duplicate", "unretracted", "out_of_order")} == {0}
    (shard,) = found["shards"]
    assert (shard["began"], shard["pings"], shard["owed"], shard["compared"]) == ("0-0", 30, 90, 90)
    assert said["one"].json["pushes"] == 45


def test_audit_refuses_what_cannot_be(said: dict[str, Ran]) -> None:
    assert said["nobody"].code == said["since"].code == 2
    assert said["nobody"].error == "no such partner: 'nobody'; there are amap, baidu"


def test_audit_names_whom_it_misses_and_ends_with_one(said: dict[str, Ran]) -> None:
    ended = said["faulty"]
    assert ended.code == 1
    *faults, verdict = ended.out.splitlines()
    assert verdict == "NOT CLEAN: 75 pushes, 15 missed, 0 extra, 0 duplicate, 0 unretracted"
    assert len(faults) == 4
    assert all(line.startswith("missed: alert of 'a17' revision 1 to 'phone-") for line in faults)
    assert "11 more faults" in ended.err
    found = said["faulty_json"]
    assert (found.code, found.json["clean"], found.json["missed"]) == (1, False, 15)
    assert sorted(fault["device_id"] for fault in found.json["faults"]) == sorted(PINGS[::2])
    assert {fault["partner"] for fault in found.json["faults"]} == {"amap"}


def test_audit_that_cannot_know_what_is_owed_says_so_and_ends_with_three(said: dict[str, Ran]) -> None:
    ended = said["unknown"]
    assert ended.code == 3
    assert ended.out.startswith("not all verified: 75 pushes, 0 missed")
    assert "there is no checkpoint to begin with in v/checkpoints/" in ended.err
    assert "only looked at 75 pushes in its queues" in ended.err


def letters(ended: Ran) -> list[Any]:
    assert ended.code == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def test_dead_letters_are_listed_with_what_they_say_and_how_they_died(said: dict[str, Ran]) -> None:
    dead, broken = letters(said["list_json"])
    assert (dead["partner"], dead["group"], dead["deliveries"], dead["stream"]) == ("amap", "default", 5, QUEUE)
    assert dead["reason"] == "delivered 5 times and never acknowledged"
    assert (dead["alert_id"], dead["kind"], sorted(dead["device_ids"])) == ("a17", "alert", sorted(PINGS[::2]))
    assert broken["reason"] == "cannot be decoded: must be a msgpack map"
    assert broken["entry"] == {"alert": "ff"}
    assert letters(said["list_other"]) == letters(said["none_json"]) == []
    assert said["none"].err == "0 dead letters\n"
    assert said["list"].err == "2 dead letters\n"
    lines = said["list"].out.splitlines()
    assert lines[0].startswith(f"{dead['letter']}  amap, group default, 20")
    assert lines[1] == "    alert of 'a17' to 15 devices: delivered 5 times and never acknowledged"
    assert lines[3] == f"    entry {broken['id']}: cannot be decoded: must be a msgpack map"
    assert said["list_nobody"].code == 2


def test_a_replayed_letter_is_pulled_under_its_own_id_and_gone(said: dict[str, Ran]) -> None:
    dead = letters(said["list_json"])[0]
    assert said["replay"].err == "1 replayed\n"
    assert [letter["replayed"] for letter in letters(said["replayed"])] == [True, False]
    (pulled,) = said["pull"].lines
    assert (pulled["stream"], pulled["id"], pulled["device_ids"]) == (dead["stream"], dead["id"], dead["device_ids"])
    assert said["drop"].json == {"dropped": 1}
    assert letters(said["after"]) == []
    assert said["drop_all"].err == "0 dropped\n"


def test_replay_wants_to_be_told_what(said: dict[str, Ran]) -> None:
    assert said["replay_what"].code == said["replay_unknown"].code == 2
    assert said["replay_what"].error == "name either letters or --all, not both and not neither"
    assert said["replay_unknown"].error == "no such dead letter of 'amap': 0/1-1"
