"""What a partner's own program says to a gateway: sends pings, receives pushes, checks webhooks.

    with Client("https://tuanyuan.example.org", key) as client:
        pings = client.pings(on_refused=print)
        pings.add("phone-1", 30.2592, 120.1304)          # buffered, sent by size and age from a thread of its own

        for push in client.receive():                    # waits; acknowledged when the loop asks for the next one
            notify(push.device_ids, push.kind, push.alert_id)

Plain calls that block, for threads: the thread that sends, and as many that receive as there is work for. (A program on
asyncio runs them with `asyncio.to_thread`.) What fails and can be done again is done again, with growing waits, and
after as long as the gateway's Retry-After says: a ping sent twice changes nothing, a push that comes twice is noticed
by its id. What cannot, raises `RequestRefused`.

Needs NumPy, msgpack, zstandard, httpx and standardwebhooks; no web framework, no compiler, no server is loaded.
"""

from __future__ import annotations

import json
import logging
import math
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import httpx
import msgpack
import numpy as np
import numpy.typing as npt
import zstandard
from standardwebhooks import Webhook

from flows.ping_payload import common_width, ping_payload
from geoindex.columns import E7, I32, I64, ID_BYTES_MAX, LAT_E7_MAX, LNG_E7_MAX, PingBatch

logger = logging.getLogger(__name__)

PINGS_TYPE = "application/vnd.tuanyuan.pings+msgpack"
MSGPACK = "application/msgpack"
RETRY_FIRST_S = 0.2
RETRY_S_MAX = 30.0
RETRY_AFTER_S_MAX = 300.0
ANSWER_TIMEOUT_S = 30.0
"""For an answer, beyond the time that it was asked to wait."""
BATCH_PINGS_MAX = 250_000
"""Of one request: the gateway takes no more."""
ACK_EVERY_S = 2.0
ACK_IDS_MAX = 500
NOWHERE_E7 = 2**31 - 1
"""A coordinate that is none: the gateway refuses its ping and says so, as for every other ping that is none."""

Kind = Literal["alert", "update", "resolved"]


class ClientError(Exception):
    """What the client could not do."""


class RequestRefused(ClientError):
    """The gateway understood a request and will not do it, however often it is asked."""

    def __init__(self, status: int, detail: str, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {detail}")
        self.status = status
        self.problem = problem
        """The problem details (RFC 9457) of the answer; empty if there were none."""


class BufferFull(ClientError):
    """More pings wait to be sent than the buffer holds, and the sender was told to raise."""


class ClientClosed(ClientError):
    """The client was closed while this was waiting."""


class NotGenuine(ClientError):
    """A webhook request that the gateway has not signed, or not now. Answer it with 401."""


@dataclass(frozen=True, slots=True)
class Push:
    """Devices that are to be told one thing."""

    id: str
    """Of the queue entry: the same at every delivery."""
    alert_id: str
    revision: int
    kind: Kind
    ring_km: float
    at_ms: int
    """When it was decided: ms since 1970, UTC."""
    device_ids: tuple[str, ...]
    delivery_count: int = 1
    """How often it was handed over by polls, this time included."""


@dataclass(frozen=True, slots=True)
class RefusedPing:
    """A ping that the gateway did not take. All others of its batch were taken."""

    device_id: str
    reason: str
    """Stable, for programs: `latitude`, `too_old`, …"""
    detail: str


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """What came of an acknowledgement."""

    count: int
    refused: Mapping[str, str]
    """Id -> reason: `unknown` (acknowledged before, or given to another one since), `not_yours`, `malformed`."""


# --- requests ---------------------------------------------------------------------------------------------------------


class Client:
    """One partner's connection to a gateway. Thread-safe. Close it, or use it in a `with`."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        sign: bool = False,
        transport: httpx.BaseTransport | None = None,
        on_trouble: Callable[[str], None] = logger.warning,
    ) -> None:
        """`url`: https://host, without a path. `key`: ty_…; `sign`: it signs requests (RFC 9421) and never travels.

        `transport`: another way to the gateway. `on_trouble` is told why something will be tried again.
        """
        self._key = key
        self._url = url.rstrip("/")
        self._http = httpx.Client(
            base_url=self._url,
            transport=transport,
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=10.0),
            limits=httpx.Limits(max_connections=32, max_keepalive_connections=32),
        )
        self._sign: Callable[..., dict[str, str]] | None = None
        if sign:
            from gateway.signing import sign as sign_request  # loads a library for ciphers, which few need

            self._sign = sign_request
        self._on_trouble = on_trouble
        self._closed = threading.Event()
        self._senders: list[PingSender] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self, timeout_s: float = 10.0) -> None:
        """Send what waits to be sent, for so long at most; then end everything that waits.

        A poll that is under way in another thread ends when it is answered: within its `wait_s`.
        """
        for sender in self._senders:
            sender.close(timeout_s)
        self._closed.set()
        self._http.close()

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        tries_max: int | None = None,
        ending: threading.Event | None = None,
    ) -> httpx.Response:
        """The answer to a request that may be made again, as often as it takes.

        `wait_s`: how long the gateway was asked to wait. Raises RequestRefused; ClientClosed; after `tries_max` tries
        ClientError.
        """
        ending = ending or self._closed
        failures = 0
        while not ending.is_set():
            retry_after_s: float | None = None
            try:
                request = self._http.build_request(
                    method, path, content=body, headers=headers, timeout=httpx.Timeout(ANSWER_TIMEOUT_S + wait_s)
                )
                request.headers.update(self._credentials(request, body))
                response = self._http.send(request)
            except httpx.TransportError as error:
                trouble = f"no answer: {type(error).__name__}: {error}"
            except RuntimeError:
                if self._http.is_closed:
                    break
                raise
            else:
                if response.is_success:
                    return response
                if response.status_code < 500 and response.status_code not in (408, 425, 429):
                    raise _refusal(response)
                trouble = f"answered {response.status_code}: {_problem(response).get('detail', response.reason_phrase)}"
                retry_after_s = _retry_after_s(response)
            if ending.is_set():
                break
            failures += 1
            if tries_max is not None and failures >= tries_max:
                raise ClientError(f"{method} {path}: {trouble}")
            pause_s = min(RETRY_S_MAX, RETRY_FIRST_S * 2.0 ** min(failures - 1, 32)) * random.uniform(0.5, 1.0)
            if retry_after_s is not None:
                pause_s = max(retry_after_s * random.uniform(1.0, 1.1), pause_s / 10)
            self._on_trouble(f"{method} {path.partition('?')[0]}: {trouble}; again in {pause_s:.1f} s")
            ending.wait(pause_s)
        raise ClientClosed(f"{method} {path.partition('?')[0]}: the client was closed")

    def _credentials(self, request: httpx.Request, body: bytes) -> dict[str, str]:
        if self._sign is None:
            return {"Authorization": f"Bearer {self._key}"}
        return self._sign(self._key, request.method, request.url.raw_path.decode(), body)

    # --- pings ------------------------------------------------------------------------------------------------------

    def pings(
        self,
        *,
        batch_pings: int = 8_192,
        age_s: float = 1.0,
        buffer_pings: int = 262_144,
        when_full: Literal["block", "raise"] = "block",
        on_refused: Callable[[Sequence[RefusedPing]], None] | None = None,
    ) -> PingSender:
        """Something to put pings into. A request goes out when `batch_pings` are there, or the oldest is `age_s` old.

        `buffer_pings`: how many may wait, those on their way included; what then happens is `when_full`. `on_refused`
        is called from the sending thread, with the first 1,000 of each request; `PingSender.refused` counts all.
        """
        sender = PingSender(self, batch_pings, age_s, buffer_pings, when_full, on_refused)
        self._senders.append(sender)
        return sender

    # --- pushes -----------------------------------------------------------------------------------------------------

    def poll(self, entries_max: int = 100, wait_s: float = 20.0) -> tuple[list[Push], float]:
        """The next pushes, and within how many seconds to acknowledge them. Waits up to `wait_s` for the first.

        Raises RequestRefused (409: a webhook has the pushes), ClientClosed.
        """
        path = f"/v1/pushes?max={entries_max}&wait={wait_s:g}"
        answer = msgpack.unpackb(self._ask("GET", path, headers={"Accept": MSGPACK}, wait_s=wait_s).content)
        return [_push(fields) for fields in answer["pushes"]], float(answer["claim_after_s"])

    def acknowledge(self, ids: Iterable[str], *, tries_max: int | None = None) -> Acknowledged:
        """These have been dealt with. Raises RequestRefused, ClientClosed; after `tries_max` tries ClientError."""
        count = 0
        refused: dict[str, str] = {}
        every = list(ids)
        for start in range(0, len(every), ACK_IDS_MAX):
            body = json.dumps({"ids": every[start : start + ACK_IDS_MAX]}).encode()
            headers = {"Content-Type": "application/json"}
            answer = self._ask("POST", "/v1/pushes/ack", body, headers, tries_max=tries_max).json()
            count += answer["acknowledged"]
            refused |= {one["id"]: one["reason"] for one in answer["refused"]}
        return Acknowledged(count, refused)

    def receive(self, *, entries_max: int = 100, wait_s: float = 20.0, remembered: int = 100_000) -> Iterator[Push]:
        """Pushes, one after the other, until the client is closed. Each counts as handled when the next is asked for.

        What is handled is acknowledged soon after. A loop that ends with an error has not handled its last push: it
        comes again, to whoever asks, after a minute; five times at most. So handle each by its id, once: this remembers
        the last `remembered` ids and passes over what was handled here before, but it forgets when the program ends.

        Whoever is slow is given less at a time: what cannot be handled before others are given it is left to them.
        Raises RequestRefused.
        """
        handled_before: OrderedDict[str, None] = OrderedDict()
        asked = entries_max
        while not self._closed.is_set():
            try:
                pushes, claim_after_s = self.poll(asked, wait_s)
            except ClientClosed:
                return
            began_s = last_ack_s = time.monotonic()
            handled: list[str] = []
            count = 0
            try:
                for push in pushes:
                    if time.monotonic() - began_s > 0.8 * claim_after_s:
                        break
                    if push.id not in handled_before:
                        yield push
                        handled_before[push.id] = None
                        if len(handled_before) > remembered:
                            handled_before.popitem(last=False)
                    count += 1
                    handled.append(push.id)
                    if time.monotonic() - last_ack_s > ACK_EVERY_S or len(handled) == ACK_IDS_MAX:
                        self.acknowledge(handled)
                        handled, last_ack_s = [], time.monotonic()
            finally:
                if handled:
                    self._acknowledge_last(handled)
            asked = entries_max if count == len(pushes) else max(1, count // 2)

    def _acknowledge_last(self, ids: Sequence[str]) -> None:
        """Of a batch, maybe on the way out of it: what cannot be acknowledged comes again, and is known then."""
        try:
            self.acknowledge(ids, tries_max=5)
        except ClientError as error:
            self._on_trouble(f"{len(ids)} handled pushes are not acknowledged and will come again: {error}")


def _push(fields: Mapping[str, Any]) -> Push:
    return Push(
        id=fields["id"],
        alert_id=fields["alert_id"],
        revision=fields["revision"],
        kind=fields["kind"],
        ring_km=float(fields["ring_km"]),
        at_ms=fields["at"],
        device_ids=tuple(fields["device_ids"]),
        delivery_count=fields.get("delivery_count", 1),
    )


def _problem(response: httpx.Response) -> Mapping[str, Any]:
    try:
        found = response.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(response: httpx.Response) -> RequestRefused:
    problem = _problem(response)
    return RequestRefused(response.status_code, str(problem.get("detail", response.reason_phrase)), problem)


def _retry_after_s(response: httpx.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return min(float(text), RETRY_AFTER_S_MAX) if text.isascii() and text.isdigit() else None


# --- sending pings ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Rows:
    """Pings that wait, as columns that grow."""

    device_ids: list[bytes] = field(default_factory=list)
    lat_e7: list[int] = field(default_factory=list)
    lng_e7: list[int] = field(default_factory=list)
    observed_at_ms: list[int] = field(default_factory=list)
    since_s: float = 0.0
    """When the first of them was put in."""

    def __len__(self) -> int:
        return len(self.device_ids)

    def cut(self, count: int) -> _Rows:
        """Take the first `count` out."""
        first = _Rows(
            self.device_ids[:count], self.lat_e7[:count], self.lng_e7[:count], self.observed_at_ms[:count], self.since_s
        )
        for column in (self.device_ids, self.lat_e7, self.lng_e7, self.observed_at_ms):
            del column[:count]
        return first

    def body(self) -> bytes:
        """As it travels, before compression."""
        ends = np.cumsum([len(device_id) for device_id in self.device_ids], dtype=np.int64).astype(np.uint32)
        width = common_width(ends)
        batch = PingBatch(
            np.zeros(len(self), np.uint16),  # whose they are is said by the key
            np.frombuffer(b"".join(self.device_ids), np.uint8),
            ends,
            np.array(self.lat_e7, np.int32),
            np.array(self.lng_e7, np.int32),
            np.array(self.observed_at_ms, np.int64),
        )
        return ping_payload(batch, width if width <= ID_BYTES_MAX else 0)


class PingSender:
    """Buffers pings and sends them, in the order they were put in, from a thread of its own. Thread-safe.

    When the gateway asks for time (429, 503), or is away, the buffer fills; when it is full, whoever adds waits, or
    gets BufferFull. A program that dies loses what it had not sent: at most `age_s` of pings while all is well.
    """

    def __init__(
        self,
        client: Client,
        batch_pings: int,
        age_s: float,
        buffer_pings: int,
        when_full: Literal["block", "raise"],
        on_refused: Callable[[Sequence[RefusedPing]], None] | None,
    ) -> None:
        """Not called directly: `Client.pings`."""
        if not 1 <= batch_pings <= min(BATCH_PINGS_MAX, buffer_pings):
            raise ValueError(
                f"batch_pings must be from 1 to {BATCH_PINGS_MAX:,} and not above buffer_pings, got {batch_pings}"
            )
        if when_full not in ("block", "raise"):
            raise ValueError(f"when_full must be block or raise, got {when_full!r}")
        self._client = client
        self._batch_pings = batch_pings
        self._age_s = age_s
        self._buffer_pings = buffer_pings
        self._when_full = when_full
        self._on_refused = on_refused
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._changed = threading.Condition()
        # All of these are under its lock.
        self._waiting = _Rows()
        self._under_way = 0
        self._flushing = 0
        self._closing = False
        self._error: ClientError | None = None
        self.accepted = 0
        """Pings that the gateway has on disk."""
        self.refused = 0
        """Pings that it did not take; each was reported."""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tuanyuan-pings", daemon=True)
        self._thread.start()

    def add(self, device_id: str, lat: float, lng: float, observed_at_ms: int | None = None) -> None:
        """One ping. Degrees in your account's datum; `observed_at_ms`: ms since 1970, UTC; None: now.

        Raises BufferFull if it was asked to; RequestRefused if the gateway refuses this client; ClientClosed.
        """
        at_ms = round(time.time() * 1000) if observed_at_ms is None else observed_at_ms
        lat_e7, lng_e7 = _e7(lat, LAT_E7_MAX), _e7(lng, LNG_E7_MAX)
        self._add([_id(device_id)], [lat_e7], [lng_e7], [at_ms])

    def add_columns(
        self,
        device_ids: Sequence[str],
        lat: npt.ArrayLike,
        lng: npt.ArrayLike,
        observed_at_ms: npt.ArrayLike,
    ) -> None:
        """Many pings at once: as `add`, and several times as fast. Columns of one length.

        More than the buffer holds are put in piece by piece: with `raise`, some may be in when it is raised.
        """
        lat_e7, lng_e7 = _column_e7(lat, LAT_E7_MAX), _column_e7(lng, LNG_E7_MAX)
        at_ms: I64 = np.asarray(observed_at_ms).astype(np.int64)
        if not len(device_ids) == len(lat_e7) == len(lng_e7) == len(at_ms):
            lengths = (len(device_ids), len(lat_e7), len(lng_e7), len(at_ms))
            raise ValueError(f"columns must have one length, got {', '.join(map(str, lengths))}")
        for start in range(0, len(device_ids), self._batch_pings):
            part = slice(start, start + self._batch_pings)
            self._add(
                [_id(device_id) for device_id in device_ids[part]],
                lat_e7[part].tolist(),
                lng_e7[part].tolist(),
                at_ms[part].tolist(),
            )

    def _add(self, device_ids: list[bytes], lat_e7: list[int], lng_e7: list[int], at_ms: list[int]) -> None:
        with self._changed:
            while True:
                if self._error is not None:
                    raise self._error
                if self._closing:
                    raise ClientClosed("the sender of pings was closed")
                if len(self._waiting) + self._under_way + len(device_ids) <= self._buffer_pings:
                    break
                if self._when_full == "raise":
                    raise BufferFull(f"{len(self._waiting) + self._under_way:,} pings wait to be sent")
                self._changed.wait()
            rows = self._waiting
            if not rows:
                rows.since_s = time.monotonic()
            rows.device_ids += device_ids
            rows.lat_e7 += lat_e7
            rows.lng_e7 += lng_e7
            rows.observed_at_ms += at_ms
            if len(rows) >= self._batch_pings or len(rows) == len(device_ids):
                self._changed.notify_all()

    def flush(self, timeout_s: float | None = None) -> bool:
        """Send everything now; whether all is answered. Raises RequestRefused."""
        with self._changed:
            self._flushing += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._error is not None or not self.unsent, timeout_s)
            finally:
                self._flushing -= 1
            if self._error is not None:
                raise self._error
            return not self.unsent

    @property
    def unsent(self) -> int:
        """Pings that are not answered yet."""
        return len(self._waiting) + self._under_way

    def close(self, timeout_s: float = 10.0) -> int:
        """Send what waits, for so long at most, and end; how many pings were not sent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        self._ending.set()
        self._thread.join(5.0)
        return self.unsent

    # --- the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (rows := self._next()) is not None:
            try:
                self._send(rows)
            except ClientError as error:
                with self._changed:
                    if not isinstance(error, ClientClosed):
                        self._error = error
                        self._client._on_trouble(f"pings are not sent any more: {error}")
                    self._changed.notify_all()
                return
            with self._changed:
                self._under_way = 0
                self._changed.notify_all()

    def _next(self) -> _Rows | None:
        """The next batch, when it is due; None at the end."""
        with self._changed:
            while True:
                rows = self._waiting
                left_s = rows.since_s + self._age_s - time.monotonic() if rows else None
                due = len(rows) >= self._batch_pings or (left_s is not None and left_s <= 0)
                if rows and (due or self._flushing or self._closing):
                    batch = rows.cut(self._batch_pings)
                    rows.since_s = time.monotonic()
                    self._under_way = len(batch)
                    return batch
                if self._closing:
                    return None
                self._changed.wait(left_s)

    def _send(self, rows: _Rows) -> None:
        body = self._compressor.compress(rows.body())
        headers = {"Content-Type": PINGS_TYPE, "Content-Encoding": "zstd"}
        try:
            answer = self._client._ask("POST", "/v1/pings", body, headers, ending=self._ending).json()
        except RequestRefused as refused:
            if refused.status != 413 or len(rows) == 1:
                raise
            first = rows.cut(len(rows) // 2)
            self._send(first)
            self._send(rows)
            return
        refused_pings = [
            RefusedPing(rows.device_ids[one["position"]].decode(errors="replace"), one["reason"], one.get("detail", ""))
            for one in answer["refused"]
        ]
        with self._changed:
            self.accepted += answer["accepted"]
            self.refused += answer["refused_total"]
        if refused_pings and self._on_refused is not None:
            try:
                self._on_refused(refused_pings)
            except Exception:
                logger.exception("on_refused failed; pings are sent all the same")


def _id(device_id: str) -> bytes:
    return device_id.encode(errors="surrogatepass")


def _e7(degrees: float, most_e7: int) -> int:
    """In 1e-7 degree; NOWHERE_E7 for what is no coordinate."""
    if not math.isfinite(degrees):
        return NOWHERE_E7
    found = round(degrees * E7)
    return found if -most_e7 <= found <= most_e7 else NOWHERE_E7


def _column_e7(degrees: npt.ArrayLike, most_e7: int) -> I32:
    column = np.asarray(degrees, np.float64)
    with np.errstate(invalid="ignore"):
        scaled = np.rint(column * E7)
        good = np.abs(scaled) <= most_e7  # not of NaN either
    return np.where(good, scaled, NOWHERE_E7).astype(np.int32)


# --- webhooks ---------------------------------------------------------------------------------------------------------


def verify_webhook(body: bytes, headers: Mapping[str, str], secrets: Iterable[str]) -> Push | None:
    """The push of a webhook request; None: it is a test event, to be answered with 2xx.

    `body`: as it came, byte for byte; `headers`: any spelling of their names; `secrets`: whsec_…, all that may be in
    use. A request is tried again until it is answered with 2xx: deduplicate on `Push.id`. Raises NotGenuine.
    """
    reason = "no secret was given"
    event: Any = None
    for secret in secrets:
        try:
            event = Webhook(secret).verify(body, dict(headers))
            break
        except Exception as error:  # the library raises whatever a malformed header brings about
            reason = str(error) or type(error).__name__
    if event is None:
        raise NotGenuine(f"this request was not signed with a secret of yours, or not now: {reason}")
    if event["type"] == "webhook.test":
        return None
    return _push(event["data"])
