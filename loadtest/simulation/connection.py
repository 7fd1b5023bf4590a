"""redis-py's connection, with a simulated server at its other end: everything above it is the real client library.

    redis.Redis ──> ConnectionPool ──> SimulatedConnection ──> Route ──> SimulatedServer
    flows.server.Link ───────────────────────┘

A `Route` is one process's way to the server. It asks the adversary, at every exchange, what becomes of it: the link may
break before a command was executed, in the middle of a batch, or behind it, with some of the replies read or none.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, cast

import hiredis
import redis

from flows.server import LinkOpener, link_opener
from loadtest.simulation.clock import SimulatedClock
from loadtest.simulation.server import Session, SimulatedServer


@dataclass(frozen=True, slots=True)
class Break:
    """How a link breaks: after so many commands were executed and so many replies came back."""

    executed_count: int
    reply_count: int
    timeout: bool
    """Whether the client sees a timeout instead of a closed connection."""


class Route:
    """One process's way to the server, without an adversary: nothing ever breaks."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server = server

    def reach(self) -> None:
        """Raises redis.ConnectionError if the server cannot be reached."""

    def fate(self, command_count: int) -> Break | None:
        """What becomes of an exchange of so many commands."""
        return None

    def interlude(self, moment: str) -> None:
        """Others may run here, and this process may die."""


class SimulatedConnection:
    """What redis-py and `flows.server.Link` use of a connection."""

    def __init__(self, route: Route, **_: Any) -> None:
        self.route = route
        self.db = 0
        self.pid = os.getpid()
        self.health_check_interval = 0
        self.retry = redis.retry.Retry(redis.backoff.NoBackoff(), 0)
        self._session: Session | None = None
        self._run_number = 0
        self._replies: deque[Any] = deque()
        self._is_timing_out = False

    # --- what the pool asks for ---------------------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        return self._session is not None

    def connect(self) -> None:
        if self._session is None:
            self.route.reach()
            self._session = Session()
            self._run_number = self.route.server.run_number
            self._replies.clear()

    connect_check_health = connect

    def disconnect(self, *_: Any) -> None:
        self._session = None
        self._replies.clear()

    def can_read(self, timeout: float = 0) -> bool:
        if self._run_number != self.route.server.run_number:
            raise redis.ConnectionError("the server has closed the connection")
        return bool(self._replies)

    def should_reconnect(self) -> bool:
        return False

    def set_parser(self, parser_class: Any) -> None:
        """Replies need no parser here."""
        self._parser = _NoParser()

    def re_auth(self) -> None:
        """Nobody has a password here."""

    # --- commands and replies -----------------------------------------------------------------------------------------

    def pack_commands(self, commands: Iterable[Sequence[Any]]) -> list[list[bytes]]:
        return [_words(command) for command in commands]

    def send_command(self, *words: Any, **_: Any) -> None:
        self._send([_words(words)])

    def send_packed_command(self, packed: list[Any], check_health: bool = True) -> None:
        if packed and isinstance(packed[0], bytes):
            reader = hiredis.Reader()
            for part in packed:
                reader.feed(part)
            commands: list[list[bytes]] = []
            while (command := reader.gets()) is not False:
                commands.append(cast("list[bytes]", command))
            self._send(commands)
        else:
            self._send(packed)

    def _send(self, commands: list[list[bytes]]) -> None:
        if self._session is None:
            self.connect()
        self.route.interlude("before")
        session, server = self._session, self.route.server
        if session is None or self._run_number != server.run_number:
            self.disconnect()
            raise redis.ConnectionError("the server has closed the connection")
        fate = self.route.fate(len(commands))
        if fate is not None:
            replies = [server.execute(session, command) for command in commands[: fate.executed_count]]
            unread = list(self._replies)  # to what was sent before this: they have come, and can still be read
            self.disconnect()
            if fate.reply_count == 0 and fate.executed_count == 0 and not fate.timeout:
                raise redis.ConnectionError("the link broke before anything was sent")
            self._session = session
            self._is_timing_out = fate.timeout
            self._replies.extend(unread + replies[: fate.reply_count])
            self._replies.append(_BROKEN)
        else:
            self._replies.extend([server.execute(session, command) for command in commands])
        self.route.interlude("behind")

    def read_response(self, *_: Any, **__: Any) -> Any:
        if not self._replies:
            self.disconnect()
            raise redis.ConnectionError("the connection is closed")
        reply = self._replies.popleft()
        if reply is _BROKEN:
            self.disconnect()
            if self._is_timing_out:
                raise redis.TimeoutError("no reply in time")
            raise redis.ConnectionError("the link broke")
        if isinstance(reply, Exception):
            raise reply
        return reply


class _NoParser:
    """Replies here are no bytes that could be compared: each is received."""

    def skip(self, expected: bytes) -> bool:
        return False


_BROKEN = object()
"""In place of the replies that never came."""


class _Pool(redis.ConnectionPool):
    """The real pool's way with connections, without its locks and measurements, which cost more than our server."""

    def get_connection(self, *_: Any, **__: Any) -> Any:
        free = self._available_connections
        connection = cast(SimulatedConnection, free.pop() if free else self.make_connection())
        self._in_use_connections.add(cast(Any, connection))
        try:
            connection.connect()
            try:
                if connection.can_read():
                    raise redis.ConnectionError("Connection has data")
            except redis.ConnectionError:
                connection.disconnect()
                connection.connect()
        except BaseException:
            self.release(cast(Any, connection))
            raise
        return connection

    def release(self, connection: Any) -> None:
        if connection in self._in_use_connections:
            self._in_use_connections.remove(connection)
            self._available_connections.append(connection)


class _Pipeline(redis.client.Pipeline):
    """The real one, but for what it would still send when it is garbage: nobody knows when that is collected, so a
    seed would not always be the same run.
    """

    def __del__(self) -> None:
        pass


class _Client(redis.Redis):
    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> redis.client.Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


def simulated_client(route: Route) -> redis.Redis:
    """The real client library over a route."""
    client = copy(_CLIENT)  # making one fills a table of 400 replies' parsers
    client.connection_pool = _pool(route)
    return client


def _pool(route: Route) -> _Pool:
    return _Pool(connection_class=cast(Any, SimulatedConnection), route=route, protocol=2)


_CLIENT = _Client(connection_pool=_pool(Route(SimulatedServer(0))))


def simulated_links(client: redis.Redis, clock: SimulatedClock) -> LinkOpener:
    """Opens the real links over a client's route."""
    return link_opener(client, clock=clock)


def _words(command: Sequence[Any]) -> list[bytes]:
    """A command as the server gets it: `XGROUP CREATE` is two words there."""
    first = command[0]
    words = [*first.split(), *command[1:]] if isinstance(first, str) and " " in first else command
    return [word if isinstance(word, bytes) else str(word).encode() for word in words]
