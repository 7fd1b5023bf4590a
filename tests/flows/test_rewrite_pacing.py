"""The child that rewrites a server's file is held back, and never left stopped. Server and child are real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import redis

from flows.embedded import EmbeddedServer
from flows.metrics import Metrics
from flows.rewrite_pacing import hold_back
from flows.server import connect
from flows.supervisor import Supervisor
from tests.flows.waiting import eventually

KEYS = 200


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(tmp_path / "v", port=None, memory_bytes_max=64 << 20) as server:
        yield server


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    client.mset({f"key{number}": "value" for number in range(KEYS)})
    yield client
    client.close()


def rewriting(client: redis.Redis, server: EmbeddedServer, key_us: int) -> psutil.Process:
    """Begin a rewrite in which every key takes so many microseconds; its child."""
    client.config_set("rdb-key-save-delay", key_us)
    client.bgrewriteaof()
    eventually(lambda: bool(server.rewriting_children()))
    (child,) = server.rewriting_children()
    return child


@contextmanager
def held_back(server: EmbeddedServer) -> Iterator[None]:
    stopping = threading.Event()
    thread = threading.Thread(target=hold_back, args=(server.rewriting_children, stopping))
    thread.start()
    yield
    stopping.set()
    thread.join()


def ended_well(client: redis.Redis) -> bool:
    facts = client.info("persistence")
    return bool(facts["aof_rewrite_in_progress"] == 0 and facts["aof_last_bgrewrite_status"] == "ok")


def is_stopped(child: psutil.Process) -> bool:
    return bool(child.status() == psutil.STATUS_STOPPED)


def test_the_child_of_this_server_is_found_and_no_other(server: EmbeddedServer, client: redis.Redis) -> None:
    assert server.rewriting_children() == []
    child = rewriting(client, server, 100_000)
    assert child.ppid() == server.pid
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (str(os.getpid()), f"bg-{os.getpid()}", str(gone.pid), "bg-", "x"):
        (server.directory / f"temp-rewriteaof-{name}.aof").touch()
    assert server.rewriting_children() == [child]


def test_a_process_that_does_not_look_after_the_server_holds_nothing_back(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    rewriting(client, server, 100_000)
    other = EmbeddedServer.find(server.directory)
    assert other is not None
    assert other.rewriting_children() == []


def test_the_child_is_stopped_and_let_go_in_turn_and_ends_well(server: EmbeddedServer, client: redis.Redis) -> None:
    child = rewriting(client, server, 5_000)
    with held_back(server):
        for _ in range(2):
            eventually(lambda: is_stopped(child))
            eventually(lambda: not is_stopped(child))
        eventually(lambda: ended_well(client))
        rewriting(client, server, 1_000)
        eventually(lambda: ended_well(client))


def test_a_supervisor_holds_the_child_back_and_lets_it_go_at_its_end(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    child = rewriting(client, server, 100_000)
    supervisor = Supervisor(server, Metrics())
    supervisor.start()
    eventually(lambda: is_stopped(child))
    supervisor.stop()
    assert not is_stopped(child)


def test_a_child_that_was_left_stopped_goes_on_under_the_next_pacer(
    server: EmbeddedServer, client: redis.Redis
) -> None:
    """As after the death of the process that looked after the server."""
    child = rewriting(client, server, 100)
    child.suspend()
    eventually(lambda: is_stopped(child))
    with held_back(server):
        eventually(lambda: ended_well(client))


def test_a_child_whose_server_was_killed_as_well_goes_on_to_its_end(tmp_path: Path) -> None:
    """It would keep the memory of its server for ever."""
    directory = tmp_path / "v"
    server = EmbeddedServer.start(directory, port=None, memory_bytes_max=64 << 20)
    client = connect(server.url)
    client.mset({f"key{number}": "value" for number in range(KEYS)})
    child = rewriting(client, server, 100)
    child.suspend()
    client.close()
    os.kill(server.pid, signal.SIGKILL)
    eventually(lambda: server.ended() is not None)
    server.revive(lambda _: None)
    with held_back(server):
        eventually(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    server.close()


def test_a_server_whose_child_was_left_stopped_ends_when_it_is_asked_to(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "v", port=None, memory_bytes_max=64 << 20) as server:
        client = connect(server.url)
        client.mset({f"key{number}": "value" for number in range(KEYS)})
        rewriting(client, server, 100_000).suspend()
        client.close()
    assert EmbeddedServer.find(tmp_path / "v") is None
