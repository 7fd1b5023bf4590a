"""The gateway behind a socket: uvicorn on uvloop and httptools, with limits on what comes before a body.

A request's head has at most HEAD_BYTES_MAX and HEADERS_MAX, and the whole of it has to arrive within READ_TIMEOUT_S:
who sends a byte now and then holds a connection for so long, and no longer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.config import GatewayConfig
from gateway.runtime import Gateway

logger = logging.getLogger(__name__)

HEAD_BYTES_MAX = 32 << 10
HEADERS_MAX = 100
READ_TIMEOUT_S = 60.0
IDLE_TIMEOUT_S = 75
"""Of a connection between two requests: longer than the 60 s for which proxies commonly keep one."""
CONNECTIONS_MAX = 4_096
"""Beyond that, requests get 503 at once."""
LINGER_S = 2.0
"""For a client to read why it was refused, before the connection is closed under what it still sends."""
STOP_TIMEOUT_S = 20
"""For requests that are under way when the gateway stops."""
BACKLOG = 2_048

_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class GuardedProtocol(HttpToolsProtocol):
    """HTTP/1.1 of one connection."""

    _head_bytes = 0
    """Received since the last request ended; counted while the head of the next one is not whole."""
    _field_bytes = 0
    _in_head = True
    _refused = False
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        # A chunk may hold the head and some of the body; one without an end of the head holds nothing else.
        if self._in_head and self._head_bytes > HEAD_BYTES_MAX:
            self._refuse()

    def on_message_begin(self) -> None:
        self._field_bytes = 0
        if not self._refused:
            self._start_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._field_bytes += len(name) + len(value) + 4
        if self._field_bytes > HEAD_BYTES_MAX or len(self.headers) >= HEADERS_MAX:
            self._refuse()
        else:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        if not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        if not self._refused:
            self._stop_timer()
            super().on_message_complete()

    def _refuse(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.transport.write(_TOO_LARGE)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_timer(LINGER_S)

    def _start_timer(self, timeout_s: float | None = None) -> None:
        self._stop_timer()
        self._read_timer = self.loop.call_later(READ_TIMEOUT_S if timeout_s is None else timeout_s, self._end)

    def _stop_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _end(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class GatewayServer(uvicorn.Server):
    """Serves one app on one socket, until `stop`. Signals are the caller's."""

    def __init__(self, app: FastAPI, config: GatewayConfig, on_ready: Callable[[], None] = lambda: None) -> None:
        """`on_ready` is called when the first request can come."""
        self._gateway: Gateway = app.state.gateway
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=GuardedProtocol,
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,  # the edge writes the lines
                proxy_headers=False,  # the edge knows whom to believe
                server_header=False,
                timeout_keep_alive=IDLE_TIMEOUT_S,
                timeout_graceful_shutdown=STOP_TIMEOUT_S,
                limit_concurrency=CONNECTIONS_MAX,
                backlog=BACKLOG,
                ssl_certfile=config.tls_certificate,
                ssl_keyfile=config.tls_key,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def stop(self) -> None:
        """Take no more requests, answer those that are under way, and end. The second time: end at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        self._gateway.stopping.set()


def listen(config: GatewayConfig) -> socket.socket:
    """The socket that the gateway answers at. Raises OSError: the address is taken, or not this machine's."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    return socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
