"""What is broken between a flow and its server, and around them: connections, the network, the disk, files.

Each injector undoes what it did when it is closed. Networks and disks need root on Linux: `need_root` says so.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.embedded import EmbeddedServer

CHUNK_BYTES = 256 << 10


class NotHere(Exception):
    """This machine or this user cannot play a scenario. The message says what it needs."""


def need_root(tool: str) -> str:
    """The path of a tool that only root can use. Raises NotHere."""
    found = shutil.which(tool)
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or found is None:
        raise NotHere(f"needs Linux, root and the command `{tool}`")
    return found


def kill_server(server: EmbeddedServer) -> None:
    """SIGKILL, and nothing is left that remembers it."""
    os.kill(server.pid, signal.SIGKILL)
    server.close()


def cut_tail(directory: Path, cut_bytes: int) -> None:
    """Take the last bytes from the append-only file of a server that is not running."""
    file = max((directory / "appendonlydir").glob("*.incr.aof"))
    os.truncate(file, max(0, file.stat().st_size - cut_bytes))


def flip_a_byte(path: Path, chance: random.Random) -> int:
    """Change one byte of a file somewhere; which one."""
    position = chance.randrange(path.stat().st_size)
    with path.open("r+b") as file:
        file.seek(position)
        (value,) = file.read(1)
        file.seek(position)
        file.write(bytes([value ^ (1 << chance.randrange(8))]))
    return position


class Proxy:
    """Stands between clients and a server's unix socket; hands everything on, unless it is told to lose some of it."""

    def __init__(self, target: str, listen_on: str, seed: int = 1) -> None:
        """`target`: path of the server's socket; `listen_on`: path of a unix socket, or an IPv4 address."""
        self.replies_lost = 0
        """What came from the server and was thrown away, with its connection."""
        self.requests_torn = 0
        """What was on its way to the server and came to half of it, before its connection ended."""
        self.losing = 0.0
        """Share of either that is lost."""
        self._target = target
        self._chance = random.Random(seed)
        self._closing = False
        self._open: set[socket.socket] = set()
        if "/" in listen_on:
            self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener.bind(listen_on)
            self.url = f"unix://{listen_on}"
        else:
            self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._listener.bind((listen_on, 0))
            self.url = f"redis://{listen_on}:{self._listener.getsockname()[1]}"
        self._listener.listen(128)
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def close(self) -> None:
        """End all connections."""
        self._closing = True
        # A thread that waits in accept() is not woken by close().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in list(self._open):
            _end(peer)

    def _accept(self) -> None:
        while not self._closing:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                far.connect(self._target)
            except OSError:
                _end(far)
                _end(near)
                continue
            self._open |= {near, far}
            for source, sink, replies in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=(source, sink, replies), name="proxy", daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if self._chance.random() < self.losing:
                    if replies:
                        self.replies_lost += 1
                    else:
                        self.requests_torn += 1
                        sink.sendall(chunk[: len(chunk) // 2])
                    break
                sink.sendall(chunk)
        self._open -= {source, sink}
        _end(source)
        _end(sink)


def _end(peer: socket.socket) -> None:
    with contextlib.suppress(OSError):
        peer.shutdown(socket.SHUT_RDWR)
    peer.close()


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[Path]:
    """A file system in memory that holds no more than that. Raises NotHere."""
    mount = need_root("mount")
    folder.mkdir(parents=True)
    subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run([need_root("umount"), "--lazy", str(folder)], check=True)


class Network:
    """A network namespace with one wire to this one, which can be cut. Raises NotHere."""

    _count = 0

    def __init__(self) -> None:
        self._ip = need_root("ip")
        Network._count += 1
        number = os.getpid() % 16_000 * 4 + Network._count % 4
        self.name = f"tuanyuan-{os.getpid()}-{Network._count}"
        self.path = f"/run/netns/{self.name}"
        self._wire = f"ty{number}"
        a, b = divmod(number, 64)
        subnet = f"10.{200 + a // 256 % 50}.{a % 256}"
        self.address, far_address = f"{subnet}.{4 * b + 1}", f"{subnet}.{4 * b + 2}"
        try:
            self._run("netns", "add", self.name)
        except RuntimeError as problem:
            raise NotHere(f"needs to make network namespaces: {problem}") from None
        try:
            self._run("link", "add", self._wire, "type", "veth", "peer", "name", f"{self._wire}f", "netns", self.name)
            self._run("address", "add", f"{self.address}/30", "dev", self._wire)
            self._run("link", "set", self._wire, "up")
            self._run("-n", self.name, "address", "add", f"{far_address}/30", "dev", f"{self._wire}f")
            self._run("-n", self.name, "link", "set", f"{self._wire}f", "up")
        except BaseException:
            self.close()
            raise

    def cut(self) -> None:
        """Nothing comes through any more, in neither direction, and nobody is told."""
        self._run("link", "set", self._wire, "down")

    def mend(self) -> None:
        """As before."""
        self._run("link", "set", self._wire, "up")

    def close(self) -> None:
        """The wire goes with the namespace."""
        self._run("netns", "delete", self.name)

    def _run(self, *words: str) -> None:
        done = subprocess.run([self._ip, *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"`ip {' '.join(words)}` must work, got: {done.stderr.strip()}")
