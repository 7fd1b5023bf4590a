"""Tile38 (https://tile38.com): SET of every ping, one NEARBY ... FENCE for every alert, its messages read by a client.

Measured where a `tile38-server` is on PATH. Its fences are channels (SETCHAN), which it finds by an index of their
bounds, and not live connections, each of which looks at every SET (https://tile38.com/commands/setchan).
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import orjson
import psutil
import redis

from flows.server import connect, packed
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.peer_valkey import members, wait_for
from loadtest.bench.traffic import SentPings

PROGRAM = "tile38-server"
ABSENT = f"no {PROGRAM} on PATH"
KEY = "phones"
COMMANDS_AT_ONCE = 500
"""Pipelined: sent before their answers are read."""
RADIUS_RATIO = 6371000.0 / 6371008.8
"""Tile38's earth is a little smaller."""
EDGE_SHARE = 0.0013
"""Of the radius: a fence's circle is a polygon of 64 sides to it, 1 - cos(pi / 64) = 0.0012 of the radius off."""
QUIET_S = 1.0


def run(workload: Workload) -> PeerRun | None:
    """A server without persistence and two clients: one sends what was packed before the time runs, one listens."""
    if shutil.which(PROGRAM) is None:
        return None
    with tile38_server() as (client, pid):
        connection = _connection(client)
        for sent in workload.before:
            _send(connection, list(_commands(workload, sent)))
        fences = [
            packed(
                *("SETCHAN", active.alert.alert_id, "NEARBY", KEY, "FENCE", "DETECT", "enter", "COMMANDS", "set"),
                *("POINT", repr(active.alert.lat), repr(active.alert.lng), repr(active.ring_km * 1000 * RADIUS_RATIO)),
            )
            for active in workload.alerts
        ]
        _send(connection, fences)
        listener = _Listener(client)
        commands = [list(_commands(workload, sent)) for sent in workload.measured]
        cpu_before_s, started_s = _cpu_s(pid), time.perf_counter()
        for batch in commands:
            _send(connection, batch)
        seconds = time.perf_counter() - started_s
        cores = (_cpu_s(pid) - cpu_before_s) / seconds
        told = listener.told()
        connection.disconnect()
    words = (
        f"{PROGRAM} --appendonly no --spinlock, unix socket, SETs packed before the time runs and pipelined "
        f"{COMMANDS_AT_ONCE} at a time, {len(fences)} SETCHAN ... NEARBY ... FENCE DETECT enter COMMANDS set, messages "
        "read over one subscription. Less work than ours: late pings would move a phone, a phone that comes back is "
        "told again, nobody who is inside when the alert comes is told, nothing is durable, a circle is a polygon of "
        "64 sides"
    )
    edge_m = max(active.ring_km for active in workload.alerts) * 1000 * EDGE_SHARE
    return PeerRun(workload.ping_count / seconds, cores, told, words, "flow", edge_m)


@contextmanager
def tile38_server() -> Iterator[tuple[redis.Redis, int]]:
    """A server of its own on 127.0.0.1, without persistence; a client and its process id."""
    with tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        path = Path(folder) / "tile38.sock"
        command = [PROGRAM, "-h", "127.0.0.1", "-p", str(port), "-s", str(path), "-d", folder, "-q"]
        probe.close()
        process = subprocess.Popen(
            [*command, "--appendonly", "no", "--spinlock"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        client = connect(f"unix://{path}")
        try:
            wait_for(client, process)
            yield client, process.pid
        finally:
            client.close()
            process.terminate()
            process.wait()


class _Listener:
    """Reads the fences' messages in a thread."""

    def __init__(self, client: redis.Redis) -> None:
        self._pubsub: Any = cast(Any, client).pubsub()
        self._pubsub.psubscribe("*")
        self._told: set[Told] = set()
        self._heard_s = time.monotonic()
        self._stopping = False
        self._thread = threading.Thread(target=self._listen, name="tile38", daemon=True)
        self._thread.start()
        time.sleep(0.2)

    def told(self) -> set[Told]:
        """Everything heard, after a second of silence."""
        while time.monotonic() - self._heard_s < QUIET_S:
            time.sleep(0.05)
        self._stopping = True
        self._thread.join()
        self._pubsub.close()
        return self._told

    def _listen(self) -> None:
        while not self._stopping:
            message = self._pubsub.get_message(timeout=0.2)
            if message is None or message["type"] != "pmessage":
                continue
            self._heard_s = time.monotonic()
            entered = orjson.loads(message["data"])
            partner, _, device_id = entered["id"].partition("/")
            self._told.add((entered["hook"], partner, device_id))


def _connection(client: redis.Redis) -> Any:
    connection: Any = client.connection_pool.make_connection()
    connection.health_check_interval = 0
    connection.connect()
    return connection


def _commands(workload: Workload, sent: SentPings) -> Iterator[bytes]:
    for member, lng, lat in members(workload, sent):
        yield packed("SET", KEY, member, "POINT", lat, lng)


def _send(connection: Any, commands: list[bytes]) -> None:
    for start in range(0, len(commands), COMMANDS_AT_ONCE):
        portion = commands[start : start + COMMANDS_AT_ONCE]
        connection.send_packed_command([b"".join(portion)], check_health=False)
        for _ in portion:
            reply = connection.read_response()
            assert reply == b"OK" or reply == 1, reply


def _cpu_s(pid: int) -> float:
    own, server = psutil.Process().cpu_times(), psutil.Process(pid).cpu_times()
    return float(own.user + own.system + server.user + server.system)
