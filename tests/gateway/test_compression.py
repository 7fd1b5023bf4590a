"""Compressed bodies: whole ones come out whole, everything else is refused before it costs much."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from gateway.compression import (
    BLOCKS_MAX,
    MEMBERS_MAX,
    PIECE_BYTES,
    BodyTooLarge,
    Encoding,
    MalformedBody,
    decompressed,
)

ROOM = 1 << 20
COMPRESSED = [Encoding.GZIP, Encoding.ZSTD]
SKIPPABLE = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
EMPTY_GZIP = gzip.compress(b"", mtime=0)


def packed(raw: bytes, encoding: Encoding) -> bytes:
    return gzip.compress(raw, mtime=0) if encoding is Encoding.GZIP else zstandard.ZstdCompressor().compress(raw)


def streamed(raw: bytes, piece_bytes: int) -> bytes:
    """zstd of unknown size, flushed after every piece: one block each; with a checksum."""
    stream = zstandard.ZstdCompressor(write_checksum=True).compressobj()
    out = b""
    for start in range(0, len(raw), piece_bytes):
        out += stream.compress(raw[start : start + piece_bytes])
        out += stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    return out + stream.flush()


@pytest.mark.parametrize("encoding", COMPRESSED)
@given(parts=st.lists(st.binary(max_size=400), min_size=1, max_size=4))
def test_members_and_frames_in_a_row_are_one_body(encoding: Encoding, parts: list[bytes]) -> None:
    body = b"".join(packed(part, encoding) for part in parts)
    assert decompressed(body, encoding, ROOM) == b"".join(parts)


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES - 30, PIECE_BYTES, 3 * PIECE_BYTES + 1])
def test_members_that_end_anywhere_in_a_piece_are_told_apart(encoding: Encoding, size: int) -> None:
    raw = bytes(number * 7919 % 251 for number in range(size))
    noise = zlib.compress(raw)[:1000] + raw  # compresses badly
    body = packed(noise, encoding) * 3
    assert decompressed(body, encoding, ROOM) == noise * 3


def test_a_stream_of_unknown_size_and_many_blocks_comes_out_whole() -> None:
    raw = b"0123456789" * 1000
    assert decompressed(streamed(raw, 100), Encoding.ZSTD, ROOM) == raw


def test_skippable_frames_are_skipped() -> None:
    body = SKIPPABLE + packed(b"a", Encoding.ZSTD) + SKIPPABLE + packed(b"b", Encoding.ZSTD)
    assert decompressed(body, Encoding.ZSTD, ROOM) == b"ab"
    with pytest.raises(MalformedBody, match="ends in the middle"):
        decompressed(SKIPPABLE[:-1], Encoding.ZSTD, ROOM)


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_a_body_cut_anywhere_is_refused(encoding: Encoding) -> None:
    for body in (packed(b"hello " * 40, encoding), streamed(b"hello " * 40, 50)):
        if encoding is Encoding.GZIP and body.startswith(b"\x28"):
            continue
        for stop in range(1, len(body)):
            with pytest.raises(MalformedBody):
                decompressed(body[:stop], encoding, ROOM)


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("behind", [b"\0", b"{}", b"\x1f", b"\x28\xb5"])
def test_anything_behind_the_end_is_refused(encoding: Encoding, behind: bytes) -> None:
    with pytest.raises(MalformedBody):
        decompressed(packed(b"[]", encoding) + behind, encoding, ROOM)


@pytest.mark.parametrize("encoding", COMPRESSED)
def test_a_changed_byte_is_noticed(encoding: Encoding) -> None:
    body = packed(b"hello", encoding) if encoding is Encoding.GZIP else streamed(b"hello " * 9, 60)
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 0xFF
        try:
            got = decompressed(bytes(changed), encoding, ROOM)
        except (MalformedBody, BodyTooLarge):
            continue
        # Of gzip's header the time, the system and the extra flags mean nothing.
        assert encoding is Encoding.GZIP
        assert at in range(4, 10)
        assert got == b"hello"


@pytest.mark.parametrize("encoding", Encoding)
def test_exactly_as_much_as_is_allowed_comes_through(encoding: Encoding) -> None:
    raw = b"x" * 10_000
    body = raw if encoding is Encoding.IDENTITY else packed(raw, encoding)
    assert decompressed(body, encoding, 10_000) == raw
    with pytest.raises(BodyTooLarge, match="9999 bytes"):
        decompressed(body, encoding, 9_999)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (Encoding.GZIP, gzip.compress(bytes(100 << 20))),
        (Encoding.GZIP, gzip.compress(bytes(1 << 20)) * 100),
        (Encoding.ZSTD, zstandard.ZstdCompressor().compress(bytes(100 << 20))),
        (Encoding.ZSTD, zstandard.ZstdCompressor().compress(bytes(1 << 20)) * 100),
        (Encoding.ZSTD, streamed(bytes(100 << 20), 1 << 17)),
    ],
    ids=["gzip", "gzip members", "zstd", "zstd frames", "zstd of unknown size"],
)
def test_a_bomb_costs_no_more_memory_than_what_is_allowed(encoding: Encoding, body: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BodyTooLarge):
            decompressed(body, encoding, 2 << 20)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 6 << 20


def test_countless_empty_members_are_refused() -> None:
    assert decompressed(EMPTY_GZIP * MEMBERS_MAX, Encoding.GZIP, ROOM) == b""
    for body, encoding in (
        (EMPTY_GZIP * (MEMBERS_MAX + 1), Encoding.GZIP),
        (SKIPPABLE * (MEMBERS_MAX + 1), Encoding.ZSTD),
    ):
        with pytest.raises(MalformedBody, match=f"at most {MEMBERS_MAX}"):
            decompressed(body, encoding, ROOM)


def test_countless_empty_blocks_are_refused() -> None:
    # Magic, a single segment of no content, raw blocks of no bytes: none of them the last.
    body = b"\x28\xb5\x2f\xfd\x20\x00" + b"\0\0\0" * (BLOCKS_MAX + 1)
    with pytest.raises(MalformedBody, match=f"at most {BLOCKS_MAX} blocks"):
        decompressed(body, Encoding.ZSTD, ROOM)


def test_a_frame_that_needs_a_dictionary_or_a_large_window_is_refused() -> None:
    samples: list[bytes | bytearray | memoryview] = [
        f"device-{number % 7} lat lng observed_at {number}".encode() for number in range(2_000)
    ]
    dictionary = zstandard.train_dictionary(1_000, samples)
    with pytest.raises(MalformedBody, match="dictionary"):
        decompressed(zstandard.ZstdCompressor(dict_data=dictionary).compress(b"a"), Encoding.ZSTD, ROOM)
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=25)).compressobj()
    with pytest.raises(MalformedBody):
        decompressed(wide.compress(b"a" * 100) + wide.flush(), Encoding.ZSTD, ROOM)
