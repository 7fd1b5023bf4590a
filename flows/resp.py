"""Replies of the server for links: a parser of its protocol (RESP2) that reads a log entry once, into its own memory.

    socket ──recv_into──> buffer, 256 KB ──> lines, short values
                     └──> memory of a long value: never copied again, and the GIL is free meanwhile

It is what redis-py calls a parser class. Its own copies a value four times while it holds the GIL, hiredis twice.
Specification: https://redis.io/docs/latest/develop/reference/protocol-spec/.
"""

from __future__ import annotations

import socket
from typing import Any, cast

import numpy as np
import redis
from redis.connection import DefaultParser

LONG_BYTES = 16 << 10
"""Values from this size on get memory of their own."""

SKIPPED_BYTES_MAX = 4 * LONG_BYTES
"""As much as the smallest buffer holds."""

MANY = 16
"""Replies from this number on are taken from the buffer together."""

_CRLF = b"\r\n"
_CLOSED = "the server has closed the connection"
_parse_error = cast(Any, DefaultParser).parse_error


class LinkParser:
    """Replies from one socket. Short values are `bytes`, long ones read-only memoryviews, errors are returned.

    For one thread. Methods raise redis.ConnectionError when the server hangs up, OSError as sockets do.
    """

    EXCEPTION_CLASSES: dict[str, Any] = cast(Any, DefaultParser).EXCEPTION_CLASSES

    def __init__(self, socket_read_size: int) -> None:
        self._buffer = bytearray(max(SKIPPED_BYTES_MAX, socket_read_size))
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0
        self._socket: socket.socket | None = None
        self._timeout_s: float | None = None

    # Called by redis-py's connection.

    def on_connect(self, connection: Any) -> None:
        """A socket was opened."""
        self._socket = connection._sock
        self._timeout_s = connection.socket_timeout
        self._start = self._stop = 0

    def on_disconnect(self) -> None:
        """The socket is closed."""
        self._socket = None

    def can_read(self, timeout: float) -> bool:
        """Whether a reply, or a part of one, is there within so many seconds."""
        if self._start < self._stop:
            return True
        peer = self._connected()
        peer.settimeout(timeout)
        try:
            self._fill()
        except (TimeoutError, BlockingIOError):
            return False
        finally:
            peer.settimeout(self._timeout_s)
        return True

    def read_response(self, disable_decoding: bool = False, timeout: object = None, **_: object) -> object:
        """The next reply. (Nothing is ever decoded: links ask for bytes.)"""
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"$":
            size = int(rest)
            return None if size < 0 else self._value(size)
        if kind == b"*":
            count = int(rest)
            return None if count < 0 else self._array(count)
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"-":
            error = _parse_error(rest.decode("utf-8", errors="replace"))
            if isinstance(error, redis.ConnectionError):
                raise error
            return error
        raise redis.InvalidResponse(f"a reply must begin with + - : $ or *, got {line[:32]!r}")

    def skip(self, expected: bytes) -> bool:
        """Whether exactly these bytes come next, which are whole replies. Then they are taken; else nothing is.

        `expected`: at most `SKIPPED_BYTES_MAX`. For answers that nearly always say the same: no object is made of them.
        """
        while self._stop - self._start < len(expected):
            if not expected.startswith(self._view[self._start : self._stop]):
                return False
            self._fill()
        if self._view[self._start : self._start + len(expected)] != expected:
            return False
        self._start += len(expected)
        return True

    def _array(self, count: int) -> list[object]:
        """The parts of an array: short ones many at once, at a fifth of the time."""
        replies: list[object] = []
        while len(replies) < count:
            if count - len(replies) >= MANY:
                self._read_short(replies, count)
            if len(replies) < count:
                replies.append(self.read_response())
        return replies

    def _read_short(self, replies: list[object], count: int) -> None:
        """Take plain answers and short values from the buffer, as far as they are whole and nothing else comes."""
        lines = bytes(self._view[self._start : min(self._stop, self._start + 4 * LONG_BYTES)]).split(_CRLF)
        last = len(lines) - 1  # not ended yet
        at = taken_bytes = 0
        while at < last and len(replies) < count:
            line = lines[at]
            if line.startswith(b"+"):
                replies.append(line[1:])
                at += 1
                taken_bytes += len(line) + 2
                continue
            # A value that holds the end of a line is shorter here than it says.
            if not line.startswith(b"$") or at + 1 >= last or len(lines[at + 1]) != int(line[1:]):
                break
            replies.append(lines[at + 1])
            taken_bytes += len(line) + len(lines[at + 1]) + 4
            at += 2
        self._start += taken_bytes

    # Bytes.

    def _connected(self) -> socket.socket:
        if self._socket is None:
            raise redis.ConnectionError(_CLOSED)
        return self._socket

    def _line(self) -> bytes:
        """The next line, without its end."""
        searched = self._start
        while (end := self._buffer.find(_CRLF, searched, self._stop)) < 0:
            left = self._stop - self._start
            searched = max(0, left - 1)
            self._fill()
            searched += self._start
        line = bytes(self._view[self._start : end])
        self._start = end + len(_CRLF)
        return line

    def _value(self, size: int) -> bytes | memoryview:
        """A value of that size, and the end of its line."""
        if size < LONG_BYTES:
            while self._stop - self._start < size + len(_CRLF):
                self._fill()
            value: bytes | memoryview = bytes(self._view[self._start : self._start + size])
        else:
            memory = cast(Any, np.empty(size, np.uint8)).data
            there = min(size, self._stop - self._start)
            memory[:there] = self._view[self._start : self._start + there]
            self._start += there
            peer = self._connected()
            while there < size:
                count = peer.recv_into(memory[there:])
                if not count:
                    raise redis.ConnectionError(_CLOSED)
                there += count
            while self._stop - self._start < len(_CRLF):
                self._fill()
            value, size = memory.toreadonly(), 0
        self._start += size + len(_CRLF)
        return value

    def _fill(self) -> None:
        """Read more into the buffer, moving what is left to its beginning first. A line never fills it."""
        if self._start:
            left = self._stop - self._start
            self._view[:left] = self._view[self._start : self._stop]
            self._start, self._stop = 0, left
        count = self._connected().recv_into(self._view[self._stop :])
        if not count:
            raise redis.ConnectionError(_CLOSED)
        self._stop += count
