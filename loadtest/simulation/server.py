"""A model of the server in memory: the commands that this program uses, with their replies, and the faults of a server.

Commands run at once and one by one, as in the real one. What the real one may do besides, an adversary calls for:

    restart      another run id; every connection is broken; with a tail to lose, the last writes were never made
    clock        jumps in both directions; a stream's ids never run back
    refusals     commands that need memory are refused one by one, also in the middle of a batch

A reply is what redis-py makes of the real server's: bytes, int, list, None, or an exception. That the model says what
the real server says is tested command by command, on random sequences (tests/loadtest/simulation/test_server.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import redis
from redis._parsers.base import BaseParser

from flows.checkpointer import TRIM_WHEN_FULL
from flows.queues import RAISE_DONE

EntryId = tuple[int, int]
Fields = list[bytes]
Reply = Any

UNDO_COUNT_MAX = 4000
"""Writes that can be lost; a simulated second has some dozens."""
SEQ_LAST = (1 << 64) - 1
_NEEDS_MEMORY = {b"SET", b"XADD", b"XGROUP", b"ZADD"}
"""Commands that a full server refuses: the flag `denyoom` of the real one's."""
OUT_OF_MEMORY = "OOM command not allowed when used memory > 'maxmemory'."


def error(words: str) -> Exception:
    """An error reply as redis-py hands it over."""
    return cast(Exception, cast(Any, BaseParser).parse_error(words))


@dataclass(slots=True)
class _Pending:
    """An entry that a consumer was given and has not acknowledged."""

    consumer: bytes
    delivered_at_ms: int
    delivery_count: int


@dataclass(slots=True)
class _Group:
    last_delivered: EntryId
    pending: dict[EntryId, _Pending] = field(default_factory=dict)

    def copy(self) -> _Group:
        return _Group(
            self.last_delivered,
            {
                entry_id: _Pending(entry.consumer, entry.delivered_at_ms, entry.delivery_count)
                for entry_id, entry in self.pending.items()
            },
        )


class Stream:
    """One stream. What was trimmed away is kept for the oracle: `ids[first:]` is what the server still shows."""

    def __init__(self) -> None:
        self.ids: list[EntryId] = []
        self.fields: list[Fields] = []
        self.first = 0
        self.last_id: EntryId = (0, 0)
        self.groups: dict[bytes, _Group] = {}

    def __len__(self) -> int:
        return len(self.ids) - self.first

    def index_of(self, entry_id: EntryId) -> int | None:
        """Where an entry is, among those that are not trimmed."""
        index = bisect_left(self.ids, entry_id, self.first)
        return index if index < len(self.ids) and self.ids[index] == entry_id else None

    def place_of(self, entry_id: EntryId) -> int | None:
        """Where an entry is, trimmed or not."""
        index = bisect_left(self.ids, entry_id)
        return index if index < len(self.ids) and self.ids[index] == entry_id else None

    def entries(self, start: int, stop: int) -> list[list[Any]]:
        return [[_text(self.ids[index]), list(self.fields[index])] for index in range(start, stop)]


class Session:
    """What the server remembers of one connection."""

    def __init__(self) -> None:
        self.watched: dict[bytes, int] = {}
        self.queued: list[list[bytes]] | None = None
        """Since MULTI."""
        self.is_aborted = False


class Observer:
    """Told of every write when it has been made: for oracles."""

    def added(self, key: bytes, entry_id: EntryId, fields: Fields) -> None:
        """An entry was added to a stream."""

    def set(self, key: bytes, value: bytes) -> None:
        """A value was set."""

    def trimmed(self, key: bytes, first_kept: EntryId) -> None:
        """Entries before `first_kept` were trimmed away."""


class SimulatedServer:
    """The server; `now_ms` is the time of the world, `clock_ahead_ms` what its own clock is off."""

    def __init__(self, now_ms: int, observer: Observer | None = None) -> None:
        self.now_ms = now_ms
        self.clock_ahead_ms = 0
        self.run_number = 1
        self.observer = observer or Observer()
        self.refuses: Callable[[bytes], bool] = lambda command: False
        """Asked for each command that needs memory: whether there is none."""
        self.values: dict[bytes, Any] = {}
        """bytes, `Stream` or a sorted set (dict of member to score), by key."""
        self._versions: dict[bytes, int] = {}
        self._version = 0
        self._undo: list[Callable[[], None]] = []
        self._tail: deque[tuple[int, list[Callable[[], None]]]] = deque(maxlen=UNDO_COUNT_MAX)

    @property
    def run_id(self) -> str:
        return f"{self.run_number:040x}"

    @property
    def clock_ms(self) -> int:
        return self.now_ms + self.clock_ahead_ms

    def stream(self, key: bytes) -> Stream:
        """A stream; an empty one if there is none."""
        return cast(Stream, self.values.get(key)) or Stream()

    def keep(self) -> None:
        """What was written until now is never lost."""
        self._tail.clear()

    def restart(self, lost_ms: int = 0) -> int:
        """Another run; what was written in the last `lost_ms` was not. How many writes were lost."""
        self.run_number += 1
        lost = 0
        while lost_ms and self._tail and self._tail[-1][0] > self.now_ms - lost_ms:
            for undo in reversed(self._tail.pop()[1]):
                undo()
            lost += 1
        return lost

    def execute(self, session: Session, command: Sequence[bytes]) -> Reply:
        """One command of a connection."""
        name = command[0].upper()
        if name in _IMMEDIATE:
            return _IMMEDIATE[name](self, session, command)
        if name == b"XADD" and len(command) < 5:
            session.is_aborted = session.queued is not None
            return error("ERR wrong number of arguments for 'xadd' command")
        refused = name in _NEEDS_MEMORY and self.refuses(name)
        if session.queued is not None:
            if refused or name not in _COMMANDS:
                session.is_aborted = True
                return error(OUT_OF_MEMORY if refused else _unknown(command))
            session.queued.append(list(command))
            return b"QUEUED"
        if refused:
            return error(OUT_OF_MEMORY)
        reply = self._run(name, command)
        self._end_write()
        return reply

    def _run(self, name: bytes, command: Sequence[bytes]) -> Reply:
        handler = _COMMANDS.get(name)
        if handler is None:
            return error(_unknown(command))
        try:
            return handler(self, list(command[1:]))
        except redis.ResponseError as refusal:
            return refusal

    def _end_write(self) -> None:
        if self._undo:
            self._tail.append((self.now_ms, self._undo))
            self._undo = []

    # --- transactions -----------------------------------------------------------------------------------------------

    def _multi(self, session: Session, command: Sequence[bytes]) -> Reply:
        if session.queued is not None:
            return self._not_inside(session, command)
        session.queued, session.is_aborted = [], False
        return b"OK"

    def _not_inside(self, session: Session, command: Sequence[bytes]) -> Reply:
        session.is_aborted = True
        return error(f"ERR Command '{command[0].lower().decode()}' not allowed inside a transaction")

    def _exec(self, session: Session, command: Sequence[bytes]) -> Reply:
        queued = session.queued
        if queued is None:
            return error("ERR EXEC without MULTI")
        watched, aborted = session.watched, session.is_aborted
        session.queued, session.watched = None, {}
        if any(entry[0].upper() in _NEEDS_MEMORY for entry in queued) and self.refuses(b"EXEC"):
            return error(f"EXECABORT Transaction discarded because of: {OUT_OF_MEMORY}")
        if aborted:
            return error("EXECABORT Transaction discarded because of previous errors.")
        if any(self._versions.get(key, 0) != version for key, version in watched.items()):
            return None
        replies = [self._run(entry[0].upper(), entry) for entry in queued]
        self._end_write()
        return replies

    def _discard(self, session: Session, command: Sequence[bytes]) -> Reply:
        if session.queued is None:
            return error("ERR DISCARD without MULTI")
        session.queued, session.watched = None, {}
        return b"OK"

    def _watch(self, session: Session, command: Sequence[bytes]) -> Reply:
        if session.queued is not None:
            return self._not_inside(session, command)
        for key in command[1:]:
            session.watched.setdefault(key, self._versions.get(key, 0))
        return b"OK"

    def _unwatch(self, session: Session, command: Sequence[bytes]) -> Reply:
        session.watched = {}
        return b"OK"

    # --- keys -------------------------------------------------------------------------------------------------------

    def _touch(self, key: bytes, undo: Callable[[], None]) -> None:
        """A key was changed; `undo` takes it back."""
        self._version += 1
        self._versions[key] = self._version
        self._undo.append(undo)

    def _put(self, key: bytes, value: Any) -> None:
        before = self.values.get(key)
        self.values[key] = value

        def undo() -> None:
            if before is None:
                del self.values[key]
            else:
                self.values[key] = before

        self._touch(key, undo)

    def _typed(self, key: bytes, kind: type) -> Any:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            raise error("WRONGTYPE Operation against a key holding the wrong kind of value")
        return value

    def _time(self, words: list[bytes]) -> Reply:
        return [b"%d" % (self.clock_ms // 1000), b"%d" % (self.clock_ms % 1000 * 1000)]

    def _info(self, words: list[bytes]) -> Reply:
        if words[1:] == [b"memory"]:
            return b"# Memory\r\nused_memory:1\r\nmaxmemory:0\r\n"
        return b"# Server\r\nrun_id:" + self.run_id.encode() + b"\r\n"

    def _config(self, words: list[bytes]) -> Reply:
        flat: list[bytes] = []
        for name in words[1:]:
            if name.lower() in _SETTINGS:
                flat += [name.lower(), _SETTINGS[name.lower()]]
        return flat

    def _ping(self, words: list[bytes]) -> Reply:
        return b"PONG"

    def _get(self, words: list[bytes]) -> Reply:
        return self._typed(words[0], bytes)

    def _set(self, words: list[bytes]) -> Reply:
        self._put(words[0], words[1])
        self.observer.set(words[0], words[1])
        return b"OK"

    def _eval(self, words: list[bytes]) -> Reply:
        """The scripts of this program, by heart."""
        script, _, key, *rest = words
        if script == TRIM_WHEN_FULL.encode():
            trimmed_key, cut, trimmed = rest
            if not self._xrange([key, cut, cut]):
                return 0
            self._set([trimmed_key, trimmed])
            return self._xtrim([key, b"MINID", cut])
        if script != RAISE_DONE:
            raise error("ERR the model of the server knows two scripts, and this is another")
        (wanted,) = rest
        known = self._typed(key, bytes)
        if known is not None and _parse(known) >= _parse(wanted):
            return 0
        if self.refuses(b"SET"):
            raise error(OUT_OF_MEMORY)
        self._set([key, wanted])
        return 1

    def _mget(self, words: list[bytes]) -> Reply:
        found = (self.values.get(key) for key in words)
        return [value if isinstance(value, bytes) else None for value in found]

    def _exists(self, words: list[bytes]) -> Reply:
        return sum(key in self.values for key in words)

    def _zadd(self, words: list[bytes]) -> Reply:
        members = dict(cast("dict[bytes, float]", self._typed(words[0], dict) or {}))
        before = len(members)
        for score, member in zip(words[1::2], words[2::2], strict=True):
            members[member] = float(score)
        self._put(words[0], members)
        return len(members) - before

    def _zrevrange(self, words: list[bytes]) -> Reply:
        members = cast("dict[bytes, float]", self._typed(words[0], dict) or {})
        start, stop = int(words[1]), int(words[2])
        ordered = sorted(members, key=lambda member: (members[member], member), reverse=True)
        length = len(ordered)
        start, stop = (max(0, place + length) if place < 0 else place for place in (start, stop))
        return ordered[start : stop + 1]

    # --- streams ----------------------------------------------------------------------------------------------------

    def _xadd(self, words: list[bytes]) -> Reply:
        key, *rest = words
        stream: Stream | None = self._typed(key, Stream)
        makes_stream = rest[0].upper() != b"NOMKSTREAM"
        if not makes_stream:
            rest = rest[1:]
        wanted, fields = rest[0], rest[1:]
        if not fields or len(fields) % 2:
            raise error("ERR wrong number of arguments for 'xadd' command")
        if stream is None and not makes_stream:
            return None
        last = stream.last_id if stream is not None else (0, 0)
        entry_id = self._next_id(wanted, last)
        if stream is None:
            stream = Stream()
            self._put(key, stream)
        stream.ids.append(entry_id)
        stream.fields.append(fields)
        stream.last_id = entry_id

        def undo(stream: Stream = stream) -> None:
            stream.ids.pop()
            stream.fields.pop()
            stream.last_id = last

        self._touch(key, undo)
        self.observer.added(key, entry_id, fields)
        return _text(entry_id)

    def _next_id(self, wanted: bytes, last: EntryId) -> EntryId:
        if wanted == b"*":
            return (self.clock_ms, 0) if self.clock_ms > last[0] else (last[0], last[1] + 1)
        ms, _, seq = wanted.partition(b"-")
        if seq == b"*":
            if int(ms) > last[0]:
                return int(ms), 0 if int(ms) else 1
            if int(ms) == last[0]:
                return last[0], last[1] + 1
            raise error(_TOO_SMALL)
        entry_id = _parse(wanted)
        if entry_id == (0, 0):
            raise error("ERR The ID specified in XADD must be greater than 0-0")
        if entry_id <= last:
            raise error(_TOO_SMALL)
        return entry_id

    def _xlen(self, words: list[bytes]) -> Reply:
        return len(self._typed(words[0], Stream) or ())

    def _xinfo(self, words: list[bytes]) -> Reply:
        stream: Stream | None = self._typed(words[1], Stream)
        if stream is None:
            raise error("ERR no such key")
        first = stream.entries(stream.first, stream.first + 1)[0] if len(stream) else None
        last = stream.entries(len(stream.ids) - 1, len(stream.ids))[0] if len(stream) else None
        return [
            *(b"length", len(stream)),
            *(b"last-generated-id", _text(stream.last_id)),
            *(b"entries-added", len(stream.ids)),
            *(b"groups", len(stream.groups)),
            *(b"first-entry", first),
            *(b"last-entry", last),
        ]

    def _xrange(self, words: list[bytes], reverse: bool = False) -> Reply:
        stream: Stream | None = self._typed(words[0], Stream)
        low, high = (words[2], words[1]) if reverse else (words[1], words[2])
        start, is_after = _bound(low, (0, 0))
        stop, is_before = _bound(high, (SEQ_LAST, SEQ_LAST))
        if stream is None:
            return []
        first = (bisect_right if is_after else bisect_left)(stream.ids, start, stream.first)
        end = (bisect_left if is_before else bisect_right)(stream.ids, stop, stream.first)
        count = int(words[4]) if len(words) > 4 else len(stream.ids)
        if reverse:
            return stream.entries(max(first, end - count), end)[::-1]
        return stream.entries(first, min(end, first + count))

    def _xrevrange(self, words: list[bytes]) -> Reply:
        return self._xrange(words, reverse=True)

    def _xread(self, words: list[bytes]) -> Reply:
        options, keys, ids = _streams(words)
        count = int(options.get(b"COUNT", b"0")) or SEQ_LAST
        found: list[list[Any]] = []
        for key, raw in zip(keys, ids, strict=True):
            stream: Stream | None = self._typed(key, Stream)
            if stream is None or raw == b"$":
                continue  # nothing can come while a command runs
            start = bisect_right(stream.ids, _parse(raw), stream.first)
            if start < len(stream.ids):
                found.append([key, stream.entries(start, min(len(stream.ids), start + count))])
        return found or None

    def _xtrim(self, words: list[bytes]) -> Reply:
        key, strategy, *rest = words
        stream: Stream | None = self._typed(key, Stream)
        threshold = rest[1] if rest[0] in (b"=", b"~") else rest[0]
        if stream is None:
            return 0
        before = stream.first
        if strategy.upper() == b"MINID":
            stream.first = bisect_left(stream.ids, _parse(threshold), stream.first)
        else:
            stream.first = max(stream.first, len(stream.ids) - int(threshold))
        if stream.first == before:
            return 0

        def undo(stream: Stream = stream) -> None:
            stream.first = before

        self._touch(key, undo)
        kept = stream.ids[stream.first] if len(stream) else (SEQ_LAST, SEQ_LAST)
        self.observer.trimmed(key, kept)
        return stream.first - before

    # --- consumer groups --------------------------------------------------------------------------------------------

    def _group(self, key: bytes, name: bytes, why: str = "") -> tuple[Stream, _Group]:
        stream: Stream | None = self._typed(key, Stream)
        group = None if stream is None else stream.groups.get(name)
        if stream is None or group is None:
            raise error(f"NOGROUP No such key '{key.decode()}' or consumer group '{name.decode()}'{why}")
        return stream, group

    def _will_change(self, stream: Stream, name: bytes) -> None:
        """A group is about to change."""
        before = stream.groups[name].copy()

        def undo() -> None:
            stream.groups[name] = before

        self._undo.append(undo)

    def _xgroup(self, words: list[bytes]) -> Reply:
        _, key, group, start, *options = words
        stream: Stream | None = self._typed(key, Stream)
        if stream is None:
            if not options:
                raise error(_NO_STREAM_FOR_GROUP)
            stream = Stream()
            self._put(key, stream)
        if group in stream.groups:
            raise error("BUSYGROUP Consumer Group name already exists")
        stream.groups[group] = _Group(stream.last_id if start == b"$" else _parse(start))

        def undo(stream: Stream = stream) -> None:
            del stream.groups[group]

        self._undo.append(undo)  # for WATCH the stream is as it was
        return b"OK"

    def _xreadgroup(self, words: list[bytes]) -> Reply:
        group_name, consumer = words[1], words[2]
        options, keys, ids = _streams(words[3:])
        count = int(options.get(b"COUNT", b"0")) or SEQ_LAST
        found: list[list[Any]] = []
        for key in keys:
            self._group(key, group_name, " in XREADGROUP with GROUP option")
        for key, raw in zip(keys, ids, strict=True):
            stream, group = self._group(key, group_name)
            if raw == b">":
                start = bisect_right(stream.ids, group.last_delivered, stream.first)
                stop = min(len(stream.ids), start + count)
                if start == stop:
                    continue
                self._will_change(stream, group_name)
                for entry_id in stream.ids[start:stop]:
                    group.pending[entry_id] = _Pending(consumer, self.clock_ms, 1)
                group.last_delivered = stream.ids[stop - 1]
                found.append([key, stream.entries(start, stop)])
                continue
            after = _parse(raw)
            entries: list[list[Any]] = []
            if group.pending:
                self._will_change(stream, group_name)
            for entry_id in sorted(group.pending):
                pending = group.pending[entry_id]
                if entry_id <= after or pending.consumer != consumer or len(entries) == count:
                    continue
                if stream.index_of(entry_id) is not None:
                    pending.delivered_at_ms = self.clock_ms
                    pending.delivery_count += 1
                entries.append(_entry(stream, entry_id))
            found.append([key, entries])
        return found or None

    def _xack(self, words: list[bytes]) -> Reply:
        key, group_name, *ids = words
        stream: Stream | None = self._typed(key, Stream)
        if stream is None or group_name not in stream.groups:
            return 0
        _, group = self._group(key, group_name)
        self._will_change(stream, group_name)
        return sum(group.pending.pop(_parse(raw), None) is not None for raw in ids)

    def _xpending(self, words: list[bytes]) -> Reply:
        """With a range, as this program asks."""
        key, group_name, *rest = words
        _, group = self._group(key, group_name)
        if not group.pending:
            return []
        idle_min = int(rest[1]) if rest[0].upper() == b"IDLE" else 0
        start, stop, count, *owner = rest[2:] if rest[0].upper() == b"IDLE" else rest
        (first, without), (last, _) = _bound(start, (0, 0)), _bound(stop, (SEQ_LAST, SEQ_LAST))
        found: list[Any] = []
        for entry_id in sorted(group.pending):
            pending = group.pending[entry_id]
            idle_ms = self.clock_ms - pending.delivered_at_ms
            inside = first < entry_id if without else first <= entry_id
            if not inside or entry_id > last or idle_ms < idle_min or (owner and pending.consumer != owner[0]):
                continue
            if len(found) == int(count):
                break
            found.append([_text(entry_id), pending.consumer, idle_ms, pending.delivery_count])
        return found

    def _xclaim(self, words: list[bytes]) -> Reply:
        key, group_name, consumer, idle_min, *rest = words
        stream, group = self._group(key, group_name)
        self._will_change(stream, group_name)
        ids = [word for word in rest if b"-" in word]
        options = [word.upper() for word in rest[len(ids) :]]
        idle_ms = int(options[options.index(b"IDLE") + 1]) if b"IDLE" in options else 0
        just_id = b"JUSTID" in options
        claimed: list[Any] = []
        for entry_id in map(_parse, ids):
            pending = group.pending.get(entry_id)
            if pending is None:
                continue
            if stream.index_of(entry_id) is None:
                del group.pending[entry_id]
                continue
            if int(idle_min) and self.clock_ms - pending.delivered_at_ms < int(idle_min):
                continue
            pending.consumer, pending.delivered_at_ms = consumer, self.clock_ms - idle_ms
            pending.delivery_count += not just_id
            claimed.append(_text(entry_id) if just_id else _entry(stream, entry_id))
        return claimed

    def _xautoclaim(self, words: list[bytes]) -> Reply:
        key, group_name, consumer, idle_min, start, *rest = words
        stream, group = self._group(key, group_name)
        self._will_change(stream, group_name)
        options = [word.upper() for word in rest]
        count = int(options[options.index(b"COUNT") + 1]) if b"COUNT" in options else 100
        attempts = 10 * count
        claimed: list[Any] = []
        deleted: list[bytes] = []
        cursor = b"0-0"
        for entry_id in sorted(entry_id for entry_id in group.pending if entry_id >= _parse(start)):
            if attempts == 0 or count == 0:
                cursor = _text(entry_id)
                break
            attempts -= 1
            pending = group.pending[entry_id]
            if stream.index_of(entry_id) is None:
                del group.pending[entry_id]
                deleted.append(_text(entry_id))
                count -= 1
                continue
            if int(idle_min) and self.clock_ms - pending.delivered_at_ms < int(idle_min):
                continue
            pending.consumer, pending.delivered_at_ms = consumer, self.clock_ms
            pending.delivery_count += 1
            claimed.append(_entry(stream, entry_id))
            count -= 1
        return [cursor, claimed, deleted]


_SETTINGS = {
    b"appendonly": b"yes",
    b"appendfsync": b"always",
    b"maxmemory-policy": b"noeviction",
    b"no-appendfsync-on-rewrite": b"no",
}
_TOO_SMALL = "ERR The ID specified in XADD is equal or smaller than the target stream top item"
_NO_STREAM_FOR_GROUP = (
    "ERR The XGROUP subcommand requires the key to exist. Note that for CREATE you may want to use the MKSTREAM option "
    "to create an empty stream automatically."
)
_IMMEDIATE: dict[bytes, Callable[[SimulatedServer, Session, Sequence[bytes]], Reply]] = {
    b"MULTI": SimulatedServer._multi,
    b"EXEC": SimulatedServer._exec,
    b"DISCARD": SimulatedServer._discard,
    b"WATCH": SimulatedServer._watch,
    b"UNWATCH": SimulatedServer._unwatch,
}
"""Never queued."""
_COMMANDS: dict[bytes, Callable[[SimulatedServer, list[bytes]], Reply]] = {
    b"PING": SimulatedServer._ping,
    b"TIME": SimulatedServer._time,
    b"INFO": SimulatedServer._info,
    b"CONFIG": SimulatedServer._config,
    b"GET": SimulatedServer._get,
    b"SET": SimulatedServer._set,
    b"MGET": SimulatedServer._mget,
    b"EXISTS": SimulatedServer._exists,
    b"ZADD": SimulatedServer._zadd,
    b"ZREVRANGE": SimulatedServer._zrevrange,
    b"XADD": SimulatedServer._xadd,
    b"XLEN": SimulatedServer._xlen,
    b"XINFO": SimulatedServer._xinfo,
    b"XRANGE": SimulatedServer._xrange,
    b"XREVRANGE": SimulatedServer._xrevrange,
    b"XREAD": SimulatedServer._xread,
    b"XTRIM": SimulatedServer._xtrim,
    b"XGROUP": SimulatedServer._xgroup,
    b"XREADGROUP": SimulatedServer._xreadgroup,
    b"XACK": SimulatedServer._xack,
    b"EVAL": SimulatedServer._eval,
    b"XPENDING": SimulatedServer._xpending,
    b"XCLAIM": SimulatedServer._xclaim,
    b"XAUTOCLAIM": SimulatedServer._xautoclaim,
}


def _unknown(command: Sequence[bytes]) -> str:
    words = "".join(f"'{word.decode(errors='replace')}' " for word in command[1:])
    return f"ERR unknown command '{command[0].decode()}', with args beginning with: {words}"


def _text(entry_id: EntryId) -> bytes:
    return b"%d-%d" % entry_id


def _parse(raw: bytes, seq: int = 0) -> EntryId:
    ms, dash, rest = raw.partition(b"-")
    try:
        return int(ms), int(rest) if dash else seq
    except ValueError:
        raise error("ERR Invalid stream ID specified as stream command argument") from None


def _bound(raw: bytes, whole: EntryId) -> tuple[EntryId, bool]:
    """A range's end, and whether it is left out itself."""
    if raw in (b"-", b"+"):
        return (0, 0) if raw == b"-" else (SEQ_LAST, SEQ_LAST), False
    return _parse(raw.removeprefix(b"("), min(whole[1], SEQ_LAST)), raw.startswith(b"(")


def _streams(words: list[bytes]) -> tuple[dict[bytes, bytes], list[bytes], list[bytes]]:
    """Options, keys and ids of XREAD and XREADGROUP."""
    place = [word.upper() for word in words].index(b"STREAMS")
    options = {words[index].upper(): words[index + 1] for index in range(0, place, 2)}
    names = words[place + 1 :]
    half = math.ceil(len(names) / 2)
    return options, names[:half], names[half:]


def _entry(stream: Stream, entry_id: EntryId) -> list[Any]:
    index = stream.index_of(entry_id)
    return [_text(entry_id), None if index is None else list(stream.fields[index])]
