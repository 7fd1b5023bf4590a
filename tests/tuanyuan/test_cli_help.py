"""Help and wrong usage: a user learns what to type, in few lines and without a traceback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tuanyuan import Ran, compile_kernels, run, run_all

ALERT = '{"at":1,"event":"publish","alert":{"alert_id":"a","location":{"lat":30,"lng":114},"missing_since":1}}\n'
MATCH = ["match", "--pings", "pings.csv", "--alerts", "alerts.jsonl", "--out", "out.jsonl"]
NO_SERVER = (
    "no server runs under nothing-here/valkey: start one with `tuanyuan run` (in another terminal), "
    "or name one with --valkey"
)
NOBODY = "redis://127.0.0.1:1"
REFUSED = "Error 111 connecting to 127.0.0.1:1. Connection refused."
DURATION = "must be a duration above 0 as 6h, 90min, 30s or 2d, got"
URL = re.compile(r"a server's url must begin with .*unix.*, got 'http://x'")

WRONG: list[tuple[list[str], int, str | re.Pattern[str]]] = [
    # match
    (["match", "--pings", "no.csv", *MATCH[3:]], 2, "--pings: no such file: no.csv"),
    ([*MATCH[:3], "--alerts", "no.jsonl", *MATCH[5:]], 2, "--alerts: no such file: no.jsonl"),
    (["match", "--pings", ".", *MATCH[3:]], 2, "--pings: no such file: ."),
    (MATCH[:5], 2, "Missing option '--out'."),
    ([*MATCH, "--live-window", "6x"], 2, re.compile(f".*{DURATION} '6x'")),
    ([*MATCH, "--live-window", "0h"], 2, re.compile(f".*{DURATION} '0h'")),
    ([*MATCH, "--live-window", "-1h"], 2, re.compile(f".*{DURATION} '-1h'")),
    ([*MATCH, "--shards", "0"], 2, re.compile("Invalid value for '--shards'")),
    ([*MATCH, "--shards", "many"], 2, re.compile("Invalid value for '--shards'")),
    ([*MATCH, "--sharts", "3"], 2, re.compile("No such option: --sharts")),
    (["match", "--pings", "header.csv", *MATCH[3:]], 2, re.compile(r"header\.csv:1: the first line must name .*'x,y'")),
    (["match", "--pings", "plain.csv.gz", *MATCH[3:]], 2, re.compile(r"plain\.csv\.gz:1: Not a gzipped file")),
    # which server
    (["alert", "list", "--var", "nothing-here"], 1, NO_SERVER),
    (["pull", "amap", "--var", "nothing-here"], 1, NO_SERVER),
    (["send", "pings.csv", "--var", "nothing-here"], 1, NO_SERVER),
    (["health", "--var", "nothing-here"], 1, NO_SERVER),
    (["audit", "--var", "nothing-here"], 1, NO_SERVER),
    (["dead-letters", "list", "--var", "nothing-here"], 1, NO_SERVER),
    (["alert", "list", "--valkey", NOBODY], 1, f"the server does not answer: {REFUSED}"),
    (["pull", "amap", "--valkey", NOBODY], 1, f"the server does not answer: {REFUSED}"),
    (["send", "pings.csv", "--valkey", NOBODY], 1, f"the server does not answer: {REFUSED}"),
    (["run", "--valkey", NOBODY], 1, f"no answer from {NOBODY}: {REFUSED}"),
    (["run", "--valkey", "redis://:secret@127.0.0.1:1"], 1, f"no answer from redis://:***@127.0.0.1:1: {REFUSED}"),
    (["run", "--valkey", "http://x"], 2, URL),
    (["send", "pings.csv", "--valkey", "http://x"], 2, URL),
    (["alert", "list", "--valkey", "http://x"], 2, URL),
    (["run", "--valkey", "redis://host:port"], 2, re.compile("a server's url must be understood: Port .*'port'")),
    (["run", "--valkey", NOBODY, "--valkey-port", "5"], 2, re.compile("valkey_port .* cannot go with valkey")),
    # run
    (["run", "--shards", "3-1"], 2, "a range of shards must rise, got '3-1'"),
    (["run", "--shards", "x"], 2, "shards must be numbers and ranges like 0-3,7, got 'x'"),
    (["run", "--shard-count", "0"], 2, re.compile("Invalid value for '--shard-count'")),
    (["run", "--valkey-port", "99999"], 2, "valkey_port must be from 0 to 65535, got 99999"),
    (["run", "--live-window", "soon"], 2, re.compile(f".*{DURATION} 'soon'")),
    (
        ["run", "--var", "spaces", "--partner", "b d"],
        2,
        "a partner's name must have 1 to 64 bytes, without spaces and :{}, got 'b d'",
    ),
    (["run", "--var", "spaces", "--partner", "amap", "--partner", "amap"], 2, "--partner 'amap' is named twice"),
    # send, pull, alert, demo
    (["send"], 2, "name either a FILE or --world, not both and not neither"),
    (["send", "pings.csv", "--world", "5"], 2, "name either a FILE or --world, not both and not neither"),
    (["pull"], 2, re.compile("Missing argument '.*partner")),
    (["pull", "amap", "--max", "0"], 2, re.compile("Invalid value for '--max'")),
    (["alert", "publish", "a", "--lat", "1", "--var", "nothing-here"], 2, "--lat and --lng go together"),
    (["alert", "update", "a", "--lng", "1", "--var", "nothing-here"], 2, "--lat and --lng go together"),
    (["alert", "publish", "a", "--lat", "north"], 2, re.compile("Invalid value for '--lat'")),
    (
        ["alert", "publish", "a", "--schedule", "wide"],
        2,
        "--schedule must be hours:km steps and a last km, as 1:100,2:200,3:300,500, got 'wide'",
    ),
    (["alert", "publish", "--file", "no.json"], 2, re.compile(r"--file no\.json: .*No such file")),
    (["alert", "publish", "--file", "list.json"], 2, "--file list.json: must hold one JSON object"),
    (["alert", "publish", "--file", "header.csv"], 2, re.compile(r"--file header\.csv: ")),
    (["alert", "close", "a"], 2, "Missing option '--outcome'."),
    (["demo", "--phones", "5"], 2, re.compile("Invalid value for '--phones'")),
    (["simulate", "--mutation", "none"], 2, re.compile("--mutation: there is no 'none'; known are trims-too-early, ")),
    (["simulate", "--trace"], 2, "--trace is for one --seed"),
    (["simulate", "--seeds", "0"], 2, re.compile("Invalid value for '--seeds'")),
    (["frobnicate"], 2, "No such command 'frobnicate'."),
    (["alert", "frobnicate"], 2, "No such command 'frobnicate'."),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("usage")
    compile_kernels(folder)
    (folder / "pings.csv").write_text("device_id,lat,lng,observed_at\na,30,114,1\n")
    (folder / "plain.csv.gz").write_text("device_id,lat,lng,observed_at\na,30,114,1\n")
    (folder / "alerts.jsonl").write_text(ALERT)
    (folder / "header.csv").write_text("x,y\n1,2\n")
    (folder / "list.json").write_text("[]")
    return folder


@pytest.fixture(scope="module")
def wrong(folder: Path) -> dict[tuple[str, ...], Ran]:
    ran = run_all([arguments for arguments, _, _ in WRONG], folder)
    return {command.arguments: command for command in ran}


@pytest.mark.parametrize(
    ("arguments", "code", "words"), WRONG, ids=["_".join(arguments).replace("/", "-") for arguments, _, _ in WRONG]
)
def test_wrong_usage_ends_with_one_clear_line(
    arguments: list[str], code: int, words: str | re.Pattern[str], wrong: dict[tuple[str, ...], Ran]
) -> None:
    ended = wrong[tuple(arguments)]
    assert ended.code == code, ended.err
    assert ended.out == ""
    if isinstance(words, str):
        assert ended.error == words
    else:
        assert words.match(ended.error), ended.error
    assert len(ended.err.strip().splitlines()) <= 4  # at most the usage, a hint, an empty line and the error


def test_wrong_usage_leaves_no_files_behind(folder: Path, wrong: dict[tuple[str, ...], Ran]) -> None:
    assert wrong
    assert not (folder / "out.jsonl").exists()
    assert not (folder / "nothing-here").exists()
    assert not (folder / "var").exists()


def test_a_faulty_environment_variable_is_named(folder: Path) -> None:
    (ended,) = run_all([["run"]], folder, TUANYUAN_MEMORY_MB="lots")
    assert (ended.code, ended.error) == (2, "TUANYUAN_MEMORY_MB: must be a whole number, got 'lots'")


def test_a_real_process_answers_as_the_forked_ones_do(folder: Path, wrong: dict[tuple[str, ...], Ran]) -> None:
    for arguments in (("alert", "list", "--var", "nothing-here"), ("run", "--shards", "3-1")):
        ended, forked = run(*arguments, folder=folder), wrong[arguments]
        assert (ended.code, ended.out, ended.err) == (forked.code, forked.out, forked.err)


# ---- help


def named_in(help_text: str) -> list[str]:
    """The commands that a help text lists."""
    _, _, listed = help_text.partition("Commands:\n")
    return re.findall(r"^  ([\w-]+)  +\S", listed.partition("\n\n")[0], re.MULTILINE)


@pytest.fixture(scope="module")
def helps(folder: Path) -> dict[str, Ran]:
    """Every command's help by its words; the top's is under ""."""
    top, *groups = run_all([["--help"], ["alert", "--help"], ["dead-letters", "--help"]], folder)
    commands = [[name] for name in named_in(top.out)]
    commands += [[group.arguments[0], name] for group in groups for name in named_in(group.out)]
    ran = run_all([[*words, "--help"] for words in commands], folder)
    return {"": top} | {" ".join(words): help_text for words, help_text in zip(commands, ran, strict=True)}


def test_the_help_lists_every_command(helps: dict[str, Ran]) -> None:
    expected = {
        "match",
        "run",
        "send",
        "pull",
        "demo",
        "warmup",
        "health",
        "retention",
        "alert",
        "audit",
        "dead-letters",
        "simulate",
        "soak",
    }
    assert {name for name in helps if name and " " not in name} >= expected
    assert {name for name in helps if " " in name} >= {
        *(f"alert {name}" for name in ("publish", "update", "close", "list", "show")),
        *(f"dead-letters {name}" for name in ("list", "replay", "drop")),
    }


def test_every_commands_help_ends_with_zero_and_shows_an_example(helps: dict[str, Ran]) -> None:
    without = []
    for name, ended in helps.items():
        assert (ended.code, ended.err) == (0, ""), name
        example = ended.out.partition("Example")[2]
        words = name.partition(" ")[0] or "tuanyuan"
        if name not in ("", "warmup") and not re.search(rf"tuanyuan {words}\b", example):
            without.append(name)
    assert without == []


def test_minus_h_is_help_and_no_words_at_all_are_too(folder: Path, helps: dict[str, Ran]) -> None:
    short, alert_short, nothing, alert_nothing = run_all([["-h"], ["alert", "-h"], [], ["alert"]], folder)
    assert short.out == helps[""].out
    assert alert_short.out == helps["alert"].out
    assert (nothing.code, alert_nothing.code) == (2, 2)
    assert nothing.out + nothing.err == helps[""].out
    assert alert_nothing.out + alert_nothing.err == helps["alert"].out


def test_warmup_says_where_the_kernels_are(folder: Path) -> None:
    ended = run("warmup", folder=folder)
    assert ended.code == 0
    where = re.fullmatch(r"kernels: (.+)\n", ended.err)
    assert where
    assert Path(where[1]).is_dir()


def test_a_url_with_a_password_never_shows_it(folder: Path) -> None:
    urls = ["redis://:hunter2@127.0.0.1:1", "redis://me:hunter2@127.0.0.1:port", "http://me:hunter2@x"]
    for ended in run_all([["alert", "list", "--valkey", url] for url in urls], folder):
        assert ended.code in (1, 2)
        assert "hunter2" not in json.dumps([ended.out, ended.err]), ended.err
