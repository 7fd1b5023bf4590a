"""Pushes -> the commands that write them: one XADD a push, with the id that its log entry gives it.

one push            encoded here, in Python: a fan-out has a thousand ids in each
`PushColumns`       encoded by a kernel: a batch of pings causes dozens of pushes to one device
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flows import wire_kernels as kernels
from flows.log import LogId, format_id, push_key
from flows.wire import encode_push, push_head
from geoindex.columns import I64, U8, U16, U32, Push, PushColumns, ToldAs

PUSH_BITS = 24
PUSH_COUNT_MAX = (1 << PUSH_BITS) - 1
"""Push entries of one queue that one log entry can cause: with 1,000 ids each, 16 thousand million phones."""
SEQ_MAX = 1 << (64 - PUSH_BITS)
COMMAND_BYTES_MAX = 384
"""Of a push beside its ids, its key and its head: frame, entry id, times."""


def push_id(log_id: LogId, push_number: int) -> LogId:
    """Id of the k-th push entry of one queue that a log entry caused, k from 1."""
    ms, seq = log_id
    assert 1 <= push_number <= PUSH_COUNT_MAX, f"a log entry causes at most 2^24 - 1 entries a queue, got {push_number}"
    assert 0 <= seq < SEQ_MAX, f"a log entry's sequence number must be below 2^40, got {seq}"
    return ms, seq << PUSH_BITS | push_number


def first_push_id(log_id: LogId) -> LogId:
    """The least id that a push entry of this log entry could have; none has it, for k begins at 1.

    Below it lies what the log entries before it have caused.
    """
    return log_id[0], log_id[1] << PUSH_BITS


def log_id_of(entry_id: LogId) -> LogId:
    """The log entry that caused a push entry."""
    return entry_id[0], entry_id[1] >> PUSH_BITS


@dataclass(frozen=True, slots=True)
class Tally:
    """What consecutive commands write, for metrics: push i tells `device_count[i]` devices of `partner[i]`."""

    partners: Sequence[str]
    kind: str
    partner: U16
    device_count: U32
    of_pings: bool = False
    """Pings met a ring, rather than a publication, edit, close or growth the table."""

    def __len__(self) -> int:
        return len(self.partner)

    def devices_by_partner(self, is_new: Sequence[bool]) -> dict[str, int]:
        """Devices that the server did not know from an earlier try; `is_new`: of each command."""
        counts = np.bincount(self.partner, self.device_count * np.array(is_new))
        return {self.partners[partner]: int(counts[partner]) for partner in np.flatnonzero(counts).tolist()}


class PushCommands:
    """The XADDs of one shard's block, log entry by log entry."""

    def __init__(self, shard: int) -> None:
        self.parts: list[bytes | memoryview] = []
        self.tallies: list[Tally] = []
        self._shard = shard

    def add(self, log_id: LogId, segments: Sequence[Push | PushColumns], partners: Sequence[str], numbers: I64) -> None:
        """What one log entry caused, or the next part of it. `partners`: names by `Push.partner`.

        numbers: i64[partners]: number of the entry's last push in each partner's queue, 0 before the first; added to.
        """
        for segment in segments:
            if isinstance(segment, PushColumns):
                self._add_columns(log_id, segment, partners, numbers)
            else:
                self._add_push(log_id, segment, partners, numbers)

    def _add_push(self, log_id: LogId, push: Push, partners: Sequence[str], numbers: I64) -> None:
        numbers[push.partner] += 1
        entry_id = format_id(push_id(log_id, int(numbers[push.partner]))).encode()
        kind, payload = push.kind.encode(), encode_push(push)
        self.parts += (
            _command(self._shard, partners[push.partner])
            + b"$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n" % (len(entry_id), entry_id, len(kind), kind, len(payload)),
            payload,
            b"\r\n",
        )
        count = np.array([len(push.id_end)], np.uint32)
        self.tallies.append(Tally(partners, push.kind, np.array([push.partner], np.uint16), count))

    def _add_columns(self, log_id: LogId, pushes: PushColumns, partners: Sequence[str], numbers: I64) -> None:
        push_id(log_id, 1)  # asserts what is asserted of one
        heads = _heads(pushes.alerts)
        commands = _commands(self._shard, tuple(partners))
        room_each = COMMAND_BYTES_MAX + heads.longest + commands.longest
        out = np.empty(len(pushes) * room_each + len(pushes.id_bytes) + 2 * len(pushes.id_end), np.uint8)
        size = kernels.write_push_commands(
            commands.bytes,
            commands.ends,
            heads.bytes,
            heads.ends,
            log_id[0],
            np.uint64(log_id[1] << PUSH_BITS),
            numbers,
            pushes.alert,
            pushes.partner,
            pushes.at_ms,
            pushes.id_stop,
            pushes.id_bytes,
            pushes.id_end,
            out,
        )
        assert numbers.max() <= PUSH_COUNT_MAX, "a log entry causes at most 2^24 - 1 entries a queue"
        self.parts.append(out[:size].data)
        counts = np.diff(pushes.id_stop, prepend=np.uint32(0))
        self.tallies.append(Tally(partners, "alert", pushes.partner, counts, of_pings=True))


class _Joined(NamedTuple):
    """Parts end to end, where each ends, and how long the longest is."""

    bytes: U8
    ends: U32
    longest: int


def _joined(parts: Sequence[bytes]) -> _Joined:
    sizes = [len(part) for part in parts]
    return _Joined(np.frombuffer(b"".join(parts), np.uint8), np.cumsum(sizes).astype(np.uint32), max(sizes))


def _command(shard: int, partner: str) -> bytes:
    """The beginning of an XADD to a partner's queue."""
    key = push_key(shard, partner).encode()
    return b"*5\r\n$4\r\nXADD\r\n$%d\r\n%b\r\n" % (len(key), key)


# Batches come by the thousand between two changes of what follows: encoded for each, it took the writer two thirds of
# its time, and the interpreter's lock with it.


@lru_cache(maxsize=4096)
def _commands(shard: int, partners: tuple[str, ...]) -> _Joined:
    return _joined([_command(shard, partner) for partner in partners])


@lru_cache(maxsize=64)
def _heads(alerts: tuple[ToldAs | None, ...]) -> _Joined:
    """What the payloads of pushes about each alert begin with; shards that are told the same share it."""
    return _joined([b"" if told_as is None else push_head(*told_as[:2], "alert", told_as[2]) for told_as in alerts])
