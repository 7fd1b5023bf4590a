"""Compressed bodies -> their bytes, never more of them than allowed, whatever the few compressed ones claim.

gzip (RFC 1952) and zstd (RFC 8878): several members or frames in a row are one body, as both standards say. A stream
that ends in the middle, or has anything behind its end, is refused whole: nobody knows what was meant to be in it.
Zstandard's skippable frames are skipped; dictionaries, and windows above 8 MiB, are refused, as its RFC suggests.

A bomb costs what its compressed bytes cost and one output of the size allowed: gzip is let out piece by piece; of a
zstd frame the headers of its blocks are walked first, which tells where it ends, and that it is all there.
"""

from __future__ import annotations

import zlib
from enum import StrEnum

import zstandard

PIECE_BYTES = 64 << 10
"""Given to zlib at a time, so that what it gives back unused is small."""
MEMBERS_MAX = 1_000
"""gzip members or zstd frames in one body: each costs some us, however empty it is."""
BLOCKS_MAX = 65_536
"""zstd blocks in one body, walked in Python: about 30 ms. Encoders put up to 128 KiB into each."""
WINDOW_BYTES_MAX = 8 << 20
"""RFC 8878, section 3.1.1.1.2: what every decoder should take."""

_GZIP = 16 + zlib.MAX_WBITS
_ZSTD_MAGIC = 0xFD2FB528
_SKIPPABLE_MAGIC = range(0x184D2A50, 0x184D2A60)
_RLE = 1


class MalformedBody(ValueError):
    """A body that is not what its headers say. Fit for an answer: bounded, without anything of what came."""


class BodyTooLarge(ValueError):
    """A body with more in it than is taken at a time."""


class Encoding(StrEnum):
    """Content-Encoding of a body."""

    IDENTITY = "identity"
    GZIP = "gzip"
    ZSTD = "zstd"


def decompressed(body: bytes, encoding: Encoding, bytes_max: int) -> bytes:
    """The body's own bytes, at most `bytes_max`. Raises MalformedBody, BodyTooLarge."""
    if encoding is Encoding.GZIP:
        return _gunzip(body, bytes_max)
    if encoding is Encoding.ZSTD:
        return _unzstd(body, bytes_max)
    if len(body) > bytes_max:
        raise _too_large(bytes_max)
    return body


def _too_large(bytes_max: int) -> BodyTooLarge:
    return BodyTooLarge(f"a body must not exceed {bytes_max} bytes when decompressed")


def _gunzip(body: bytes, bytes_max: int) -> bytes:
    view = memoryview(body)
    parts: list[bytes] = []
    room = bytes_max
    at = members = 0
    while at < len(body):
        members += 1
        if members > MEMBERS_MAX:
            raise MalformedBody(f"gzip must have at most {MEMBERS_MAX} members")
        member = zlib.decompressobj(_GZIP)
        try:
            while not member.eof:
                piece = view[at : at + PIECE_BYTES]
                if not piece:
                    raise MalformedBody("gzip ends in the middle")
                at += len(piece)
                rest: memoryview | bytes = piece
                while rest and not member.eof:
                    part = member.decompress(rest, room + 1)  # 0 would mean no limit
                    room -= len(part)
                    if room < 0:
                        raise _too_large(bytes_max)
                    parts.append(part)
                    rest = member.unconsumed_tail
            at -= len(member.unused_data)
        except zlib.error:
            raise MalformedBody("no valid gzip") from None
    return b"".join(parts)


def _unzstd(body: bytes, bytes_max: int) -> bytes:
    view = memoryview(body)
    decompressor = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES_MAX)
    parts: list[bytes] = []
    room = bytes_max
    at = frames = blocks = 0
    while at < len(body):
        frames += 1
        if frames > MEMBERS_MAX:
            raise MalformedBody(f"zstd must have at most {MEMBERS_MAX} frames")
        stop, block_count, has_content = _frame(view, at, BLOCKS_MAX - blocks)
        blocks += block_count
        if has_content:
            parts.append(_unzstd_frame(decompressor, view[at:stop], room, bytes_max))
            room -= len(parts[-1])
        at = stop
    return b"".join(parts)


def _unzstd_frame(decompressor: zstandard.ZstdDecompressor, frame: memoryview, room: int, bytes_max: int) -> bytes:
    """One frame, whole. `room`: how many bytes it may give."""
    try:
        parameters = zstandard.get_frame_parameters(frame)
        size = parameters.content_size
        known = size != zstandard.CONTENTSIZE_UNKNOWN
        if known and size > room:
            raise _too_large(bytes_max)
        if parameters.dict_id:
            raise MalformedBody("zstd must not use a dictionary")
        with decompressor.stream_reader(frame, read_across_frames=False) as reader:
            content = reader.read((size if known else room) + 1)
    except zstandard.ZstdError:
        raise MalformedBody("no valid zstd") from None
    if len(content) > room:
        raise _too_large(bytes_max)
    if known and len(content) != size:
        raise MalformedBody("no valid zstd")
    return content


def _frame(body: memoryview, at: int, blocks_max: int) -> tuple[int, int, bool]:
    """The zstd frame at `at`: where it ends, how many blocks it has, whether it holds content (RFC 8878, section 3.1).

    Raises MalformedBody if it is none, is not all there, or has more than `blocks_max` blocks.
    """
    magic = _little_endian(body, at, 4)
    at += 4
    if magic in _SKIPPABLE_MAGIC:
        at += 4 + _little_endian(body, at, 4)
        if at > len(body):
            raise MalformedBody("zstd ends in the middle")
        return at, 0, False
    if magic != _ZSTD_MAGIC:
        raise MalformedBody("no valid zstd" if at == 4 else "bytes follow the zstd frame")
    descriptor = _little_endian(body, at, 1)
    single_segment = descriptor >> 5 & 1
    content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
    at += 1 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3] + content_size_bytes
    blocks = 0
    last = False
    while not last:
        blocks += 1
        if blocks > blocks_max:
            raise MalformedBody(f"zstd must have at most {BLOCKS_MAX} blocks")
        header = _little_endian(body, at, 3)
        last = bool(header & 1)
        at += 3 + (1 if header >> 1 & 3 == _RLE else header >> 3)
    at += 4 * (descriptor >> 2 & 1)  # checksum
    if at > len(body):
        raise MalformedBody("zstd ends in the middle")
    return at, blocks, True


def _little_endian(body: memoryview, at: int, size: int) -> int:
    raw = body[at : at + size]
    if len(raw) < size:
        raise MalformedBody("zstd ends in the middle")
    return int.from_bytes(raw, "little")
