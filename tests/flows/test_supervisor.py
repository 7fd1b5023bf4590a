"""The supervisor of the embedded server. Its clock is virtual where it waits; servers and processes are real."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from flows import embedded as embedded_module
from flows import supervisor as module
from flows.embedded import EmbeddedServer
from flows.guards import PINGS_HELD_KEY
from flows.metrics import Metrics
from flows.server import connect
from flows.supervisor import Supervisor
from loadtest import faults
from tests.flows.waiting import eventually

PATIENCE_S = 30.0


class Watched:
    """A server and its supervisor, stepped by hand, by a clock that a test moves."""

    def __init__(self, server: EmbeddedServer) -> None:
        self.server = server
        self.now_s = 1000.0
        self.metrics = Metrics()
        self.said: list[str] = []
        self.supervisor = Supervisor(server, self.metrics, self.said.append, lambda: self.now_s)

    def step(self, seconds: float = 0.0) -> None:
        self.now_s += seconds
        self.supervisor.step()

    def kill(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        eventually(lambda: self.server.ended() is not None)

    def restarts(self) -> float:
        return self.metrics.value("server_restarts_total")

    def alarms(self) -> dict[str, str]:
        return {alarm.kind: alarm.words for alarm in self.metrics.alarms.current()}


def start(directory: Path) -> EmbeddedServer:
    return EmbeddedServer.start(directory, port=0, memory_bytes_max=64 << 20)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with start(tmp_path / "v") as server:
        watched = Watched(server)
        yield watched
        watched.supervisor.stop()


@contextmanager
def connected(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    yield client
    client.close()


def test_a_killed_server_is_started_again_with_the_same_socket_port_and_data(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    server = watched.server
    before = server.pid, server.url, server.tcp_url
    with connected(server) as client:
        client.set("k", "v")
    watched.step()
    watched.kill()
    watched.step(0.1)
    assert server.pid != before[0]
    assert (server.url, server.tcp_url) == before[1:]
    for url in (server.url, server.tcp_url):
        assert url is not None
        client = connect(url)
        assert client.get("k") == b"v"
        client.close()
    assert watched.restarts() == 1
    assert "was killed by SIGKILL; it is started again" in caplog.text
    assert "supervisor" in watched.alarms()
    watched.step(0.1)
    assert watched.alarms() == {}


def test_a_server_that_ends_again_and_again_is_started_ever_later(watched: Watched) -> None:
    for _ in range(3):
        watched.kill()
        watched.step(0.1)
        for _ in range(4):
            watched.step(0.1)
    assert watched.restarts() == 3
    watched.kill()
    watched.step(0.1)
    watched.step(0.2)
    assert watched.restarts() == 3, "the third one did not last, so the fourth waits for 0.4 s"
    watched.step(0.2)
    assert watched.restarts() == 4
    watched.step(1.0)
    assert "supervisor" in watched.alarms(), "it is not known yet whether this one lasts"
    watched.step(10.0)
    assert watched.alarms() == {}
    watched.kill()
    watched.step(0.1)
    assert watched.restarts() == 5, "one that lasted is started again at once"


def test_a_cut_file_is_loaded_without_its_last_command_and_that_is_said(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(watched.server) as client:
        client.set("kept", "1")
        client.set("lost", "2")
    watched.kill()
    file = faults.append_only_file(watched.server.directory)
    size = file.stat().st_size
    faults.lose_tail(file, size - 5)
    watched.step(0.1)
    with connected(watched.server) as client:
        assert (client.get("kept"), client.get("lost")) == (b"1", None)
    assert f"{file} was cut in the middle of a command, at byte " in caplog.text


def test_a_damaged_file_is_named_and_left_alone_and_tried_again_until_somebody_has_mended_it(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(watched.server) as client:
        for number in range(100):
            client.set(f"key-{number}", number)
    watched.kill()
    file = faults.append_only_file(watched.server.directory)
    good = file.read_bytes()
    faults.damage(file, good.index(b"*3", 500))
    damaged = file.read_bytes()
    for _ in range(3):
        watched.step(1.0)
    assert watched.restarts() == 0
    words = watched.alarms()["supervisor"]
    assert f"{file} is damaged before its end. Nothing was changed." in words
    assert "valkey-check-aof" in words and str(file.parent / "appendonly.aof.manifest") in words
    assert file.read_bytes() == damaged
    assert 1 <= caplog.text.count("the embedded server is not running (try ") <= 2
    file.write_bytes(good)
    watched.step(31.0)
    assert watched.restarts() == 1
    with connected(watched.server) as client:
        assert client.dbsize() == 100


def test_the_command_that_an_error_names_mends_the_file(watched: Watched) -> None:
    with connected(watched.server) as client:
        client.set("kept", "1")
        client.set("damaged", "2")
    watched.kill()
    file = faults.append_only_file(watched.server.directory)
    faults.damage(file, file.read_bytes().rindex(b"*3"))
    watched.step(0.1)
    _, _, command = watched.alarms()["supervisor"].rpartition(": bash -c ")
    assert command.startswith("'exec -a valkey-check-aof ")
    subprocess.run(f"bash -c {command}", shell=True, input=b"y\n", check=True, capture_output=True)
    watched.step(31.0)
    with connected(watched.server) as client:
        assert (client.get("kept"), client.get("damaged")) == (b"1", None)


def test_a_start_with_a_damaged_file_fails_and_says_what_to_do(tmp_path: Path) -> None:
    with start(tmp_path) as server, connected(server) as client:
        for number in range(100):
            client.set(f"key-{number}", number)
    file = faults.append_only_file(tmp_path)
    faults.damage(file, file.read_bytes().index(b"*3", 500))
    with pytest.raises(RuntimeError, match="is damaged before its end") as caught:
        start(tmp_path)
    assert str(file) in str(caught.value)


def test_a_server_that_hangs_is_never_started_a_second_time(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.embedded.START_TIMEOUT_S", 0.1)
    with faults.hung(watched.server.pid):
        watched.step(1.0)
        assert watched.server.ended() is None
        with pytest.raises(RuntimeError, match=f"process {watched.server.pid}\\) gave no answer"):
            start(watched.server.directory)
    assert watched.restarts() == 0


def test_the_file_of_a_server_that_runs_is_kept_out_of_the_page_cache(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[int] = []
    monkeypatch.setattr(embedded_module, "drop_cache", lambda descriptor: dropped.append(os.fstat(descriptor).st_ino))
    watched.step()
    folder = watched.server.directory / "appendonlydir"
    assert sorted(dropped) == sorted(path.stat().st_ino for path in folder.glob("*.aof"))
    assert dropped
    dropped.clear()
    watched.kill()
    watched.step()
    assert not dropped, "a server that is started reads its file"


def deleted_bytes(folder: Path) -> int:
    """Of files of that folder which have no name any more, and are open here."""
    sizes = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(link).startswith(str(folder)) and os.readlink(link).endswith("(deleted)"):
                sizes[link.stat().st_ino] = link.stat().st_size
    return sum(sizes.values())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_what_a_rewrite_deletes_leaves_the_disk_in_pieces_or_at_once_if_the_disk_is_short(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = watched.server.directory / "appendonlydir"
    monkeypatch.setattr(embedded_module, "FREED_BYTES", 1000)
    with connected(watched.server) as client:

        def rewrite() -> None:
            client.set("large", "x" * 100_000)
            watched.step()
            client.bgrewriteaof()
            eventually(lambda: client.info("persistence")["aof_rewrite_in_progress"] == 0)
            eventually(lambda: deleted_bytes(folder) > 0)

        rewrite()
        before = deleted_bytes(folder)
        assert before > 100_000
        watched.step()
        assert 0 < before - deleted_bytes(folder) <= 1000
        for _ in range(before // 1000 + 2):
            watched.step()
        assert deleted_bytes(folder) == 0
        rewrite()
        monkeypatch.setattr(module, "DISK_SHORT_BYTES", 1 << 62)
        monkeypatch.setattr(module, "DISK_SHORT_SHARE", 1.0)
        watched.step(1.0)
        assert deleted_bytes(folder) == 0


def test_a_disk_that_is_nearly_full_holds_pings_back(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.step(1.0)
    assert watched.alarms() == {}
    assert watched.metrics.value("server_disk_free_bytes") > 0
    monkeypatch.setattr(module, "DISK_SHORT_BYTES", 1 << 62)
    monkeypatch.setattr(module, "DISK_SHORT_SHARE", 1.0)
    watched.step(1.0)
    assert "MB are free where" in watched.alarms()["disk"]
    with connected(watched.server) as client:
        held = client.get(PINGS_HELD_KEY)
        assert isinstance(held, bytes) and b"MB are free where" in held
        assert 0 < client.ttl(PINGS_HELD_KEY) <= module.HELD_EXPIRY_S
    monkeypatch.setattr(module, "DISK_SHORT_SHARE", 0.0)
    watched.step(1.0)
    assert watched.alarms() == {}


def test_without_room_on_the_disk_the_server_is_not_started(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DISK_FULL_BYTES", 1 << 62)
    monkeypatch.setattr(module, "DISK_FULL_SHARE", 1.0)
    watched.kill()
    watched.step(0.1)
    assert "it waits for room on its disk" in watched.alarms()["supervisor"]
    assert watched.server.ended() is not None
    monkeypatch.setattr(module, "DISK_FULL_SHARE", 0.0)
    watched.step(31.0)
    assert watched.server.ended() is None


# ---- several processes

_OTHER = """
import sys, time; from pathlib import Path
from flows.metrics import Metrics; from flows.embedded import EmbeddedServer; from flows.supervisor import Supervisor
own = EmbeddedServer.start(Path(sys.argv[1]), port=None, memory_bytes_max=64 << 20)
supervisor = Supervisor(own, Metrics()); supervisor.start()
print(own.owned, own.pid, flush=True); sys.stdin.readline()
supervisor.stop(); own.close(); print("closed", flush=True)
"""


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _OTHER, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            yield other
        finally:
            other.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def running(server: EmbeddedServer) -> Supervisor:
    supervisor = Supervisor(server, Metrics())
    supervisor.start()
    return supervisor


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[Path]:
    """A server's directory that several processes use; whatever happens, no server is left behind."""
    yield tmp_path
    if alive(tmp_path) is not None:
        start(tmp_path).close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW_POLL_S", 0.05)
    monkeypatch.setattr(module, "POLL_S", 0.02)


@pytest.mark.usefixtures("quick")
def test_only_the_owner_starts_the_server_again(shared: Path) -> None:
    with other_process(shared) as other:
        assert line_of(other).startswith("True ")
        joined = start(shared)
        supervisor = running(joined)
        killed = joined.pid
        os.kill(killed, signal.SIGKILL)
        eventually(lambda: alive(shared) not in (None, killed), timeout_s=PATIENCE_S)
        assert not joined.owned
        supervisor.stop()
        joined.close()
        assert alive(shared) is not None
        other.communicate("\n")
    assert alive(shared) is None


def alive(directory: Path) -> int | None:
    found = EmbeddedServer.find(directory)
    return None if found is None else found.pid


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["killed", "stopped cleanly"])
def test_when_the_owner_is_gone_another_process_becomes_it(how: str, shared: Path) -> None:
    with other_process(shared) as other:
        assert line_of(other).startswith("True ")
        joined = start(shared)
        pid = joined.pid
        supervisor = running(joined)
        time.sleep(0.2)
        assert not joined.owned
        if how == "killed":
            other.kill()
        else:
            other.communicate("\n")
        eventually(lambda: joined.owned, timeout_s=PATIENCE_S)
        assert alive(shared) == pid, "the server runs on, for whoever still uses it"
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: alive(shared) not in (None, pid), timeout_s=PATIENCE_S)
        supervisor.stop()
        joined.close()
    assert alive(shared) is None


@pytest.mark.usefixtures("quick")
def test_a_clean_end_starts_nothing(tmp_path: Path) -> None:
    server = start(tmp_path)
    supervisor = running(server)
    time.sleep(0.2)
    supervisor.stop()
    server.close()
    assert alive(tmp_path) is None
    assert supervisor._metrics.value("server_restarts_total") == 0


def test_a_server_that_somebody_else_has_started_again_is_not_started_twice(watched: Watched) -> None:
    watched.kill()
    with start(watched.server.directory) as again:
        watched.step(0.1)
        assert watched.server.pid == again.pid
        assert watched.server.ended() is None
        watched.step(0.1)
    eventually(lambda: alive(watched.server.directory) is None)
