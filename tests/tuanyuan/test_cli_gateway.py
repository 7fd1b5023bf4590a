"""Accounts, the audit log and `serve` as an operator meets them: one story, command by command, then the gateway."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.server import connect
from gateway.keys import parse_key
from geoindex.entries import Settings
from tests.tuanyuan import Ran, Running, compile_kernels, run_all

STORY: dict[str, list[str]] = {
    "add": ["partner", "add", "amap", "--datum", "gcj02", "--pings-per-s", "5000"],
    "add, json": ["partner", "add", "meituan", "--json"],
    "add, twice": ["partner", "add", "amap"],
    "add, bad name": ["partner", "add", "a:b"],
    "add, bad datum": ["partner", "add", "x", "--datum", "utm"],
    "set": ["partner", "set", "amap", "--signed", "--requests-per-s", "3"],
    "set, nothing": ["partner", "set", "amap"],
    "set, unknown": ["partner", "set", "x", "--signed"],
    "rotate": ["partner", "rotate", "amap", "--grace", "2h"],
    "rotate, at once": ["partner", "rotate", "meituan", "--grace", "0"],
    "list": ["partner", "list"],
    "list, json": ["partner", "list", "--json"],
    "acl": ["partner", "acl", "amap", "--json"],
    "acl, apply": ["partner", "acl", "amap", "--apply"],
    "acl, unknown": ["partner", "acl", "baidu"],
    "disable": ["partner", "disable", "amap"],
    "disable, again": ["partner", "disable", "amap"],
    "enable": ["partner", "enable", "amap"],
    "officer": ["officer", "add", "西湖 值班", "--division", "330106", "--level", "county"],
    "officer, bad level": ["officer", "add", "x", "--division", "330106", "--level", "mayor"],
    "officer, bad division": ["officer", "add", "x", "--division", "33", "--level", "county"],
    "officer list": ["officer", "list"],
    "officer list, json": ["officer", "list", "--json"],
    "officer rotate": ["officer", "rotate", "西湖 值班", "--json"],
    "officer disable": ["officer", "disable", "西湖 值班"],
    "operator": ["operator", "add", "night-shift"],
    "operator list": ["operator", "list"],
    "audit list": ["audit-log", "list"],
    "audit list, json": ["audit-log", "list", "--last", "3", "--json"],
    "verify": ["audit-log", "verify"],
    "verify, json": ["audit-log", "verify", "--json"],
    "verify, head": ["audit-log", "verify", "--head", f"1:{'0' * 64}"],
    "verify, bad head": ["audit-log", "verify", "--head", "17"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def embedded(folder: Path) -> Iterator[EmbeddedServer]:
    """The server under `v`, with logs, as `tuanyuan run` leaves it."""
    with EmbeddedServer.start(folder / "v" / "valkey", memory_bytes_max=256 << 20) as server:
        client = connect(server.url)
        ensure_settings(client, Settings(shard_count=2, partners=("baidu",)))
        client.close()
        yield server


@pytest.fixture(scope="module")
def story(embedded: EmbeddedServer, folder: Path) -> dict[str, Ran]:
    ended = run_all([[*words, "--var", "v"] for words in STORY.values()], folder)
    return dict(zip(STORY, ended, strict=True))


def test_a_key_is_printed_once_on_its_own(story: dict[str, Ran], folder: Path) -> None:
    assert story["add"].code == 0
    assert parse_key(story["add"].out.strip()) is not None
    assert "it is not shown again" in story["add"].err
    added = json.loads(story["add, json"].out)
    key = parse_key(added["key"])
    assert key is not None and key.key_id == added["key_id"]
    shown = "".join(ran.out + ran.err for name, ran in story.items() if name != "add")
    assert story["add"].out.strip()[-43:] not in shown
    assert (folder / "v" / "gateway.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("add, twice", 3, "there is a partner 'amap' already"),
        ("add, bad name", 3, "a partner's name must have 1 to 64 bytes"),
        ("add, bad datum", 2, "--datum must be wgs84, gcj02 or bd09, got 'utm'"),
        ("set, nothing", 2, "say what to change"),
        ("set, unknown", 3, "there is no partner 'x'"),
        ("acl, unknown", 3, "there is no partner 'baidu' with an account"),
        ("officer, bad level", 2, "--level must be one of ministry, province"),
        ("officer, bad division", 3, "division must be a code of 6 or 12 digits"),
        ("verify, head", 1, ""),
        ("verify, bad head", 2, "a head must be a row's number and hash"),
    ],
)
def test_what_is_refused_says_why(story: dict[str, Ran], name: str, code: int, words: str) -> None:
    assert story[name].code == code, story[name].err
    assert words in story[name].err


def test_everything_else_is_done(story: dict[str, Ran]) -> None:
    refused = {name for name, ran in story.items() if ran.code != 0}
    assert refused == {name for name in STORY if re.search(r"twice|bad|nothing|unknown|verify, head", name)}


def test_partners_are_listed_with_their_keys_and_limits(story: dict[str, Ran]) -> None:
    lines = story["list"].out
    assert "baidu: no account" in lines
    assert "amap: gcj02, at most 5000 pings/s, signed requests only, at most 3 requests/s" in lines
    assert lines.count("valid until") == 1
    by_name = {line["name"]: line for line in story["list, json"].lines}
    assert not by_name["baidu"]["account"]
    amap = by_name["amap"]
    assert (amap["index"], amap["datum"], amap["signed"], len(amap["keys"])) == (1, "gcj02", True, 2)
    assert len(by_name["meituan"]["keys"]) == 1
    assert "digest" not in story["list, json"].out and "sealed" not in story["list, json"].out


def test_a_user_for_direct_access_is_shown_and_made_known(story: dict[str, Ran]) -> None:
    shown = json.loads(story["acl"].out)
    assert shown["queues"] == ["push:{s0}:amap", "push:{s1}:amap"]
    assert shown["line"].startswith("user partner-amap reset on #")
    assert not shown["applied"]
    assert "~push:{s[0-1]}:amap" in story["acl, apply"].out
    assert "known until the server's next start" in story["acl, apply"].err


def test_disabling_says_whether_it_changed_anything(story: dict[str, Ran]) -> None:
    assert "amap is disabled\n" in story["disable"].err
    assert "amap is disabled, as before" in story["disable, again"].err
    assert "amap is enabled\n" in story["enable"].err


def test_officers_and_operators_are_listed(story: dict[str, Ran]) -> None:
    assert story["officer list"].out.startswith("西湖 值班: county, 330106\n    key ")
    (officer,) = story["officer list, json"].lines
    assert (officer["division"], officer["level"], officer["enabled"]) == ("330106", "county", True)
    assert story["operator list"].out.startswith("night-shift: operator\n")


def test_every_change_of_an_account_is_in_the_audit_log_before_it_is_made(story: dict[str, Ran]) -> None:
    lines = [line.split("  ") for line in story["audit list"].out.splitlines()]
    done = [(words[3], words[4], words[5]) for words in lines]
    assert done[:2] == [("partner.add", "amap", "begun"), ("partner.add", "amap", "done")]
    assert ("partner.add", "amap", "failed") in done
    assert ("partner.disable", "amap", "done") in done
    assert ("officer.rotate", "西湖 值班", "done") in done
    assert all(words[2].startswith("console:") for words in lines)
    assert [row["action"] for row in story["audit list, json"].lines] == ["officer.disable"] + ["operator.add"] * 2


def test_an_untouched_audit_log_is_verified(story: dict[str, Ran]) -> None:
    assert re.search(r"\d+ rows, 0 breaks; head \d+:[0-9a-f]{64}", story["verify"].err)
    found = json.loads(story["verify, json"].out)
    assert (found["breaks"], found["seals_checked"]) == ([], True)
    assert "row 1: is another row than the one that was seen under this number" in story["verify, head"].out


def test_gateways_serve_until_they_are_told_to_end(embedded: EmbeddedServer, folder: Path) -> None:
    compile_kernels(folder)
    words = ["serve", "--var", "v", "--port", "0"]
    with Running(*words, folder=folder) as first, Running(*words, folder=folder) as second:
        for gateway, number in ((first, signal.SIGINT), (second, signal.SIGTERM)):
            gateway.wait_for_words("ready; Ctrl-C stops")
            url = re.search(r"gateway: (http://127\.0\.0\.1:\d+)", gateway.err)
            assert url is not None
            assert httpx.get(f"{url[1]}/readyz").json() == {"status": "ready", "reasons": []}
            ended = gateway.end(number)
            assert ended.code == 0
            lines = [json.loads(line) for line in ended.err.splitlines() if line.startswith("{")]
            assert [line["route"] for line in lines] == ["/readyz"]
            assert ended.err.endswith("stopped cleanly\n")


def test_a_gateway_needs_a_free_port_and_a_server(embedded: EmbeddedServer, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        one, other, third = run_all(
            [
                ["serve", "--var", "v", "--port", port],
                ["serve", "--var", "nothing-here"],
                ["serve", "--var", "v", "--tls-key", "k.pem"],
            ],
            folder,
        )
    assert (one.code, other.code, third.code) == (1, 1, 2)
    assert f"cannot listen on 127.0.0.1:{port}" in one.err
    assert "no server runs under nothing-here/valkey" in other.err
    assert "tls_certificate and tls_key go together" in third.err
