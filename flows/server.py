"""The server: what we ask of any Valkey before we trust it, and one connection to one run of it.

    connect ──> redis.Redis      everyday commands; retries off
    Link    ──> one socket       the hot paths; never re-opened, so it can only ever speak to the run it was opened to

Why links: redis-py reconnects and retries silently, and would then go on writing for log entries that a server which
lost its tail no longer has (design section 5). A link that breaks stays broken; the next one says which run it is of.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from flows.clock import CLOCK, Clock
from flows.resp import LinkParser

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
"""A server that does not accept within this is down for us: the caller's backoff goes on from there."""
ANSWER_TIMEOUT_S = 10.0
"""Longest wait for a reply; an fsync on a busy disk takes up to seconds. Blocking reads ask for at most 5 s."""
HEALTH_CHECK_S = 30
"""A pooled connection idle for longer is pinged before it is used."""
READ_BYTES = 256 << 10
"""Per recv(): a unix socket hands over at most about 208 KiB at once."""
LARGE_BYTES = 16 << 10
"""Arguments from this size on are sent as they are; smaller ones are joined first: one system call instead of many."""

_SCHEMES = {
    "valkey": "redis",
    "redis": "redis",
    "valkeys": "rediss",
    "rediss": "rediss",
    "unix": "unix",
    "valkey+unix": "unix",
    "redis+unix": "unix",
}


class ServerRefused(Exception):
    """The server does not promise what exactly-once needs. The message says which setting, and what to do."""


# --- connecting -------------------------------------------------------------------------------------------------------


def masked_url(url: str) -> str:
    """The url as it may be shown: without its password."""
    url = re.sub(r"(?<=://)([^:@/]*):.*@", r"\1:***@", url)  # rather too much than a password with / or @ in it
    return re.sub(r"([?&](?:password|ssl_password)=)[^&]*", r"\1***", url)


def connect(url: str) -> redis.Redis:
    """A client for everyday commands, thread-safe. Opens no connection yet.

    `url`: redis://, rediss:// (TLS) or unix://, also spelled valkey://. Retries are off: see the module's text.
    Raises ValueError for a url of another kind.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise ValueError(f"a server's url must begin with {', '.join(_SCHEMES)}://, got {masked_url(url)!r}")
    known = _SCHEMES[scheme]
    options: dict[str, Any] = {
        "decode_responses": False,
        "protocol": 2,  # the same replies from every server, and no HELLO
        "retry": Retry(NoBackoff(), 0),
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_timeout": ANSWER_TIMEOUT_S,
        "socket_read_size": READ_BYTES,
        "health_check_interval": HEALTH_CHECK_S,
        "driver_info": None,  # two round trips less per connection
    }
    if known != "unix":
        options["socket_keepalive"] = True
    from_url = cast(Callable[..., redis.Redis], redis.Redis.from_url)
    try:
        return from_url(f"{known}://{rest}", **options)
    except ValueError as error:
        raise ValueError(f"a server's url must be understood: {error}, got {masked_url(url)!r}") from None


class Link:
    """One connection to one run of the server, for one thread. Opening it checks the server.

    Once broken (redis.ConnectionError, redis.TimeoutError from any method) it stays broken.
    """

    run_id: str
    """The server's own name for this run: it changes with every start."""
    is_cluster: bool
    """Whether the server is a node of a cluster, which takes no transaction over several shards."""
    clock_ahead_ms: float
    """Server's clock minus ours, when the link was opened."""
    faults: list[str]
    """What the server's settings lacked then; not empty only if `unsafe`."""

    def __init__(
        self,
        client: redis.Redis,
        unsafe: bool = False,
        answer_timeout_s: float | None = None,
        clock: Clock = CLOCK,
    ) -> None:
        """`answer_timeout_s`: other than the client's.

        Raises ServerRefused (for its settings never if `unsafe`), redis.ConnectionError, redis.TimeoutError.
        """
        self._clock = clock
        pool = cast(Any, client).connection_pool
        # Not by the pool: it makes 100 connections in its life, also where the server was away, and then no more.
        self._connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._connection.set_parser(LinkParser)
        self._connection.health_check_interval = 0  # a PING between a command and its reply would be ours to read
        if answer_timeout_s is not None:
            self._connection.socket_timeout = answer_timeout_s
        try:
            self._connection.connect()
            # redis-py would open it again by itself, say when another thread closes it in the middle of a call.
            self._connection.connect = self._connection.connect_check_health = _refuse_to_reconnect
            self.faults = settings_faults(self)
            if self.faults and not unsafe:
                raise ServerRefused("; ".join(self.faults))
            info = self.ask("INFO", "server")
            self.run_id = _run_id(info)
            self.is_cluster = b"redis_mode:cluster" in cast(bytes, info)
            seconds, microseconds = cast(list[bytes], self.ask("TIME"))
            self.clock_ahead_ms = int(seconds) * 1000 + int(microseconds) / 1000 - clock.now_ms()
        except BaseException:
            self.close()
            raise

    def send(self, parts: Iterable[bytes | memoryview]) -> None:
        """Send packed commands (`packed`), as many as there are; each one's reply has to be received."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        chunks: list[bytes | memoryview] = []
        small: list[bytes | memoryview] = []
        small_bytes = 0
        for part in parts:
            if len(part) >= LARGE_BYTES or small_bytes >= 4 * LARGE_BYTES:
                chunks.append(b"".join(small))
                small, small_bytes = [], 0
            if len(part) >= LARGE_BYTES:
                chunks.append(part)
            else:
                small.append(part)
                small_bytes += len(part)
        chunks.append(b"".join(small))
        self._connection.send_packed_command([chunk for chunk in chunks if chunk], check_health=False)

    def receive(self) -> object:
        """The next reply; an error reply is returned, as a redis.ResponseError, not raised."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        try:
            return cast(object, self._connection.read_response())
        except redis.ResponseError as error:
            return error

    def skip(self, expected: bytes) -> bool:
        """Whether exactly these replies come next; they are then taken, else none is and `receive` reads them."""
        if not self._connection.is_connected:
            raise redis.ConnectionError("this link to the server is broken")
        try:
            return cast(LinkParser, self._connection._parser).skip(expected)
        except (OSError, redis.ConnectionError) as error:
            self.close()
            raise redis.ConnectionError(f"the link to the server broke: {error}") from error

    def ask(self, *arguments: bytes | str | int) -> object:
        """One command, one reply. Raises redis.ResponseError for an error reply."""
        self.send([packed(*arguments)])
        reply = self.receive()
        if isinstance(reply, redis.ResponseError):
            raise reply
        return reply

    def now_ms(self) -> float:
        """The server's clock, as far as it can be told without asking: ms since 1970."""
        return self._clock.now_ms() + self.clock_ahead_ms

    def close(self) -> None:
        """Break the link; also from another thread, whose peer blocked in `receive` then gets a ConnectionError."""
        self._connection.disconnect()


def worth_a_line(failures_in_a_row: int) -> bool:
    """Whether to log one more failure in a row: the 1st, 2nd, 4th, 8th ..., and every 60th, about once a minute."""
    return failures_in_a_row & (failures_in_a_row - 1) == 0 or failures_in_a_row % 60 == 0


def _refuse_to_reconnect(**_: object) -> None:
    raise redis.ConnectionError("this link to the server is broken")


LinkOpener = Callable[[], Link]
"""Opens a fresh link; what reader and writer are given, so that a simulator can give them another one."""


def raise_if_lost(error: redis.WatchError) -> None:
    """Raise the lost connection behind a WatchError, if there is one: then nobody knows whether the MULTI was executed.

    redis-py says WatchError both for a watched key that changed and for a connection that broke in the meantime.
    """
    if isinstance(error.__context__, redis.ConnectionError | redis.TimeoutError):
        raise error.__context__ from None


def link_opener(client: redis.Redis, unsafe: bool = False, clock: Clock = CLOCK) -> LinkOpener:
    """Opens links to the client's server."""
    return lambda: Link(client, unsafe, clock=clock)


def packed(*arguments: bytes | str | int) -> bytes:
    """One command in the server's protocol (RESP)."""
    parts = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        raw = argument if isinstance(argument, bytes) else str(argument).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(raw), raw))
    return b"".join(parts)


def check_server(client: redis.Redis, unsafe: bool = False) -> str:
    """The server's run id, if it keeps what it acknowledges (design section 5).

    Raises ServerRefused, unless `unsafe`; redis.ConnectionError, redis.TimeoutError.
    """
    link = Link(client, unsafe)
    link.close()
    return link.run_id


_DEMANDS = {
    "appendonly": ("yes", "entries must be on disk"),
    "appendfsync": ("always", "nobody may see an entry that is not on disk yet"),
    "no-appendfsync-on-rewrite": ("no", "else `always` pauses while the file is rewritten"),
    "maxmemory-policy": ("noeviction", "no log and no queue may be evicted"),
}


def settings_faults(link: Link) -> list[str]:
    """What the server's settings lack, in words, each with what to do; empty if it keeps what it acknowledges."""
    try:
        flat = cast(list[bytes], link.ask("CONFIG", "GET", *_DEMANDS))
    except redis.ResponseError as error:
        return [f"the server does not tell its settings ({error}); --unsafe-server goes on without knowing them"]
    got = {flat[index].decode(): flat[index + 1].decode() for index in range(0, len(flat), 2)}
    return [
        f"the server must run with {name} {wanted} ({reason}), got {got.get(name, 'nothing')}; "
        f"set it, or pass --unsafe-server to go on without the promise"
        for name, (wanted, reason) in _DEMANDS.items()
        if got.get(name) != wanted
    ]


def memory_of(link: Link) -> tuple[int, int]:
    """Bytes that the server uses, and `maxmemory`: 0 if it has no limit."""
    info = cast(bytes, link.ask("INFO", "memory"))
    found = {name: int(value) for name, value in re.findall(rb"^(used_memory|maxmemory):(\d+)", info, re.MULTILINE)}
    return found.get(b"used_memory", 0), found.get(b"maxmemory", 0)


def _run_id(info: object) -> str:
    match = re.search(rb"^run_id:([0-9a-f]+)", cast(bytes, info), re.MULTILINE)
    if match is None:
        raise ServerRefused("the server must tell its run_id in INFO server")
    return match[1].decode()
