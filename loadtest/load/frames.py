"""What goes between a feeder and its worker: msgpack maps, each behind its length (u32, little-endian), on a socket."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from typing import Any, cast

import msgpack

from loadtest.load.scenarios import Format

_LENGTH = struct.Struct("<I")
FRAME_BYTES_MAX = 64 << 20
MEDIA_TYPES = {
    "json": "application/json",
    "ndjson": "application/x-ndjson",
    "columns": "application/vnd.tuanyuan.pings+msgpack",
}


@dataclass(frozen=True, slots=True)
class Request:
    """Pings of one partner, ready to be sent."""

    due_s: float
    """On the run's clock."""
    partner: str
    format: Format
    encoding: str | None
    pings: int
    body: bytes
    """Of an HTTP request; format "log": columns as `encode_pings` makes them, partners by the logs' settings."""

    @property
    def name(self) -> str:
        """As Locust shows it."""
        return f"append to log [{self.partner}]" if self.format == "log" else f"POST /v1/pings [{self.format}]"

    def to_frame(self) -> dict[str, Any]:
        return {
            "d": self.due_s,
            "p": self.partner,
            "f": self.format,
            "e": self.encoding,
            "n": self.pings,
            "b": self.body,
        }

    @classmethod
    def of_frame(cls, frame: dict[str, Any]) -> Request:
        return cls(frame["d"], frame["p"], frame["f"], frame["e"], frame["n"], frame["b"])


def send(peer: socket.socket, frame: dict[str, Any]) -> None:
    """Raises OSError."""
    packed = cast(bytes, msgpack.packb(frame))
    peer.sendall(_LENGTH.pack(len(packed)) + packed)


def receive(peer: socket.socket) -> dict[str, Any] | None:
    """The next frame; None: the peer has gone. Raises OSError."""
    head = _exactly(peer, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    assert length <= FRAME_BYTES_MAX, "a frame is a request, and those are bounded"
    packed = _exactly(peer, length)
    return None if packed is None else cast("dict[str, Any]", msgpack.unpackb(packed))


def _exactly(peer: socket.socket, count: int) -> bytes | None:
    chunks: list[bytes] = []
    while count:
        chunk = peer.recv(min(count, 1 << 20))
        if not chunk:
            return None
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)
