"""The live commands as a user meets them, against the embedded server that `tuanyuan run` starts.

One story is played once, command by command; the tests look at what each of them said. One shard, so that it is known
how many queue entries there are: one for each partner and moment.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from flows.embedded import EmbeddedServer
from flows.log import ensure_settings, format_id, last_id, log_key, push_key
from flows.server import connect
from flows.wire import encode_push
from geoindex.columns import Push, pack_ids
from geoindex.entries import Settings
from tests.tuanyuan import Ran, Running, compile_kernels, embedded_flow, run_all, wait_until


def pings_file(now_ms: int) -> str:
    return (
        "device_id,lat,lng,observed_at,partner\n"
        f"near,30.00,114.00,{now_ms},amap\n"
        f"north,91,114.00,{now_ms},amap\n"
        f"近处,30.01,114.00,{now_ms},amap\n"
        f"near,30.50,114.00,{now_ms},baidu\n"
        f",30.00,114.00,{now_ms},baidu\n"
        f"far,45.00,114.00,{now_ms},baidu\n"
        f"noon,30.00,114.00,noon,baidu\n"
        f"short,30.00\n"
        f"old,30.00,114.00,1000,amap\n"
    )


EDIT = {"alert_id": "a17", "location": {"lat": 30.02, "lng": 114.0}, "audience": ["amap"]}
OTHER = {
    "alert_id": "from-file",
    "location": {"lat": -30.0, "lng": -114.0},
    "missing_since": "2026-05-01T14:30:00+08:00",
    "expires_at": "2099-05-01",
    "schedule": [[0.5, 1], [None, 2.5]],
}
WORDS = {"alert_id": "words", "location": {"lat": 60.0, "lng": 114.0}, "missing_since": 1, "headline": "Girl, 6"}
PUBLISH = ["alert", "publish", "a17", "--lat", "30", "--lng", "114", "--missing-since", "now"]
AT_NOW = ["--missing-since", "now"]
HERE = ["--lat", "30", "--lng", "114"]

STORY: dict[str, list[str]] = {
    "list, empty": ["alert", "list"],
    "list, empty, json": ["alert", "list", "--json"],
    "send": ["send", "pings.csv"],
    "send, json": ["send", "pings.csv", "--json"],
    "send, strict": ["send", "pings.csv", "--strict"],
    "send, clean, strict": ["send", "clean.csv", "--strict", "--json"],
    "send, no such file": ["send", "no.csv"],
    "send, no header": ["send", "edit.json"],
    "publish": [*PUBLISH, "--json"],
    "publish again": PUBLISH,
    "publish, bad place": ["alert", "publish", "b", "--lat", "95", "--lng", "114", *AT_NOW],
    "publish, no time": ["alert", "publish", "b", *HERE],
    "publish, bad time": ["alert", "publish", "b", *HERE, "--missing-since", "yesterday"],
    "publish, bad schedule": ["alert", "publish", "b", *HERE, *AT_NOW, "--schedule", "2:1,1:2,3"],
    "publish, no end": ["alert", "publish", "b", *HERE, *AT_NOW, "--schedule", "1:100"],
    "publish, exercise": ["alert", "publish", "b", *HERE, *AT_NOW, "--exercise"],
    "publish, no id": ["alert", "publish", *HERE, *AT_NOW],
    "publish, file": ["alert", "publish", "--file", "other.json"],
    "list": ["alert", "list"],
    "list, json": ["alert", "list", "--json"],
    "show": ["alert", "show", "a17"],
    "show, json": ["alert", "show", "a17", "--json"],
    "show, unknown": ["alert", "show", "nobody"],
    "update, nothing": ["alert", "update", "a17"],
    "update": ["alert", "update", "a17", "--lat", "30.01", "--lng", "114", "--revision", "1", "--json"],
    "update, too late": ["alert", "update", "a17", "--lat", "30.02", "--lng", "114", "--revision", "1", "--json"],
    "update, file": ["alert", "update", "a17", "--file", "edit.json"],
    "update, unknown": ["alert", "update", "nobody", *HERE],
    "pull, unknown": ["pull", "nobody"],
    "pull, bad group": ["pull", "amap", "--group", "a b"],
    # an alert and two updates for each of the two partners
    "pull": ["pull", "amap", "--follow", "--max", "3"],
    "pull, nothing left": ["pull", "amap"],
    "pull, other group": ["pull", "amap", "--group", "others", "--max", "3"],
    "pull, looking": ["pull", "amap", "--group", "lookers", "--no-ack"],
    "pull, after looking": ["pull", "amap", "--group", "lookers"],
    "pull, one by one, 1": ["pull", "baidu", "--max", "1", "--consumer", "c"],
    "pull, one by one, 2": ["pull", "baidu", "--max", "1", "--consumer", "c"],
    "pull, one by one, rest": ["pull", "baidu", "--consumer", "c"],
    "close, bad outcome": ["alert", "close", "a17", "--outcome", "lost"],
    "close, too late": ["alert", "close", "a17", "--outcome", "found", "--revision", "2"],
    "close": ["alert", "close", "a17", "--outcome", "found", "--json"],
    "close again": ["alert", "close", "a17", "--outcome", "found"],
    "update, closed": ["alert", "update", "a17", *HERE],
    "pull, resolved": ["pull", "amap", "--follow", "--max", "1"],
    "list, open": ["alert", "list", "--open", "--json"],
    "show, closed": ["alert", "show", "a17", "--json"],
    "world": ["send", "--world", "2000", "--rate", "5000", "--seconds", "2", "--json"],
    "world, bad seed": ["send", "--world", "10", "--seconds", "1", "--seed", "-1"],
    "world, too large": ["send", "--world", "5000000000", "--seconds", "1"],
    "world, again": ["send", "--world", "2000", "--rate", "5000", "--seconds", "0.2", "--seed", "7"],
    "publish, words": ["alert", "publish", "--file", "words.json"],
    "show, words": ["alert", "show", "words", "--json"],
    "send, bad partner": ["send", "partner.csv"],
    "pull, new partner": ["pull", "ditu"],
    "health": ["health"],
    "health, json": ["health", "--json", "--lag-max", "30"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    compile_kernels(folder)
    now_ms = round(time.time() * 1000)
    (folder / "pings.csv").write_text(pings_file(now_ms))
    (folder / "clean.csv").write_text(f"lng,lat,observed_at,device_id\n114,45,{now_ms},elsewhere\n")
    (folder / "edit.json").write_text(json.dumps(EDIT))
    (folder / "words.json").write_text(json.dumps(WORDS))
    (folder / "partner.csv").write_text(
        f"device_id,lat,lng,observed_at,partner\na,50,114,{now_ms},amap\nb,50,114,{now_ms},b d\n"
    )
    (folder / "other.json").write_text(json.dumps(OTHER))
    return folder


@pytest.fixture(scope="module")
def flow(folder: Path) -> Iterator[Running]:
    options = ("--shard-count", "1", "--partner", "amap", "--partner", "baidu")
    with embedded_flow("v", *options, folder=folder) as flow:
        yield flow


@pytest.fixture(scope="module")
def said(folder: Path, flow: Running) -> dict[str, Ran]:
    """What each command of the story said."""
    return dict(zip(STORY, run_all(list(STORY.values()), folder, TUANYUAN_VAR="v"), strict=True))


def refusal(ended: Ran, code: int = 3) -> str:
    assert ended.code == code, ended.err
    assert ended.out == ""
    return ended.error


# ---- send

BAD_ROWS = [
    "pings.csv:3: latitude must be a number from -90 to 90, got '91'",
    "pings.csv:6: device_id must be 1 to 64 bytes, got 0",
    "pings.csv:8: observed_at must be ms since 1970 or an ISO 8601 time, got 'noon'",
    "pings.csv:9: must have 5 fields as the header, got 2",
]
SET_ASIDE = {"columns": 1, "id_length": 1, "latitude": 1, "observed_at": 1}


def test_send_names_bad_rows_by_line_and_reason_and_sends_the_others(said: dict[str, Ran]) -> None:
    ended = said["send"]
    assert (ended.code, ended.out) == (0, "")
    assert sorted(ended.err.strip().splitlines()) == [
        *BAD_ROWS,
        "pings: 5 sent; set aside: columns 1, id_length 1, latitude 1, observed_at 1",
    ]


def test_send_counts_in_json_on_stdout_alone(said: dict[str, Ran]) -> None:
    assert said["send, json"].code == 0
    assert said["send, json"].json == {"pings_sent": 5, "pings_set_aside": SET_ASIDE}
    assert said["send, clean, strict"].json == {"pings_sent": 1, "pings_set_aside": {}}


def test_send_strict_ends_with_three_if_a_row_was_set_aside(said: dict[str, Ran]) -> None:
    assert said["send, strict"].code == 3
    assert said["send, clean, strict"].code == 0


def test_send_refuses_files_that_are_none(said: dict[str, Ran]) -> None:
    assert refusal(said["send, no such file"], 2) == "no such file: no.csv"
    assert re.match(
        r"edit\.json:1: the first line must name the columns .* \(0 pings were sent before\)",
        refusal(said["send, no header"], 2),
    )


def test_send_world_keeps_its_rate_and_counts_what_it_sent(said: dict[str, Ran]) -> None:
    assert (said["world"].code, said["world, again"].code) == (0, 0)
    assert said["world"].json == {"pings_sent": 10_000, "pings_set_aside": {}}
    assert said["world, again"].err.strip() == "pings: 1,000 sent; set aside: none"


# ---- alerts


def test_publish_answers_with_revision_and_place_in_the_order(said: dict[str, Ran]) -> None:
    answer = said["publish"].json
    assert (said["publish"].code, said["publish"].err) == (0, "")
    assert (answer["alert_id"], answer["revision"]) == ("a17", 1)
    assert re.fullmatch(r"\d{13}-\d+", answer["desk_id"])
    assert 0 < answer["took_ms"] < 5000


def test_publish_without_json_tells_a_person(said: dict[str, Ran]) -> None:
    ended = said["publish, file"]
    assert (ended.code, ended.out) == (0, "")
    pattern = r"alert 'from-file': revision 1, in every log after \d+ ms \(desk id \d+-\d+\)\n"
    assert re.fullmatch(pattern, ended.err)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("publish again", "alert 'a17': was published before and is open; edit it, or take another id"),
        ("publish, bad place", "publish: alert 'b': lat must be from -90 to 90 degrees, got 95.0"),
        ("publish, no time", "publish: alert 'b': missing_since is missing"),
        (
            "publish, bad time",
            "publish: alert 'b': missing_since must be ms since 1970 or an ISO 8601 time, got 'yesterday'",
        ),
        ("publish, bad schedule", "publish: alert 'b': schedule hours must rise, got 1 after 2"),
        ("publish, exercise", "publish: alert 'b': an exercise must name its partners in audience"),
        ("publish, no id", "publish: alert_id must be text, got None"),
        ("show, unknown", "alert 'nobody': was never published"),
        ("update, too late", "alert 'a17': the known revision is 2, the edit was made to 1"),
        ("update, unknown", "alert 'nobody': was never published"),
        ("update, closed", "alert 'a17': was closed as found, and stays so"),
        ("close, bad outcome", "alert 'a17': outcome must be one of found, false_report, cancelled, got 'lost'"),
        ("close, too late", "alert 'a17': the known revision is 3, the edit was made to 2"),
        ("close again", "alert 'a17': was closed as found, and stays so"),
    ],
)
def test_what_the_desk_refuses_ends_with_three_and_the_reason(name: str, words: str, said: dict[str, Ran]) -> None:
    assert refusal(said[name]) == words


def test_a_schedule_without_an_end_is_refused(said: dict[str, Ran]) -> None:
    assert "last hours" in refusal(said["publish, no end"])


def test_an_update_that_names_nothing_is_wrong_usage(said: dict[str, Ran]) -> None:
    assert refusal(said["update, nothing"], 2) == "update: nothing to change was named"


def test_revisions_rise_with_every_edit(said: dict[str, Ran]) -> None:
    assert (said["update"].code, said["update"].json["revision"]) == (0, 2)
    assert (said["update, file"].code, said["close"].code) == (0, 0)
    assert "alert 'a17': revision 3, in every log" in said["update, file"].err
    assert said["close"].json["revision"] == 4


def test_show_tells_an_alert_as_it_is_now(said: dict[str, Ran]) -> None:
    view = said["show, json"].json
    assert (view["alert_id"], view["revision"], view["state"], view["ring_km"]) == ("a17", 1, "matching", 100.0)
    assert view["location"] == {"lat": 30.0, "lng": 114.0}
    assert view["schedule"] == [[1.0, 100.0], [2.0, 200.0], [3.0, 300.0], [None, 500.0]]
    assert view["next_growth"] == view["missing_since"] + 3_600_000
    assert view["next_ring_km"] == 200.0
    assert view["expires_at"] == view["missing_since"] + 72 * 3_600_000
    for name in view:
        assert re.search(rf"^ *{name}: ", said["show"].out, re.MULTILINE), name
    closed = said["show, closed"].json
    assert (closed["revision"], closed["state"], closed["next_growth"]) == (4, "found", None)
    assert closed["audience"] == ["amap"]


def test_a_file_is_an_alert_like_any_other(said: dict[str, Ran]) -> None:
    view = next(view for view in said["list, json"].json if view["alert_id"] == "from-file")
    assert view["schedule"] == [[0.5, 1.0], [None, 2.5]]
    assert view["missing_since"] == 1_777_617_000_000
    assert view["expires_at"] == 4_081_276_800_000
    assert (view["state"], view["ring_km"]) == ("matching", 2.5)


def test_list_shows_the_last_published_first(said: dict[str, Ran]) -> None:
    assert said["list, empty"].out == "no alerts\n"
    assert said["list, empty, json"].json == []
    assert [view["alert_id"] for view in said["list, json"].json] == ["from-file", "a17"]
    rows = [row.split() for row in said["list"].out.splitlines()]
    assert rows[0] == ["alert", "state", "rev", "place", "ring", "grows"]
    assert [row[:5] for row in rows[1:]] == [
        ["from-file", "matching", "1", "-30.0000,", "-114.0000"],
        ["a17", "matching", "1", "30.0000,", "114.0000"],
    ]
    assert [view["alert_id"] for view in said["list, open"].json] == ["from-file"]


# ---- pull


def told(ended: Ran) -> list[tuple[str, str, int, float, list[str]]]:
    return [
        (push["alert_id"], push["kind"], push["revision"], push["ring_km"], push["device_ids"]) for push in ended.lines
    ]


AMAP = [
    ("a17", "alert", 1, 100.0, ["near", "近处"]),
    ("a17", "update", 2, 100.0, ["near", "近处"]),
    ("a17", "update", 3, 100.0, ["near", "近处"]),
]


def test_pull_prints_a_partners_pushes_and_acknowledges_them(said: dict[str, Ran]) -> None:
    assert said["pull"].code == 0
    assert told(said["pull"]) == AMAP
    assert said["pull"].err == "3 entries, 6 devices\n"
    assert (said["pull, nothing left"].code, said["pull, nothing left"].out) == (0, "")
    assert said["pull, nothing left"].err == "0 entries, 0 devices\n"
    assert told(said["pull, resolved"]) == [("a17", "resolved", 4, 100.0, ["near", "近处"])]


def test_pull_names_stream_id_and_time_of_every_entry(said: dict[str, Ran]) -> None:
    entries = said["pull"].lines
    assert {entry["stream"] for entry in entries} == {"push:{s0}:amap"}
    assert [entry["id"] for entry in entries] == sorted(entry["id"] for entry in entries)
    for entry in entries:
        assert int(entry["id"].partition("-")[0]) == entry["at"]


def test_pull_no_ack_leaves_everything_where_it_was_for_a_while(said: dict[str, Ran]) -> None:
    assert said["pull, looking"].code == 0
    assert {entry["id"] for entry in said["pull, looking"].lines} == {entry["id"] for entry in said["pull"].lines}


def test_every_group_gets_every_push(said: dict[str, Ran]) -> None:
    assert said["pull, other group"].out == said["pull"].out


def test_pull_stops_after_as_many_entries_as_were_asked_for(said: dict[str, Ran]) -> None:
    parts = [told(said[f"pull, one by one, {part}"]) for part in ("1", "2", "rest")]
    assert [len(part) for part in parts] == [1, 1, 1]
    assert [push for part in parts for push in part] == [
        ("a17", "alert", 1, 100.0, ["near"]),
        ("a17", "update", 2, 100.0, ["near"]),
        ("a17", "update", 3, 100.0, ["near"]),
    ]


def test_pull_refuses_a_partner_or_a_group_that_cannot_be(said: dict[str, Ran]) -> None:
    words = refusal(said["pull, unknown"], 2)
    assert words.startswith("no such partner: 'nobody'; there are amap, baidu")
    assert refusal(said["pull, bad group"], 2) == "group must have 1 to 128 characters and no spaces, got 'a b'"


def test_a_partner_that_pings_brought_can_pull(said: dict[str, Ran]) -> None:
    assert (said["pull, new partner"].code, said["pull, new partner"].out) == (0, "")


def test_health_is_zero_while_a_flow_keeps_up(said: dict[str, Ran]) -> None:
    assert (said["health"].code, said["health, json"].code) == (0, 0)
    assert re.fullmatch(r"flow processes: 1; largest lag: \d+\.\d s\n", said["health"].out)
    answer = said["health, json"].json
    assert (answer["healthy"], answer["flow_processes"]) == (True, 1)


# ---- Ctrl-C


def test_ctrl_c_ends_a_world_cleanly_and_says_how_much_it_sent(folder: Path, flow: Running) -> None:
    assert flow.code is None
    server = EmbeddedServer.find(folder / "v" / "valkey")
    assert server is not None
    client = connect(server.url)
    with Running("send", "--world", "1000", "--rate", "2000", "--json", folder=folder, TUANYUAN_VAR="v") as sending:
        began = format_id(last_id(client, log_key(0)))
        wait_until(lambda: any(b"pings" in fields for _, fields in cast(Any, client.xrange(log_key(0), f"({began}"))))
        ended = sending.end(signal.SIGINT)
    client.close()
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert ended.json["pings_sent"] >= 100


def test_ctrl_c_ends_a_pull_that_follows_and_nothing_it_printed_comes_again(folder: Path, flow: Running) -> None:
    publish = ["alert", "publish", "followed", *HERE, *AT_NOW]
    with Running("pull", "amap", "--follow", "--group", "follower", folder=folder, TUANYUAN_VAR="v") as pulling:
        now_ms = round(time.time() * 1000)
        (folder / "seen.csv").write_text(f"device_id,lat,lng,observed_at,partner\nseen,30,114,{now_ms},amap\n")
        for ended in run_all([["send", "seen.csv"], publish], folder, TUANYUAN_VAR="v"):
            assert ended.code == 0, ended.err
        wait_until(lambda: '"alert_id":"followed"' in pulling.out)
        ended = pulling.end(signal.SIGINT)
    assert ended.code == 0, ended.err
    assert re.fullmatch(r"[\d,]+ entries, [\d,]+ devices\n", ended.err)
    assert "followed" in [push["alert_id"] for push in ended.lines]
    (again,) = run_all([["pull", "amap", "--group", "follower"]], folder, TUANYUAN_VAR="v")
    assert again.out == ""


def test_a_signal_ends_run_and_its_server_and_what_was_published_is_kept(tmp_path: Path, folder: Path) -> None:
    assert folder.exists()  # kernels are compiled
    with embedded_flow("mine", "--shard-count", "2", folder=tmp_path) as flow:
        assert "shards: 2; partners: none yet" in flow.err
        assert re.search(r"server: redis://127\.0\.0\.1:\d+/0 \(embedded, data in mine/valkey\)", flow.err)
        (published,) = run_all([[*PUBLISH, "--var", "mine"]], tmp_path)
        assert published.code == 0, published.err
        assert_ended_cleanly(flow.end(signal.SIGINT))
        assert EmbeddedServer.find(tmp_path / "mine" / "valkey") is None
    with embedded_flow("mine", folder=tmp_path) as flow:
        (kept,) = run_all([["alert", "list", "--json", "--var", "mine"]], tmp_path)
        assert [view["alert_id"] for view in kept.json] == ["a17"]
        assert_ended_cleanly(flow.end(signal.SIGTERM))
        assert EmbeddedServer.find(tmp_path / "mine" / "valkey") is None


def assert_ended_cleanly(ended: Ran) -> None:
    assert ended.code == 0, ended.err
    assert ended.err.endswith("stopped cleanly\n")
    assert "Traceback" not in ended.err


# ---- known faults: each mark goes when its fault does


def test_what_was_only_looked_at_is_pulled_next(said: dict[str, Ran]) -> None:
    assert said["pull, looking"].out == said["pull"].out
    assert said["pull, after looking"].out == said["pull"].out


def test_entries_that_max_left_out_are_pulled_next(tmp_path: Path) -> None:
    id_bytes, id_end = pack_ids(["phone"])
    push = Push(0, "a17", 1, "alert", 100.0, 1, id_bytes, id_end)
    with EmbeddedServer.start(tmp_path / "v" / "valkey", port=None) as server:
        client = connect(server.url)
        ensure_settings(client, Settings(shard_count=4, partners=("amap",)))
        for shard in range(4):
            client.xadd(push_key(shard, "amap"), {b"alert": encode_push(push)}, id="1-1")
        client.close()
        first, rest = run_all([["pull", "amap", "--max", "1"], ["pull", "amap"]], tmp_path, TUANYUAN_VAR="v")
    assert len(first.lines) == 1
    assert len(rest.lines) == 3


def test_the_words_of_an_alert_file_are_kept_and_shown(said: dict[str, Ran]) -> None:
    assert said["publish, words"].code == 0
    assert '"Girl, 6"' in said["show, words"].out


def test_a_partner_whose_name_cannot_be_is_set_aside_row_by_row(said: dict[str, Ran]) -> None:
    ended = said["send, bad partner"]
    assert ended.code == 0, ended.err
    assert "partner.csv:3: partner" in ended.err
    assert "pings: 1 sent; set aside: partner 1\n" in ended.err


@pytest.mark.parametrize("name", ["world, bad seed", "world, too large"])
def test_a_world_that_cannot_be_is_wrong_usage(name: str, said: dict[str, Ran]) -> None:
    assert refusal(said[name], 2)
