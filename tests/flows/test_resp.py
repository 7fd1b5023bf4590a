"""The links' parser against replies written by hand, cut at every place, and against the server's own."""

from __future__ import annotations

import random
import socket
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from flows.resp import LONG_BYTES, LinkParser


def encoded(value: Any) -> bytes:
    if value is None:
        return b"$-1\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if isinstance(value, str):
        return b"+%b\r\n" % value.encode()
    return b"*%d\r\n" % len(value) + b"".join(map(encoded, value))


def plain(reply: Any) -> Any:
    if isinstance(reply, list):
        return [plain(part) for part in reply]
    return bytes(reply) if isinstance(reply, memoryview) else reply


def as_read(value: Any) -> Any:
    """What a value is once it was read: plain answers are bytes, too."""
    if isinstance(value, list):
        return [as_read(part) for part in value]
    return value.encode() if isinstance(value, str) else value


def parser_of(peer: socket.socket) -> LinkParser:
    parser = LinkParser(4 * LONG_BYTES)
    peer.settimeout(10)
    parser.on_connect(SimpleNamespace(_sock=peer, socket_timeout=10))
    return parser


def replies_of(raw_parts: list[bytes], count: int) -> list[Any]:
    """What the parser makes of bytes that arrive in these portions."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parser = parser_of(ours)

        def send() -> None:
            for part in raw_parts:
                theirs.sendall(part)

        sender = threading.Thread(target=send)
        sender.start()
        replies = [plain(parser.read_response()) for _ in range(count)]
        sender.join()
        assert not parser.can_read(0)
    return replies


VALUES: list[Any] = [
    ["QUEUED"] * 40,
    [b"%d-%d" % (number, number) for number in range(50)] + [b"\r\n$1\r\na\r\n", b"ab\r\n", b"", 5, None, ["OK"] * 20],
    [b"v" * LONG_BYTES, *[b"w" * 1000] * 20],
    b"",
    b"OK\r\n$3\r\n",
    None,
    [],
    [b"a", [1, -2, None], [[b"x" * 100]]],
    b"y" * (LONG_BYTES - 1),
    b"z" * LONG_BYTES,
    [[b"log", [[b"1-1", [b"pings", bytes(range(256)) * 400]], [b"1-2", [b"tick", b"\x81"]]]]],
    7,
]


QUEUED = b"+QUEUED\r\n" * 5


@pytest.mark.parametrize(
    "sent",
    [
        QUEUED,
        b"+QUEUED\r\n" * 4 + b"-ERR no\r\n",
        b"-ERR other\r\n",
        b"+QUEUED\r\n" * 4 + b"+QUEUER\r\n",
        QUEUED + b":1\r\n",
    ],
)
def test_what_was_expected_is_taken_whole_and_of_anything_else_nothing(sent: bytes) -> None:
    for cut in range(1, len(sent)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            parser = parser_of(ours)
            theirs.sendall(sent[:cut])
            sender = threading.Timer(0, lambda theirs=theirs, rest=sent[cut:]: theirs.sendall(rest))
            sender.start()
            assert parser.skip(QUEUED) == sent.startswith(QUEUED)
            sender.join()
            left = sent.removeprefix(QUEUED)
            replies = [parser.read_response() for _ in range(left.count(b"\r\n"))]
            assert [str(reply) for reply in replies if isinstance(reply, Exception)] == [
                line[1:].removeprefix("ERR ") for line in left.decode().splitlines() if line.startswith("-")
            ]
            assert not parser.can_read(0)


def test_a_link_that_breaks_says_so_where_replies_are_expected() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        parser = parser_of(ours)
        theirs.sendall(QUEUED[:11])
        theirs.close()
        with pytest.raises(redis.ConnectionError):
            parser.skip(QUEUED)


def test_replies_are_read_wherever_they_are_cut() -> None:
    raw = b"".join(map(encoded, VALUES))
    assert replies_of([raw], len(VALUES)) == as_read(VALUES)
    source = random.Random(1)
    for _ in range(30):
        cuts = sorted(source.sample(range(1, len(raw)), 12))
        parts = [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
        assert replies_of(parts, len(VALUES)) == as_read(VALUES)
    short = b"".join(map(encoded, VALUES[3:8]))
    assert replies_of([bytes([byte]) for byte in short], 5) == as_read(VALUES[3:8])


def test_a_long_value_has_memory_of_its_own_that_cannot_be_written_to() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parser = parser_of(ours)
        theirs.sendall(encoded(b"a" * LONG_BYTES))
        first = parser.read_response()
        theirs.sendall(encoded(b"b" * LONG_BYTES))
        second = parser.read_response()
        assert isinstance(first, memoryview)
        assert isinstance(second, memoryview)
        assert first.readonly
        assert bytes(first) == b"a" * LONG_BYTES
        assert bytes(second) == b"b" * LONG_BYTES


def test_an_error_is_returned_and_does_not_end_what_it_stands_in() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parser = parser_of(ours)
        theirs.sendall(b"*2\r\n-ERR The ID specified in XADD is equal or smaller\r\n+OK\r\n")
        refused, ok = cast(Any, parser.read_response())
        assert isinstance(refused, redis.ResponseError)
        assert "equal or smaller" in str(refused)
        assert ok == b"OK"
        theirs.sendall(b"-OOM command not allowed\r\n-LOADING Valkey is loading the dataset in memory\r\n")
        assert isinstance(parser.read_response(), redis.ResponseError)
        with pytest.raises(redis.ConnectionError, match="loading"):
            parser.read_response()


@pytest.mark.parametrize("sent", [b"", b"*2\r\n+OK\r\n", b"$5\r\nab", b"$20000\r\nab", b"+O"])
def test_a_server_that_hangs_up_in_the_middle_breaks_the_link(sent: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        parser = parser_of(ours)
        theirs.sendall(sent)
        theirs.close()
        with pytest.raises(redis.ConnectionError, match="closed the connection"):
            parser.read_response()
        parser.on_disconnect()
        with pytest.raises(redis.ConnectionError):
            parser.read_response()


def test_what_is_no_reply_is_refused_and_silence_times_out() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        parser = parser_of(ours)
        theirs.sendall(b"HTTP/1.1 400\r\n")
        with pytest.raises(redis.InvalidResponse, match="must begin with"):
            parser.read_response()
        ours.settimeout(0.01)
        with pytest.raises(TimeoutError):
            parser.read_response()
