"""A process that makes requests before they are due, so that whoever sends them has nothing to compute.

    python -m loadtest.load.feeder FD      with what to do as the first frame on that socket

Kernels, JSON and compression keep a core busy; inside Locust's process they would hold up every user, and late sends
would pass for a slow deployment. This process runs a few seconds ahead. If it cannot, its requests come late, and the
lateness is the generator's (`loadtest.load.senders`).

    we get    {"spec", "deployment", "index", "count"}, later {"begin_ms"}
    we give   {"known": phones filled in} while filling, {"ready"}, then requests (`Request`), each second {"cpu_s", …},
              {"end"}
"""

from __future__ import annotations

import gzip
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import httpx
import numpy as np
import orjson
import zstandard

from flows.log import LogWriter, read_settings
from flows.server import connect, link_opener
from flows.wire import encode_pings, keep_pings
from geoindex.columns import E7, F64, PingBatch
from geoindex.entries import Settings
from loadtest import datums
from loadtest.load.deployment import Deployment
from loadtest.load.frames import MEDIA_TYPES, Request, receive, send
from loadtest.load.plan import RatePlan
from loadtest.load.probes import Probes
from loadtest.load.scenarios import Format, Stream
from loadtest.load.sources import PingSource, joined, one_ping, open_source, parts
from loadtest.load.spec import RunSpec

SLICE_S = 0.2
AHEAD_S = 4.0
REQUESTS_PER_S_MIN = 1.0
"""Of a partner: nobody gathers pings for longer than a second or so."""
PINGS_MAX: dict[Format, int] = {"json": 20_000, "ndjson": 20_000, "columns": 100_000, "log": 100_000}
"""Of one request, below the gateway's limits."""
ZSTD_LEVEL, GZIP_LEVEL = 1, 1
HTTP_TIMEOUT_S = 60.0
WARM_PHONES = 1_000
FORMAT_PINGS_EACH = 4_000
"""Of a request, where one format is chosen for all."""
FILL_TRIES = 120


@dataclass(slots=True)
class Outlet:
    """One partner's stream: what has gathered, and when it goes out."""

    stream: Stream
    format: Format
    partner: int
    """In the source's list."""
    next_due_s: float
    gathered: list[PingBatch] = field(default_factory=list)

    @property
    def gathered_count(self) -> int:
        return sum(map(len, self.gathered))


class Feeder:
    """Turns a source's pings into requests. `say` is told of whatever goes to the other end."""

    def __init__(
        self,
        spec: RunSpec,
        deployment: Deployment,
        index: int,
        count: int,
        say: Callable[[dict[str, Any]], None],
        source: PingSource | None = None,
    ) -> None:
        self.spec, self.index, self.count = spec, index, count
        self._deployment = deployment
        self._say = say
        self._source = source or open_source(spec, index, count, tuple(deployment.partners))
        self._chance = random.Random(f"{spec.seed}/{index}")
        own_per_s = self._source.own_per_s
        self._rates = spec.rates if own_per_s is None else RatePlan(((0.0, own_per_s),))
        self._made = 0
        self._probes = Probes(spec, index)
        self._settings: Settings | None = None
        if deployment.valkey is not None:
            client = connect(deployment.valkey)
            self._settings = read_settings(client)
            client.close()
        self._outlets = self._open_outlets()

    def _open_outlets(self) -> list[Outlet]:
        names = self._source.partner_names
        outlets = []
        known = {stream.partner: stream for stream in self.spec.plays.streams}
        for partner, name in enumerate(names):
            stream = known.get(name, Stream(name, "columns"))
            if self.spec.format is not None:
                stream = Stream(name, self.spec.format, pings_each=FORMAT_PINGS_EACH)
            can_log = self.spec.direct and self._settings is not None and name in self._settings.partners
            form: Format = "columns" if stream.format == "log" and not can_log else stream.format
            if form != "log" and name not in self._deployment.partners:
                continue  # no key: this partner has no part in it
            outlets.append(Outlet(stream, form, partner, 0.0))
        if not outlets:
            raise ValueError(
                f"the deployment must have a key for one of the world's partners ({', '.join(names)}), "
                f"got {', '.join(self._deployment.partners)}"
            )
        return outlets

    # ---- before the load

    def warm_up(self) -> None:
        """Have every kernel in memory: one that is compiled during the load would make the first requests late."""
        if self.spec.pings_file is not None:
            return
        source = open_source(replace(self.spec, phones=min(self.spec.phones, WARM_PHONES)), 0, 1)
        now_ms = round(time.time() * 1000)
        for batch in (*islice(source.first_sight(now_ms), 1), source.pings(now_ms, now_ms + 1_000, WARM_PHONES)):
            for outlet in self._outlets:
                own = self._in_datum(of_partner(batch, outlet.partner), outlet.stream.partner)
                compressed(b"".join(make(own) for make in BODIES.values()), outlet.stream.encoding)

    def fill(self) -> int:
        """Let the deployment know every phone of this share, as fast as it takes them; how many."""
        known, told_s = 0, time.monotonic()
        if self.spec.pings_file is not None:
            return known
        append = self._appender()
        for batch in self._source.first_sight(round(time.time() * 1000)):
            append(batch)
            known += len(batch)
            if time.monotonic() - told_s > 1.0:
                told_s = time.monotonic()
                self._say({"known": known})
        return known

    def _appender(self) -> Callable[[PingBatch], None]:
        """Straight to the logs where that is possible."""
        if self._settings is not None and self.spec.direct:
            assert self._deployment.valkey is not None
            writer = LogWriter(link_opener(connect(self._deployment.valkey), unsafe=True), self._settings)
            return lambda batch: (writer.append_pings(self._by_settings(batch)), None)[1]
        http = httpx.Client(base_url=self._deployment.gateway, timeout=HTTP_TIMEOUT_S)

        def post(batch: PingBatch) -> None:
            for outlet in self._outlets:
                own = of_partner(batch, outlet.partner)
                if len(own) and outlet.stream.partner in self._deployment.partners:
                    self._post(http, outlet.stream.partner, encode_pings(self._in_datum(own, outlet.stream.partner)))

        return post

    def _post(self, http: httpx.Client, partner: str, body: bytes) -> None:
        headers = {
            "Authorization": f"Bearer {self._deployment.partners[partner]}",
            "Content-Type": MEDIA_TYPES["columns"],
        }
        for _ in range(FILL_TRIES):
            answer = http.post("/v1/pings", content=body, headers=headers)
            if answer.status_code not in (429, 503):
                answer.raise_for_status()
                return
            time.sleep(min(10.0, float(answer.headers.get("Retry-After", 1))))
        raise RuntimeError(f"the gateway does not take {partner}'s phones: {FILL_TRIES} times 429 or 503")

    def _in_datum(self, batch: PingBatch, partner: str) -> PingBatch:
        """As the partner's app has the coordinates."""
        convert = CONVERSIONS[self._deployment.datums.get(partner, "wgs84")]
        if convert is None or not len(batch):
            return batch
        lat, lng = convert(batch.lat_e7 / E7, batch.lng_e7 / E7)
        return replace(batch, lat_e7=np.rint(lat * E7).astype(np.int32), lng_e7=np.rint(lng * E7).astype(np.int32))

    def _by_settings(self, batch: PingBatch) -> PingBatch:
        """With partners as the logs number them; those that the logs do not know are left out."""
        assert self._settings is not None
        names = self._settings.partners
        there = [name in names for name in self._source.partner_names]
        index = [names.index(name) if name in names else 0 for name in self._source.partner_names]
        if not all(there):
            batch = keep_pings(batch, (~np.array(there)[batch.partner]).astype(np.uint8))
        return PingBatch(
            np.array(index, np.uint16)[batch.partner],
            batch.id_bytes,
            batch.id_end,
            batch.lat_e7,
            batch.lng_e7,
            batch.observed_at_ms,
        )

    # ---- the load

    def slices(self, begin_ms: float) -> Iterator[tuple[float, list[Request]]]:
        """Requests, slice of time by slice of time, each slice's in order of due time. Waits for nothing."""
        for outlet in self._outlets:
            outlet.next_due_s = self._chance.uniform(0.0, 1.0 / self._requests_per_s(outlet, 0.0))
        number = 0
        while (from_s := number * SLICE_S) < self.spec.seconds:
            number += 1
            until_s = min(number * SLICE_S, self.spec.seconds)
            yield until_s, self._slice(from_s, until_s, begin_ms)

    def _slice(self, from_s: float, until_s: float, begin_ms: float) -> list[Request]:
        due = int(self._rates.pings_until(until_s) / self.count) - self._made
        self._made += due
        batch = self._source.pings(round(begin_ms + from_s * 1000), round(begin_ms + until_s * 1000), due)
        requests: list[Request] = []
        for outlet in self._outlets:
            own = of_partner(batch, outlet.partner)
            if len(own):
                outlet.gathered.append(own)
            per_s = self._requests_per_s(outlet, until_s)
            while outlet.next_due_s < until_s:
                requests += self._flushed(outlet, max(outlet.next_due_s, from_s), begin_ms)
                outlet.next_due_s += self._chance.expovariate(per_s)
            if until_s >= self.spec.seconds:
                requests += self._flushed(outlet, until_s, begin_ms)
        return sorted(requests, key=lambda request: request.due_s)

    def _requests_per_s(self, outlet: Outlet, at_s: float) -> float:
        rate = self._rates.rate_at(at_s) / self.count / len(self._outlets)
        return max(REQUESTS_PER_S_MIN, rate / outlet.stream.pings_each)

    def _flushed(self, outlet: Outlet, due_s: float, begin_ms: float) -> Iterator[Request]:
        """What has gathered, as requests of a bearable size."""
        gathered, outlet.gathered = outlet.gathered, []
        if probe := self._probes.due(due_s, begin_ms):
            lat, lng, device_id = probe
            gathered.append(one_ping(outlet.partner, device_id, lat, lng, round(begin_ms + due_s * 1000)))
        if not gathered:
            return
        for part in parts(joined(gathered), PINGS_MAX[outlet.format]):
            if outlet.format == "log":
                body, encoding = encode_pings(self._by_settings(part)), None
            else:
                encoding = outlet.stream.encoding
                body = compressed(BODIES[outlet.format](self._in_datum(part, outlet.stream.partner)), encoding)
            yield Request(due_s, outlet.stream.partner, outlet.format, encoding, len(part), body)


# ---- bodies


def of_partner(batch: PingBatch, partner: int) -> PingBatch:
    """A copy of one partner's rows."""
    return keep_pings(batch, (batch.partner != partner).astype(np.uint8))


def rows(pings: PingBatch) -> Iterator[dict[str, object]]:
    """As partners write them in JSON."""
    places = zip(pings.lat_e7.tolist(), pings.lng_e7.tolist(), pings.observed_at_ms.tolist(), strict=True)
    for row, (lat_e7, lng_e7, at_ms) in enumerate(places):
        yield {"device_id": pings.device_id(row), "lat": lat_e7 / E7, "lng": lng_e7 / E7, "observed_at": at_ms}


BODIES: dict[Format, Callable[[PingBatch], bytes]] = {
    "json": lambda pings: orjson.dumps(list(rows(pings))),
    "ndjson": lambda pings: b"\n".join(map(orjson.dumps, rows(pings))),
    "columns": encode_pings,
}
CONVERSIONS: dict[str, Callable[[F64, F64], tuple[F64, F64]] | None] = {
    "wgs84": None,
    "gcj02": datums.gcj02,
    "bd09": datums.bd09,
}
_ZSTD = zstandard.ZstdCompressor(ZSTD_LEVEL)


def compressed(body: bytes, encoding: str | None) -> bytes:
    """As `Content-Encoding` names it."""
    if encoding == "zstd":
        return _ZSTD.compress(body)
    if encoding == "gzip":
        return gzip.compress(body, GZIP_LEVEL)
    return body


# ---- the process


def main(arguments: list[str]) -> None:
    """Raises nothing for a peer that has gone away: then the run is over."""
    peer = socket.socket(fileno=int(arguments[0]))
    peer.setblocking(True)  # it comes from gevent, whose sockets never block
    try:
        _serve(peer)
    except (BrokenPipeError, ConnectionResetError):
        pass
    except Exception as problem:
        send(peer, {"problem": f"{type(problem).__name__}: {problem}"})
        raise


def _serve(peer: socket.socket) -> None:
    wanted = receive(peer)
    if wanted is None:
        return
    feeder = Feeder(
        RunSpec.from_json(wanted["spec"]),
        Deployment.from_json(wanted["deployment"]),
        wanted["index"],
        wanted["count"],
        lambda words: send(peer, words),
    )
    feeder.warm_up()
    send(peer, {"ready": True, "known": feeder.fill()})
    begin = receive(peer)
    if begin is None:
        return
    begin_ms = float(begin["begin_ms"])
    told_s, made = 0.0, 0
    for until_s, requests in feeder.slices(begin_ms):
        now_s = time.time() - begin_ms / 1000
        for request in requests:
            send(peer, request.to_frame())
            made += request.pings
        if now_s - told_s >= 1.0 or told_s == 0.0:
            told_s = now_s
            send(peer, {"cpu_s": time.process_time(), "ahead_s": until_s - now_s, "at_s": now_s, "made": made})
        time.sleep(max(0.0, until_s - AHEAD_S - (time.time() - begin_ms / 1000)))
    send(peer, {"end": True, "made": made, "cpu_s": time.process_time()})


if __name__ == "__main__":
    main(sys.argv[1:])
