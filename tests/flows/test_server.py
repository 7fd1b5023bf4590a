"""What we ask of a server, links to one run of it, and the embedded one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from flows import embedded
from flows.embedded import EmbeddedServer, file_growth_percent
from flows.server import Link, ServerRefused, check_server, connect, masked_url, packed
from tests.flows.waiting import eventually

# --- urls -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://user:secret@host:6379/0", "redis://user:***@host:6379/0"),
        ("rediss://:se:cr/e@t@host", "rediss://:***@host"),
        ("unix:///run/valkey.sock?db=0&password=secret", "unix:///run/valkey.sock?db=0&password=***"),
        ("redis://host:6379", "redis://host:6379"),
    ],
)
def test_passwords_are_masked(url: str, masked: str) -> None:
    assert masked_url(url) == masked


@pytest.mark.parametrize("url", ["host:6379", "http://x:secret@host", "", "redis://:secret@host?socket_timeout=abc"])
def test_url_of_no_server_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ValueError, match="a server's url must") as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["valkey", "redis"])
def test_server_is_reached_over_tcp(session_server: EmbeddedServer, scheme: str) -> None:
    assert session_server.tcp_url is not None
    client = connect(session_server.tcp_url.replace("redis", scheme))
    assert client.ping()
    client.close()


def test_client_does_not_try_again_by_itself(tmp_path: Path) -> None:
    client = connect(f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(redis.ConnectionError):
        client.ping()


# --- what is asked of a server ----------------------------------------------------------------------------------------


def test_embedded_server_keeps_what_it_acknowledges(client: redis.Redis) -> None:
    assert check_server(client) == client.info("server")["run_id"]


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [("appendfsync", "everysec", "always"), ("maxmemory-policy", "allkeys-lru", "noeviction")],
)
def test_server_that_may_lose_something_is_refused(client: redis.Redis, name: str, value: str, good: str) -> None:
    client.config_set(name, value)
    try:
        with pytest.raises(ServerRefused) as caught:
            check_server(client)
        assert f"the server must run with {name} {good}" in str(caught.value)
        assert f"got {value}; set it, or pass --unsafe-server" in str(caught.value)
        assert check_server(client, unsafe=True)
    finally:
        client.config_set(name, good)


def test_server_that_hides_its_settings_is_refused(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "shy", "on", ">secret", "~*", "+@all", "-config")  # type: ignore[no-untyped-call]
    path = client.connection_pool.connection_kwargs["path"]
    shy = connect(f"unix://shy:secret@{path}")
    try:
        with pytest.raises(ServerRefused, match="the server does not tell its settings"):
            check_server(shy)
        assert check_server(shy, unsafe=True)
    finally:
        shy.close()
        client.execute_command("ACL", "DELUSER", "shy")  # type: ignore[no-untyped-call]


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def link(client: redis.Redis) -> Iterator[Link]:
    link = Link(client)
    yield link
    link.close()


def test_command_is_packed_as_the_protocol_says() -> None:
    assert packed("SET", b"\x00\r\n", 12) == b"*3\r\n$3\r\nSET\r\n$3\r\n\x00\r\n\r\n$2\r\n12\r\n"


def test_commands_sent_together_are_answered_in_order(link: Link) -> None:
    large = bytes(300_000)
    link.send([packed("SET", "k", large), packed("GET", "k"), packed("NONSENSE"), packed("STRLEN", "k")])
    assert link.receive() == b"OK"
    assert link.receive() == large
    assert isinstance(link.receive(), redis.ResponseError)
    assert link.receive() == 300_000


def test_error_reply_to_ask_is_raised(link: Link) -> None:
    with pytest.raises(redis.ResponseError, match="unknown command"):
        link.ask("NONSENSE")
    assert link.ask("PING") == b"PONG"


def test_link_knows_its_run_and_the_servers_clock(client: redis.Redis, link: Link) -> None:
    assert link.run_id == client.info("server")["run_id"]
    seconds, microseconds = client.time()
    assert abs(link.now_ms() - (seconds * 1000 + microseconds / 1000)) < 500


def test_broken_link_stays_broken(client: redis.Redis, link: Link) -> None:
    client.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(redis.ConnectionError):
        link.ask("PING")
    for _ in range(2):
        with pytest.raises(redis.ConnectionError, match="this link to the server is broken"):
            link.ask("PING")
        with pytest.raises(redis.ConnectionError, match="this link to the server is broken"):
            link.receive()


def test_there_is_no_last_link_however_often_the_server_goes_away(client: redis.Redis) -> None:
    for _ in range(150):
        Link(client).close()
    assert Link(client).ask("PING") == b"PONG"


def test_link_closed_by_another_thread_ends_the_wait(link: Link) -> None:
    timer = threading.Timer(0.05, link.close)
    timer.start()
    with pytest.raises(redis.ConnectionError):
        link.ask("XREAD", "BLOCK", 5000, "STREAMS", "nothing", "0")
    timer.join()


# --- the embedded server ----------------------------------------------------------------------------------------------


def start(directory: Path) -> EmbeddedServer:
    return EmbeddedServer.start(directory, port=None, memory_bytes_max=64 << 20)


def test_server_is_started_found_and_stopped(tmp_path: Path) -> None:
    assert EmbeddedServer.find(tmp_path / "v") is None
    with start(tmp_path / "v") as own:
        assert own.owned
        assert own.tcp_url is None
        found = EmbeddedServer.find(tmp_path / "v")
        assert found is not None
        assert (found.url, found.pid, found.owned) == (own.url, own.pid, False)
        found.close()
        client = connect(found.url)
        assert client.ping()
        client.close()
    assert EmbeddedServer.find(tmp_path / "v") is None


def test_data_outlives_the_server(tmp_path: Path) -> None:
    for number in range(3):
        with start(tmp_path) as own:
            client = connect(own.url)
            assert client.incr("starts") == number + 1
            client.close()


def test_second_start_joins_the_server_that_runs(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flows.embedded import EmbeddedServer\n"
        "own = EmbeddedServer.start(Path(sys.argv[1]), port=None)\n"
        "print(own.owned, own.pid, flush=True); sys.stdin.read(); own.close()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        owned, pid = other.stdout.readline().split()
        joined = start(tmp_path)
        assert (owned, joined.owned, joined.pid) == ("True", False, int(pid))
        joined.close()
        assert EmbeddedServer.find(tmp_path) is not None
        other.communicate("")
    assert EmbeddedServer.find(tmp_path) is None


def test_server_whose_flow_was_killed_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from flows.embedded import EmbeddedServer\n"
        "EmbeddedServer.start(Path(sys.argv[1]), port=None); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    left_over = EmbeddedServer.find(tmp_path)
    assert left_over is not None
    with start(tmp_path) as taken_over:
        assert (taken_over.owned, taken_over.pid) == (True, left_over.pid)
    assert EmbeddedServer.find(tmp_path) is None


def test_killed_server_is_started_again_with_its_data(tmp_path: Path) -> None:
    own = start(tmp_path)
    client = connect(own.url)
    client.set("k", "v")
    client.close()
    os.kill(own.pid, signal.SIGKILL)
    eventually(lambda: EmbeddedServer.find(tmp_path) is None)
    own.close()
    with start(tmp_path) as again:
        assert again.pid != own.pid
        client = connect(again.url)
        assert client.get("k") == b"v"
        client.close()


def test_stale_state_with_the_pid_of_a_stranger_is_not_believed(tmp_path: Path) -> None:
    stranger = {"pid": os.getpid(), "socket_path": str(tmp_path / "valkey.sock"), "port": 0, "owner_pid": 1}
    (tmp_path / "server.json").write_text(json.dumps(stranger))
    assert EmbeddedServer.find(tmp_path) is None
    with start(tmp_path) as own:
        assert own.pid != os.getpid()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_damaged_state_is_not_believed(tmp_path: Path, text: str) -> None:
    (tmp_path / "server.json").write_text(text)
    assert EmbeddedServer.find(tmp_path) is None


def test_embedded_server_keeps_memory_it_freed_and_rewrites_no_small_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        environments.append(options["env"])
        return popen(*arguments, **options)

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "4096")
    with start(tmp_path / "v") as own:
        (environment,) = environments
        assert environment["MALLOC_TRIM_THRESHOLD_"] == str(1 << 30)
        assert environment["MALLOC_TOP_PAD_"] == "4096", "what somebody has set stays"
        client = connect(own.url)
        assert client.config_get("auto-aof-rewrite-min-size") == {"auto-aof-rewrite-min-size": str(16 << 20)}
        client.close()


def test_the_servers_memory_is_in_large_pages_where_the_kernel_offers_them(own_server: EmbeddedServer) -> None:
    client = connect(own_server.url)
    assert client.config_get("disable-thp") == {"disable-thp": "no"}
    client.set("large", b"v" * (16 << 20))
    client.close()
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if "[madvise]" not in (offered.read_text() if offered.exists() else ""):
        pytest.skip("the kernel gives large pages to everybody or to nobody")
    flags = re.findall(r"^VmFlags:(.*)$", Path(f"/proc/{own_server.pid}/smaps").read_text(), re.MULTILINE)
    assert any(" hg" in of_region for of_region in flags)


@pytest.mark.parametrize(
    ("room_gb", "percent"),
    [(1000, 300), (50, 300), (49, 290), (35, 150), (30, 100), (5, 100), (0, 100)],
)
def test_file_grows_as_far_as_the_disk_has_room(room_gb: int, percent: int) -> None:
    """10 GB of data: 50 GB hold a file of 40 and the next one of 10."""
    assert file_growth_percent(room_gb << 30, 10 << 30) == percent


def test_embedded_server_counts_its_own_file_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmp_path / "v" / "appendonlydir"
    with start(tmp_path / "v"):
        pass
    (files / "left.aof").write_bytes(bytes(64 << 20))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=128 << 20))
    with start(tmp_path / "v") as own:
        client = connect(own.url)
        assert client.config_get("auto-aof-rewrite-percentage") == {"auto-aof-rewrite-percentage": "100"}
        client.close()
    (files / "left.aof").write_bytes(bytes(160 << 20))
    with start(tmp_path / "v") as own:
        client = connect(own.url)
        (growth,) = client.config_get("auto-aof-rewrite-percentage").values()
        assert int(str(growth)) >= 250
        client.close()


def test_directory_too_long_for_a_socket_gets_one_elsewhere(tmp_path: Path) -> None:
    directory = tmp_path / ("d" * 60) / ("e" * 60)
    with start(directory) as own:
        assert len(own.url) < 120
        assert not own.url.startswith(f"unix://{directory}")
        assert EmbeddedServer.find(directory) is not None
        client = connect(own.url)
        assert client.config_get("dir")["dir"] == str(directory)
        client.close()


def test_directory_with_spaces_and_letters_of_any_kind_is_served(tmp_path: Path) -> None:
    with start(tmp_path / "团圆 % & #") as own:
        client = connect(own.url)
        assert client.ping()
        client.close()


def test_chosen_port_is_taken(tmp_path: Path) -> None:
    port = embedded._free_port()
    with EmbeddedServer.start(tmp_path, port=port) as own:
        assert own.tcp_url == f"redis://127.0.0.1:{port}/0"


def test_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("a file where a folder must be")
    with pytest.raises(RuntimeError, match="the embedded server ended at its start") as caught:
        start(tmp_path)
    assert "append" in str(caught.value).lower()


def test_others_cannot_reach_the_socket(tmp_path: Path) -> None:
    with start(tmp_path / "v") as own:
        assert (tmp_path / "v").stat().st_mode & 0o077 == 0
        assert Path(own.url.removeprefix("unix://")).stat().st_mode & 0o077 == 0


def test_two_starts_at_once_give_one_server(tmp_path: Path) -> None:
    started: list[EmbeddedServer] = []
    threads = [threading.Thread(target=lambda: started.append(start(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({own.pid for own in started}) == 1
    for own in started:
        own.close()
    assert EmbeddedServer.find(tmp_path) is None


def test_expected_replies_are_taken_and_others_left_to_be_received(client: redis.Redis) -> None:
    link = Link(client)
    link.send([packed("MULTI"), packed("PING"), packed("EXEC"), packed("PING")])
    assert not link.skip(b"+QUEUED\r\n")
    assert link.skip(b"+OK\r\n+QUEUED\r\n")
    assert link.receive() == [b"PONG"]
    assert link.receive() == b"PONG"
    link.close()
    with pytest.raises(redis.ConnectionError, match="broken"):
        link.skip(b"+OK\r\n")


def test_link_that_waits_in_vain_for_expected_replies_is_broken(client: redis.Redis) -> None:
    link = Link(client, answer_timeout_s=0.05)
    with pytest.raises(redis.ConnectionError, match="the link to the server broke"):
        link.skip(b"+OK\r\n")
    with pytest.raises(redis.ConnectionError, match="broken"):
        link.receive()
