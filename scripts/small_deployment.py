"""A whole small deployment on this machine, for tests of the page and for its pictures: server, flow, gateway, phones.

phones ──Client──> gateway ──> logs ──> flow ──> queues        officer, operator ──> the page
"""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from flows.embedded import EmbeddedServer
from flows.server import connect
from gateway.accounts import Accounts
from gateway.client import Client
from gateway.keys import Sealer
from loadtest.world import World
from tuanyuan.commands.demo import hand_over
from tuanyuan.connection import settings_of

START_TIMEOUT_S = 90.0
BATCH = 20_000


class Process:
    """One of our own commands; what it says is in a file."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self._log = folder / f"{name}-{time.monotonic_ns()}.log"
        with self._log.open("wb") as log:
            command = [sys.executable, "-m", "tuanyuan.cli", name, *arguments]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait_for(self, words: str) -> str:
        """What it said, once these words are in it. Raises RuntimeError if it ends or takes too long."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while words not in (said := self._log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"no {words!r} was said: {said[-2000:]}")
            time.sleep(0.05)
        return said

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it, and wait for its end."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class SmallDeployment:
    """A context manager. `url` stays the same when the gateway is stopped and started again."""

    def __init__(self, folder: Path, shard_count: int = 2) -> None:
        self._folder = folder
        self._shard_count = shard_count
        self._exits = contextlib.ExitStack()
        self._port = _free_port()
        self._gateway: Process | None = None
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> SmallDeployment:
        with contextlib.ExitStack() as exits:
            server = exits.enter_context(EmbeddedServer.start(self._folder / "valkey", port=None))
            self._server_url = server.url
            self.client = connect(server.url)
            exits.callback(self.client.close)
            flow = Process(
                self._folder,
                *("run", "--valkey", server.url, "--var", str(self._folder), "--quiet"),
                *("--shard-count", str(self._shard_count)),
            )
            exits.callback(flow.end)
            flow.wait_for("ready;")
            settings_of(self.client)
            self.start_gateway()
            exits.callback(self.stop_gateway)
            self.accounts = Accounts(self.client, Sealer.read(self._folder / "gateway.key"))
            self._exits = exits.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._exits.close()

    def start_gateway(self) -> None:
        """Start it, and wait until it is ready."""
        self._gateway = Process(
            self._folder,
            *("serve", "--valkey", self._server_url, "--var", str(self._folder), "--port", str(self._port)),
            *("--quiet", "--public-url", self.url),
        )
        said = self._gateway.wait_for("ready;")
        assert re.search(rf":{self._port}\b", said), "it listens where it was told to"

    def stop_gateway(self, number: int = signal.SIGTERM) -> None:
        """End it; the port stays free for the next one."""
        if self._gateway is not None:
            self._gateway.end(number)
            self._gateway = None

    @contextlib.contextmanager
    def phones(self, world: World, pings_per_s: int = 0) -> Iterator[None]:
        """Each phone of the world is seen once; then so many pings a second come, and pushes are taken, in threads."""
        clients = [
            Client(self.url, self.accounts.add_partner(name, requests_per_s=1_000.0).text)
            for name in world.partner_names
        ]
        senders = [client.pings() for client in clients]
        stopping = threading.Event()

        def send() -> None:
            while not stopping.wait(0.2):
                hand_over(world.batch(pings_per_s // 5, _now_ms()), senders)

        def take(client: Client) -> None:
            while not stopping.is_set():
                pushes, _ = client.poll(100, 1.0)
                client.acknowledge(push.id for push in pushes)

        for batch in world.first_sight(_now_ms(), BATCH):
            hand_over(batch, senders)
        for sender in senders:
            sender.flush(START_TIMEOUT_S)
        threads = [threading.Thread(target=take, args=(client,), daemon=True) for client in clients]
        if pings_per_s:
            threads.append(threading.Thread(target=send, daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stopping.set()
            for thread in threads:
                thread.join(30)
            for sender in senders:
                sender.close(START_TIMEOUT_S)
            for client in clients:
                client.close()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _now_ms() -> int:
    return round(time.time() * 1000)
