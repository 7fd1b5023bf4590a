"""A process of its own that appends pings to the logs at a rate.

    python -m loadtest.bench.sender URL PHONES FIRST_PING POOL_PINGS STEP

It draws a pool of pings once and sends them round and round, each observed at the moment it is sent, so that drawing
takes no time from what is measured. Commands come as JSON lines on stdin, `{"rate": ..., "seconds": ...}`. Answers go
to stdout as `Progress` in JSON lines: when it is ready, four times a second, and at the end of a command.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import orjson

from flows.log import LogWriter, read_settings
from flows.malloc import keep_freed_memory
from flows.server import LinkOpener, connect, link_opener
from geoindex.columns import PingBatch
from geoindex.entries import Settings
from loadtest.bench.traffic import OFFLINE_MS, Traffic

SENDERS = 8
"""Connections that append at the same time, as several gateways do: one alone waits for the disk most of the time."""
REPORT_S = 0.25
POOL_PINGS_MAX = 20_000_000
"""About a gigabyte."""
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What the sender has done: since it started, and, of the present command, whether that is over."""

    ready: bool = True
    sent: int = 0
    cpu_s: float = 0.0
    final: bool = False


class Sender:
    """The sender process, seen from the benchmark. Made by `sender_process`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.progress = Progress()
        self._process = process
        self._changed = threading.Condition()
        self._answers = 0
        self._thread = threading.Thread(target=self._listen, name="sender", daemon=True)
        self._thread.start()

    def send(self, rate: float, seconds: float) -> None:
        """Begin to send so many pings a second for so long; returns at once."""
        self.progress = replace(self.progress, final=False)
        assert self._process.stdin is not None
        self._process.stdin.write(orjson.dumps({"rate": rate, "seconds": seconds}) + b"\n")
        self._process.stdin.flush()

    def wait_ready(self) -> None:
        """Until the pool is drawn. Raises RuntimeError."""
        self._wait(lambda: self._answers > 0, START_TIMEOUT_S)

    def wait_final(self, timeout_s: float) -> None:
        """Until the present command is done. Raises RuntimeError."""
        self._wait(lambda: self.progress.final, timeout_s)

    def _wait(self, is_so: Callable[[], bool], timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: is_so() or self._process.poll() is not None, timeout_s)
            if not is_so():
                raise RuntimeError(f"the sender does not answer (ended with {self._process.poll()})")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.progress = Progress(**orjson.loads(line))
                self._answers += 1
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


@contextmanager
def sender_process(url: str, phone_count: int, first_ping: int, pool_pings: int, step: int) -> Iterator[Sender]:
    """A sender of the world's pings from `first_ping` on (counted as in `World.ping_count`), `step` at a time."""
    arguments = [url, str(phone_count), str(first_ping), str(pool_pings), str(step)]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.bench.sender", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        sender = Sender(process)
        sender.wait_ready()
        yield sender
    finally:
        process.terminate()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def pool_batches(traffic: Traffic, pool_pings: int, step: int) -> Iterator[PingBatch]:
    """The pings of the pool, in the order and the portions in which they are sent."""
    for sent in traffic.batches(pool_pings, step, OFFLINE_MS):
        yield sent.pings


def observed_now(pings: PingBatch, now_ms: int) -> PingBatch:
    """The same pings, observed now: none is late, whenever it is sent."""
    return replace(pings, observed_at_ms=np.full(len(pings), now_ms, np.int64))


class _Pool:
    """Batches that several threads send in turn, each at its time; appends of different threads share an fsync."""

    def __init__(self, batches: list[PingBatch], open_link: LinkOpener, settings: Settings) -> None:
        self.sent = 0
        self._batches = batches
        self._taken = 0
        self._lock = threading.Lock()
        self._writers = [LogWriter(open_link, settings) for _ in range(SENDERS)]

    def send(self, rate: float, seconds: float) -> None:
        """Send so many pings a second for so long, going on in the pool where the last call ended."""
        with ThreadPoolExecutor(SENDERS) as threads:
            timetable = _Timetable(self._taken, len(self._batches[0]) / rate, time.monotonic(), seconds)
            running = [threads.submit(self._send_in_turn, writer, timetable) for writer in self._writers]
            while not all(sender.done() for sender in running):
                time.sleep(REPORT_S)
                _answer(Progress(True, self.sent, time.process_time(), False))
            for sender in running:
                sender.result()

    def _send_in_turn(self, writer: LogWriter, timetable: _Timetable) -> None:
        while True:
            with self._lock:
                due_s = timetable.due_s(self._taken)
                if max(due_s, time.monotonic()) >= timetable.end_s:
                    return
                batch = self._batches[self._taken % len(self._batches)]
                self._taken += 1
            time.sleep(max(0.0, due_s - time.monotonic()))
            writer.append_pings(observed_now(batch, round(time.time() * 1000)))
            with self._lock:
                self.sent += len(batch)


@dataclass(frozen=True, slots=True)
class _Timetable:
    """When each batch is due, counted from the first one of a command. Moments are monotonic."""

    first: int
    interval_s: float
    started_s: float
    seconds: float

    @property
    def end_s(self) -> float:
        return self.started_s + self.seconds

    def due_s(self, position: int) -> float:
        return self.started_s + (position - self.first) * self.interval_s


def main(arguments: list[str]) -> None:
    """The process: draw the pool, then do what stdin says."""
    keep_freed_memory()  # as a gateway does
    url = arguments[0]
    phone_count, first_ping, pool_pings, step = (int(argument) for argument in arguments[1:])
    traffic = Traffic(phone_count)
    traffic.world.ping_count = first_ping
    client = connect(url)
    settings = read_settings(client)
    assert settings is not None, "the logs begin with settings"
    pool = _Pool(list(pool_batches(traffic, pool_pings, step)), link_opener(client), settings)
    _answer(Progress())
    for line in sys.stdin:
        command = orjson.loads(line)
        pool.send(command["rate"], command["seconds"])
        _answer(Progress(True, pool.sent, time.process_time(), True))


def _answer(progress: Progress) -> None:
    sys.stdout.buffer.write(orjson.dumps(progress) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
