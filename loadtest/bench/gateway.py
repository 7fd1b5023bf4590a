"""Pings through the gateway, from a socket to the disk: one core for the gateway, another for server and senders.

senders (threads here) ──HTTP, bodies made beforehand──> tuanyuan serve, pinned to a core ──XADD──> Valkey
                                                         (appendfsync always)

The pings per second that count are those that were answered as accepted; all of them are then read from the logs and
compared with what was sent. Besides: how long one small request takes, what the worst bodies cost, how exactly
coordinates of other datums are turned back.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import psutil
import redis
import zstandard

from flows.embedded import EmbeddedServer
from flows.log import ensure_settings, log_key
from flows.server import connect
from flows.wire import PingColumns, decode_entry, encode_pings
from gateway.accounts import Accounts
from gateway.compression import BodyTooLarge, Encoding, MalformedBody, decompressed
from gateway.config import GatewayConfig
from gateway.datum import Datum, to_wgs84
from gateway.keys import Sealer
from gateway.ping_bodies import Format, Terms, read_pings
from gateway.pings import EXPANSION_MAX, PATH
from geoindex.columns import E7, PingBatch
from geoindex.entries import Settings
from loadtest import datums
from loadtest.bench.report import Report, Say, Value
from loadtest.bench.traffic import Traffic

SHARD_COUNT = 8
CONNECTIONS = 4
JSON_PINGS, COLUMNS_PINGS = 10_000, 50_000
"""A body: what a partner has gathered in a second or so."""
BODIES = 8
"""Different ones, sent in turn."""
SMALL_PINGS = 100
SMALL_REQUESTS = 300
START_TIMEOUT_S = 90.0
ANSWER_TIMEOUT_S = 60.0
POINTS = 1_000_000
METRES_PER_E7 = 0.011132
BOMB_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Load:
    """Bodies of one kind, ready to be sent. `batches`: the pings of each."""

    name: str
    requests: list[bytes]
    batches: list[PingBatch]


@dataclass(frozen=True, slots=True)
class Sent:
    """What became of a load."""

    pings: int
    seconds: float
    gateway_cpu_s: float
    latency_ms: list[float]
    times: list[int]
    """How often each body was accepted."""


def measure(devices: int, seconds: float, smoke: bool, say: Say) -> Report:
    """Each kind of body for so long; then what is beside."""
    report = Report("gateway")
    values: dict[str, Value] = {}
    with tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as name:
        folder = Path(name)
        with EmbeddedServer.start(folder / "valkey", port=None) as server:
            client = connect(server.url)
            try:
                _through_http(report, values, server, client, folder, devices, seconds, smoke, say)
            finally:
                client.close()
    values |= _datum_errors(10_000 if smoke else POINTS)
    values |= _worst_bodies(report, BOMB_BYTES >> 4 if smoke else BOMB_BYTES)
    report.values = values | {
        "devices": devices,
        "seconds": seconds,
        "connections": CONNECTIONS,
        "shards": SHARD_COUNT,
        "appendfsync": "always",
    }
    report.notes.append(
        "Pings answered as accepted, by the clock on the wall; the gateway has one core, Valkey and the senders share "
        "the other. *_pings_per_cpu_s: by the CPU time of the gateway alone. small_request: one connection, "
        f"{SMALL_PINGS} pings as JSON, from before the request is sent until its answer is read. worst_body_*: "
        "decompressing and reading, without HTTP; what Python and numpy allocate at most."
    )
    return report


# --- through HTTP -----------------------------------------------------------------------------------------------------


def _through_http(
    report: Report,
    values: dict[str, Value],
    server: EmbeddedServer,
    client: redis.Redis,
    folder: Path,
    devices: int,
    seconds: float,
    smoke: bool,
    say: Say,
) -> None:
    traffic = Traffic(devices)
    settings = ensure_settings(client, Settings(SHARD_COUNT, ("plain", "shifted"), hash_key=1))
    accounts = Accounts(client, Sealer.read(GatewayConfig(var=folder).secret_path))
    limits: dict[str, Any] = {"pings_per_s": 1e9, "requests_per_s": 1e6}
    plain = accounts.add_partner("plain", **limits).text
    shifted = accounts.add_partner("shifted", datum="gcj02", **limits).text
    json_pings, columns_pings = (500, 2_000) if smoke else (JSON_PINGS, COLUMNS_PINGS)
    with _gateway_process(server, folder) as (process, port):
        now_ms = round(time.time() * 1000)
        small = [sent.pings for sent in traffic.batches(json_pings * BODIES, json_pings, now_ms)]
        large = [sent.pings for sent in traffic.batches(columns_pings * BODIES, columns_pings, now_ms)]
        loads = [
            _load("json", small, _json, plain, Format.JSON),
            _load("json_gzip", small, lambda pings: gzip.compress(_json(pings), 6), plain, Format.JSON, "gzip"),
            _load("ndjson", small, _ndjson, plain, Format.NDJSON),
            _load("columns", large, encode_pings, plain, Format.COLUMNS),
            _load("columns_zstd", large, _zstd_columns, plain, Format.COLUMNS, "zstd"),
            _load("columns_gcj02", large, encode_pings, shifted, Format.COLUMNS),
        ]
        for load in loads:
            say(f"{load.name}: {len(load.batches[0]):,} pings a body, {len(load.requests[0]):,} bytes")
            _run(load, process, port, seconds / 5)  # until kernels are loaded and buffers have grown
            _forget(client)
            sent = _run(load, process, port, seconds)
            values[f"{load.name}_pings_per_s"] = sent.pings / sent.seconds
            values[f"{load.name}_pings_per_cpu_s"] = sent.pings / sent.gateway_cpu_s
            values[f"{load.name}_request_p50_ms"] = float(np.median(sent.latency_ms))
            _compare(report, load, sent, client, settings, check_places=load.name != "columns_gcj02")
            _forget(client)
        latency_ms = _small_requests(small[0], plain, port)
        values["small_request_p50_ms"] = float(np.percentile(latency_ms, 50))
        values["small_request_p99_ms"] = float(np.percentile(latency_ms, 99))
        values["gateway_memory_mb"] = psutil.Process(process.pid).memory_info().rss / 1e6


def _load(
    name: str,
    batches: list[PingBatch],
    encode: Callable[[PingBatch], bytes],
    key: str,
    format: Format,
    encoding: str | None = None,
) -> Load:
    return Load(name, [_request(encode(pings), key, format, encoding) for pings in batches], batches)


def _request(body: bytes, key: str, format: Format, encoding: str | None = None) -> bytes:
    compressed = f"Content-Encoding: {encoding}\r\n" if encoding else ""
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {key}\r\nContent-Type: {format.value}\r\n"
        f"{compressed}Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _rows(pings: PingBatch) -> Iterator[dict[str, object]]:
    places = zip(pings.lat_e7.tolist(), pings.lng_e7.tolist(), pings.observed_at_ms.tolist(), strict=True)
    for row, (lat_e7, lng_e7, at_ms) in enumerate(places):
        yield {
            "device_id": pings.device_id(row),
            "lat": lat_e7 / E7,
            "lng": lng_e7 / E7,
            "observed_at": at_ms,
        }


def _json(pings: PingBatch) -> bytes:
    return orjson.dumps(list(_rows(pings)))


def _ndjson(pings: PingBatch) -> bytes:
    return b"\n".join(map(orjson.dumps, _rows(pings)))


def _zstd_columns(pings: PingBatch) -> bytes:
    return zstandard.ZstdCompressor(3).compress(encode_pings(pings))


@contextmanager
def _gateway_process(server: EmbeddedServer, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """`tuanyuan serve` with a core of its own, where there are two. Yields it and its port."""
    environment = {
        **os.environ,
        "TUANYUAN_GATEWAY_FLOW_LAG_S_MAX": "0",  # there is no flow
        "TUANYUAN_GATEWAY_ADDRESS_REQUESTS_PER_S": "1000000",
    }
    where = ["--valkey", server.url, "--var", str(folder)]
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuanyuan.cli", "serve", *where, "--port", "0", "--quiet"],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment,
        )
    own = psutil.Process()
    cores = own.cpu_affinity() if hasattr(own, "cpu_affinity") else []
    try:
        port = _port(process, folder / "serve.log")
        if len(cores) > 1:
            for thread in psutil.Process(process.pid).threads():
                os.sched_setaffinity(thread.id, {cores[0]})
            for pid in (server.pid, own.pid):
                for thread in psutil.Process(pid).threads():
                    os.sched_setaffinity(thread.id, set(cores[1:]))
        yield process, port
    finally:
        if len(cores) > 1:
            own.cpu_affinity(cores)
        process.terminate()
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s and process.poll() is None:
        text = log.read_text(errors="replace")
        found = re.search(r"gateway: http://[^\s:]+:(\d+)", text)
        if found and "ready" in text:
            return int(found[1])
        time.sleep(0.05)
    raise RuntimeError(f"the gateway did not start:\n{log.read_text(errors='replace')[-3000:]}")


def _run(load: Load, process: subprocess.Popen[bytes], port: int, seconds: float) -> Sent:
    """Send the bodies in turn over several connections. Raises RuntimeError for an answer that is not 200."""
    latency_ms: list[float] = []
    times = [0] * len(load.requests)
    faults: list[str] = []
    lock = threading.Lock()
    before_s, started_s = _cpu_s(process.pid), time.monotonic()
    end_s = started_s + seconds

    def send(number: int) -> None:
        try:
            with _Connection(port) as connection:
                body = number
                while time.monotonic() < end_s:
                    body = (body + CONNECTIONS) % len(load.requests)
                    at_s = time.monotonic()
                    accepted = connection.ask(load.requests[body])
                    with lock:
                        latency_ms.append(1000 * (time.monotonic() - at_s))
                        times[body] += 1
                        if accepted != len(load.batches[body]):
                            faults.append(f"{accepted} of {len(load.batches[body])} pings were accepted")
        except (OSError, RuntimeError) as fault:
            faults.append(str(fault))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise RuntimeError(f"{load.name}: {faults[0]}")
    pings = sum(count * len(batch) for count, batch in zip(times, load.batches, strict=True))
    return Sent(pings, time.monotonic() - started_s, _cpu_s(process.pid) - before_s, latency_ms, times)


class _Connection:
    """HTTP/1.1, kept alive; as little of it as there is."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def ask(self, request: bytes) -> int:
        """How many pings were accepted. Raises RuntimeError, OSError."""
        self._socket.sendall(request)
        head, _, rest = self._until(lambda raw: b"\r\n\r\n" in raw).partition(b"\r\n\r\n")
        size = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if size is None:
            raise RuntimeError(f"an answer must have a length, got {head[:200]!r}")
        self._buffer = rest
        body = self._until(lambda raw: len(raw) >= int(size[1]))
        self._buffer = body[int(size[1]) :]
        if not head.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"{head[:40]!r} {body[:300]!r}")
        return int(orjson.loads(body[: int(size[1])])["accepted"])

    def _until(self, complete: Callable[[bytes], bool]) -> bytes:
        while not complete(self._buffer):
            chunk = self._socket.recv(1 << 16)
            if not chunk:
                raise RuntimeError("the gateway ended the connection")
            self._buffer += chunk
        return self._buffer

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def _small_requests(pings: PingBatch, key: str, port: int) -> list[float]:
    request = _request(orjson.dumps(list(_rows(pings))[:SMALL_PINGS]), key, Format.JSON)
    latency_ms = []
    with _Connection(port) as connection:
        for _ in range(SMALL_REQUESTS):
            at_s = time.monotonic()
            connection.ask(request)
            latency_ms.append(1000 * (time.monotonic() - at_s))
    return latency_ms


def _compare(
    report: Report, load: Load, sent: Sent, client: redis.Redis, settings: Settings, check_places: bool
) -> None:
    """What is in the logs against what was sent: number of pings, ids, and sums over every column."""
    expected, got = np.zeros(6, np.int64), np.zeros(6, np.int64)
    for count, batch in zip(sent.times, load.batches, strict=True):
        expected += count * _sums(batch)
    for shard in range(settings.shard_count):
        start = "-"
        while entries := cast(Any, client.xrange(log_key(shard), min=start, count=16)):
            for _, fields in entries:
                for kind, payload in fields.items():
                    entry = decode_entry(kind, payload)
                    if isinstance(entry, PingColumns):
                        got += _sums(entry)
            start = f"({entries[-1][0].decode()}"
    names = ("pings", "bytes of ids", "sum of the ids' bytes", "times", "latitudes", "longitudes")
    for name, wanted, found in zip(names, expected.tolist(), got.tolist(), strict=True):
        if check_places or name not in ("latitudes", "longitudes"):
            report.expect(f"{load.name}: {name} in the logs", wanted, found)
    report.expect(f"{load.name}: pings were sent", True, sent.pings > 0)


def _sums(pings: PingBatch | PingColumns) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(
        [
            len(pings),
            len(pings.id_bytes),
            int(pings.id_bytes.sum(dtype=np.int64)),
            int(pings.observed_at_ms.sum()),
            int(pings.lat_e7.sum(dtype=np.int64)),
            int(pings.lng_e7.sum(dtype=np.int64)),
        ],
        np.int64,
    )


def _forget(client: redis.Redis) -> None:
    """Trim the logs down to nothing."""
    for shard in range(SHARD_COUNT):
        client.xtrim(log_key(shard), maxlen=0, approximate=False)


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


# --- beside -----------------------------------------------------------------------------------------------------------


def _datum_errors(points: int) -> dict[str, Value]:
    """How far from where it was a point is at most, there and back; both ways in our coordinates."""
    random = np.random.default_rng(1)
    lat_e7 = np.rint(random.uniform(datums.LAT_MIN, datums.LAT_MAX, points) * E7).astype(np.int32)
    lng_e7 = np.rint(random.uniform(datums.LNG_MIN, datums.LNG_MAX, points) * E7).astype(np.int32)
    errors: dict[str, Value] = {}
    for datum, forward in ((Datum.GCJ02, datums.gcj02), (Datum.BD09, datums.bd09)):
        sent = [np.rint(column * E7).astype(np.int32) for column in forward(lat_e7 / E7, lng_e7 / E7)]
        to_wgs84(datum, *sent)
        started_s = time.perf_counter()
        got_lat, got_lng = to_wgs84(datum, *sent)
        errors[f"{datum.value}_ns_per_ping"] = 1e9 * (time.perf_counter() - started_s) / points
        north = (got_lat.astype(np.int64) - lat_e7) * METRES_PER_E7
        east = (got_lng.astype(np.int64) - lng_e7) * METRES_PER_E7 * np.cos(np.radians(lat_e7 / E7))
        errors[f"{datum.value}_error_m_max"] = float(np.hypot(north, east).max())
    return errors


def _worst_bodies(report: Report, bomb_bytes: int) -> dict[str, Value]:
    """Time and memory of bodies made to cost much."""
    travels = GatewayConfig().pings_body_bytes_max
    room = EXPANSION_MAX * travels
    ping = b'{"device_id":"a","lat":1,"lng":2,"observed_at":3}'
    bodies: dict[str, tuple[bytes, Encoding, Format]] = {
        "gzip_bomb": (_gzip_bomb(bomb_bytes), Encoding.GZIP, Format.JSON),
        "zstd_bomb": (zstandard.ZstdCompressor().compress(bytes(bomb_bytes)), Encoding.ZSTD, Format.JSON),
        "zstd_stream_bomb": (_zstd_stream(bomb_bytes), Encoding.ZSTD, Format.JSON),
        "empty_objects": (b"[" + b"{}," * (room // 3 - 1) + b"{}]", Encoding.IDENTITY, Format.JSON),
        "numbers": (b"[" + b"0," * 249_999 + b"0]", Encoding.IDENTITY, Format.JSON),
        "nested": (b"[" * travels, Encoding.IDENTITY, Format.JSON),
        "one_broken": (b"[" + (ping + b",") * 150_000 + b"0]", Encoding.IDENTITY, Format.JSON),
        "empty_lines": (b"\n" * room, Encoding.IDENTITY, Format.NDJSON),
        "broken_lines": (b"{\n" * 249_999, Encoding.IDENTITY, Format.NDJSON),
        "digits": (b'[{"device_id":"a","lat":' + b"1" * travels + b"}]", Encoding.IDENTITY, Format.JSON),
    }
    terms = Terms(0, Datum.WGS84, 0, 10)
    cost_ms: dict[str, float] = {}
    cost_mb: dict[str, float] = {}
    for name, (body, encoding, format) in bodies.items():

        def read(body: bytes = body, encoding: Encoding = encoding, format: Format = format) -> None:
            with contextlib.suppress(MalformedBody, BodyTooLarge):  # as it should be
                read_pings(decompressed(body, encoding, room), format, terms)

        read()
        started_s = time.perf_counter()
        read()
        cost_ms[name] = round(1000 * (time.perf_counter() - started_s), 1)
        tracemalloc.start()
        read()
        cost_mb[name] = round(tracemalloc.get_traced_memory()[1] / 1e6, 1)
        tracemalloc.stop()
    limit_mb = 8 * room / 1e6
    report.expect("memory of the worst body is bounded", True, max(cost_mb.values()) < limit_mb)
    return {
        "worst_body_ms": cost_ms,
        "worst_body_mb": cost_mb,
        "worst_body_ms_max": max(cost_ms.values()),
        "worst_body_mb_max": max(cost_mb.values()),
    }


def _gzip_bomb(size: int) -> bytes:
    return gzip.compress(bytes(size), 9)


def _zstd_stream(size: int) -> bytes:
    """Compressed as a stream: its frame does not say how long its content is."""
    stream = zstandard.ZstdCompressor().compressobj()
    return stream.compress(bytes(size)) + stream.flush()
