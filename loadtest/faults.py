"""Faults to put a server and what lives on it through: processes, files, disks, networks. No part of the product.

    hung(pid)                 a server that answers nothing for a while, and then everything that was asked
    lose_tail, damage         append-only files after a crash, or after worse
    refuse_file_growth(pid)   a disk that takes no more, for one process: needs no rights
    small_disk, full          a disk that really is full: needs root
    Partition                 a network that is cut: a namespace of its own as root, a valve that is shut otherwise

Everything works on processes, paths and addresses, so that tests, long runs and drills can all use it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PATIENCE_S = 10.0
_CHUNK_BYTES = 64 << 10


class NotPermitted(Exception):
    """This user, or this machine, cannot have the fault. The message says what is missing."""


# --- processes --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hung(pid: int) -> Iterator[None]:
    """The process stands still: what it is sent waits in its sockets, and is done when it goes on."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def refuse_file_growth(pid: int) -> None:
    """No file of the process may grow any more, as on a full disk; its next write ends it. Linux.

    Raises NotPermitted, ProcessLookupError.
    """
    prlimit = getattr(resource, "prlimit", None)
    if prlimit is None:
        raise NotPermitted("limits of another process can be set on Linux alone")
    _, most = prlimit(pid, resource.RLIMIT_FSIZE)
    prlimit(pid, resource.RLIMIT_FSIZE, (0, most))


# --- files ------------------------------------------------------------------------------------------------------------


def append_only_file(directory: Path) -> Path:
    """The file of a server's data directory that is written to now."""
    files = sorted((directory / "appendonlydir").glob("*.incr.aof"), key=lambda path: int(path.name.split(".")[2]))
    return files[-1]


def lose_tail(file: Path, kept_bytes: int) -> None:
    """Cut a file, as a disk does that acknowledged what it did not have. Its server must not run."""
    assert kept_bytes <= file.stat().st_size, f"{file} must have {kept_bytes} bytes to keep"
    with file.open("r+b") as opened:
        opened.truncate(kept_bytes)


def damage(file: Path, at_byte: int, raw: bytes = b"?") -> None:
    """Overwrite bytes of a file."""
    with file.open("r+b") as opened:
        opened.seek(at_byte)
        opened.write(raw)


# --- disks ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of this size at `folder`, until the end. Linux, root. Raises NotPermitted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes},mode=700", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotPermitted("there is no `mount`") from None
    if mounted.returncode:
        raise NotPermitted(f"a file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        # Lazily: whoever still has a file open there must not keep the others from ending.
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """The file system of `folder` has no byte left, until the end."""
    filler = folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for chunk in (bytes(1 << 20), bytes(4096), bytes(1)):
                with contextlib.suppress(OSError):
                    while file.write(chunk):
                        pass
        yield
    finally:
        filler.unlink()


# --- networks ---------------------------------------------------------------------------------------------------------


class Partition:
    """A way to a server's unix socket over TCP that can be cut without anybody being told.

    with Partition.real(socket_path, folder) as way:     root: a network namespace whose link goes down
    with Partition.valve(socket_path) as way:            a process that stops forwarding; connecting still succeeds
        connect(f"redis://{way.host}:{way.port}")
        way.cut(); way.mend()
    """

    def __init__(self, host: str, port: int) -> None:
        """Not called directly."""
        self.host, self.port = host, port

    def cut(self) -> None:
        """From now on nothing goes through, either way."""
        raise NotImplementedError

    def mend(self) -> None:
        """Things go through again; connections that were open still are."""
        raise NotImplementedError

    @staticmethod
    @contextlib.contextmanager
    def best(socket_path: str) -> Iterator[Partition]:
        """The real one if it can be had, else the valve."""
        with contextlib.ExitStack() as exits:
            try:
                way = exits.enter_context(Partition.real(socket_path))
            except NotPermitted:
                way = exits.enter_context(Partition.valve(socket_path))
            yield way

    @staticmethod
    @contextlib.contextmanager
    def real(socket_path: str) -> Iterator[Partition]:
        """By a network namespace. Linux, root. Raises NotPermitted."""
        namespace = _Namespace(os.getpid())
        try:
            namespace.create()
            port = 7000
            command = ["ip", "netns", "exec", namespace.name, sys.executable, "-m", "loadtest.faults"]
            forwarder = subprocess.Popen([*command, namespace.inside, str(port), socket_path])
            try:
                _wait_for(namespace.inside, port)
                yield namespace.partition(port)
            finally:
                forwarder.terminate()
                forwarder.wait()
        finally:
            namespace.remove()

    @staticmethod
    @contextlib.contextmanager
    def valve(socket_path: str) -> Iterator[Partition]:
        """By a forwarder in this process that stops forwarding."""
        valve = _Valve(socket_path)
        try:
            yield valve
        finally:
            valve.close()


class _Namespace:
    """A network namespace and a pair of interfaces between it and the world."""

    def __init__(self, number: int) -> None:
        self.name = f"tuanyuan-{number}"
        self._outer, self._inner = f"ty{number % 100_000}o", f"ty{number % 100_000}i"
        # 198.18.0.0/15 is set aside for tests of network devices (RFC 2544); four addresses for each process.
        first = int(ipaddress.IPv4Address("198.18.0.0")) + 4 * (number % (1 << 15))
        self._outside, self.inside = (str(ipaddress.IPv4Address(first + number)) for number in (1, 2))

    def create(self) -> None:
        try:
            self._ip("netns", "add", self.name)
            self._ip("link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self.name)
            self._ip("addr", "add", f"{self._outside}/30", "dev", self._outer)
            self._ip("-n", self.name, "addr", "add", f"{self.inside}/30", "dev", self._inner)
            self._ip("link", "set", self._outer, "up")
            self._ip("-n", self.name, "link", "set", self._inner, "up")
        except (FileNotFoundError, subprocess.CalledProcessError) as problem:
            said = getattr(problem, "stderr", None) or str(problem)
            raise NotPermitted(f"a network namespace cannot be made: {said.strip()}") from None

    def remove(self) -> None:
        # With the namespace goes its interface, and with that the other of the pair.
        with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
            self._ip("netns", "delete", self.name)

    def partition(self, port: int) -> Partition:
        return _RealPartition(self, port)

    def set_link(self, state: str) -> None:
        self._ip("-n", self.name, "link", "set", self._inner, state)

    @staticmethod
    def _ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class _RealPartition(Partition):
    def __init__(self, namespace: _Namespace, port: int) -> None:
        super().__init__(namespace.inside, port)
        self._namespace = namespace

    def cut(self) -> None:
        self._namespace.set_link("down")

    def mend(self) -> None:
        self._namespace.set_link("up")


class _Valve(Partition):
    def __init__(self, socket_path: str) -> None:
        self._forwarder = _Forwarder("127.0.0.1", 0, socket_path)
        super().__init__("127.0.0.1", self._forwarder.port)
        self._thread = threading.Thread(target=self._forwarder.run, name="valve", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._forwarder.is_open = False

    def mend(self) -> None:
        self._forwarder.is_open = True

    def close(self) -> None:
        self._forwarder.ending = True
        self._thread.join(PATIENCE_S)


class _Forwarder:
    """Forwards TCP connections to a unix socket. One thread, blocking writes: good for tests."""

    def __init__(self, host: str, port: int, socket_path: str) -> None:
        self._listener = socket.create_server((host, port))
        self.port: int = self._listener.getsockname()[1]
        self._socket_path = socket_path
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, socket.socket] = {}
        self.is_open = True
        self.ending = False

    def run(self) -> None:
        while not self.ending:
            if not self.is_open:
                time.sleep(0.01)
                continue
            for key, _ in self._selector.select(0.05):
                source = key.fileobj
                assert isinstance(source, socket.socket)
                if source is self._listener:
                    self._accept()
                elif source in self._peers:
                    self._forward(source)
        for source in [*self._peers, self._listener]:
            source.close()
        self._selector.close()

    def _accept(self) -> None:
        caller, _ = self._listener.accept()
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            server.connect(self._socket_path)
        except OSError:
            caller.close()
            server.close()
            return
        for one, other in ((caller, server), (server, caller)):
            self._peers[one] = other
            self._selector.register(one, selectors.EVENT_READ)

    def _forward(self, source: socket.socket) -> None:
        target = self._peers[source]
        try:
            raw = source.recv(_CHUNK_BYTES)
            target.sendall(raw)
        except OSError:
            raw = b""
        if not raw:
            for one in (source, target):
                self._selector.unregister(one)
                del self._peers[one]
                one.close()


def _wait_for(host: str, port: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _Forwarder(sys.argv[1], int(sys.argv[2]), sys.argv[3]).run()
