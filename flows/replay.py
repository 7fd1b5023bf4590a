"""Offline runs: recorded pings and alert events through the live flow, in file time, without a server.

    pings.csv ──> file clock ──┐
                               ├─ merged by time ──> split by shard ──> the flow ──> pushes.jsonl, sorted by `at`
    alerts.jsonl ──────────────┘

Merged by time: what grows first, then alert events, then pings, in file order. Each row of a ping batch carries its
own clock, so batches can be large and their size changes nothing.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import orjson
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition

from flows.alert_json import AlertFileState, AlertRefused, event_time_ms, parse_alert_event
from flows.file_clock import LOOKAHEAD_ROWS, NO_CLOCK, clock_of_arrivals, clock_of_observations
from flows.log import RawEntry
from flows.match import ShardPushes, shard_key, shard_of_key
from flows.recording import PingReader, RecordedPings, SetAside, UnreadableFile
from flows.wire import encode_entry, split_by_shard
from geoindex.columns import I64, PingBatch, Push
from geoindex.entries import KINDS, AlertClose, AlertRevision, LogEntry, Settings

CHUNK_ROWS = 65_536


@dataclass(frozen=True, slots=True)
class TimedAlertEvent:
    """An alert event and when it happened."""

    at_ms: int
    event: AlertRevision | AlertClose


def read_alert_events(path: Path, settings: Settings) -> tuple[list[TimedAlertEvent], SetAside]:
    """Alert events of a JSON-lines file, by time (file order where equal), and what was refused.

    Events without effect (a stale revision, an alert that is closed) are left out, and noted in `refused` without a
    count.
    """
    refused = SetAside()
    timed: list[tuple[int, int, object]] = []
    with path.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            if line_number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                event = orjson.loads(line)
                if not isinstance(event, dict):
                    raise ValueError(f"an event must be an object, got {line[:40]!r}")
                timed.append((event_time_ms(event.get("at"), "at"), line_number, event))
            except ValueError as problem:
                refused.add("alert", f"{path}:{line_number}", str(problem))
    timed.sort(key=lambda row: row[:2])
    state = AlertFileState()
    events: list[TimedAlertEvent] = []
    for at_ms, line_number, words in timed:
        where = f"{path}:{line_number}"
        try:
            event = parse_alert_event(words, where, state, settings, desk_id=(at_ms, line_number))
        except AlertRefused as problem:
            refused.add("alert", where, str(problem).removeprefix(f"{where}: "))
            continue
        if event is not None:
            events.append(TimedAlertEvent(at_ms, event))
    refused.examples += state.notes
    return events, refused


@dataclass(frozen=True, slots=True)
class TimedEntry:
    """A log entry and its time, before it is split over shards."""

    ms: int
    content: LogEntry


@dataclass
class Recording:
    """A file of pings and the alert events beside it, merged by time into one log."""

    pings: PingReader
    alert_events: list[TimedAlertEvent]
    settings: Settings

    _clock_ms: int = NO_CLOCK
    _next_alert: int = 0

    def entries(self) -> Iterator[TimedEntry]:
        """Settings first; alert events before the first ping whose clock has reached them.

        Raises UnreadableFile.
        """
        yield TimedEntry(0, self.settings)
        ahead: RecordedPings | None = None
        for chunk in self.pings.chunks():
            pings = chunk if ahead is None else ahead.followed_by(chunk)
            decided = len(pings) if pings.at_ms is not None else max(0, len(pings) - LOOKAHEAD_ROWS)
            yield from self._merge(pings, decided)
            ahead = pings.part(slice(decided, None))
        if ahead is not None:
            yield from self._merge(ahead, len(ahead))
        for timed in self.alert_events[self._next_alert :]:
            yield TimedEntry(timed.at_ms, timed.event)

    def _merge(self, pings: RecordedPings, decided: int) -> Iterator[TimedEntry]:
        """The first `decided` rows, with the alert events that come before and between them."""
        at_ms = np.empty(decided, np.int64)
        accepted = np.empty(decided, np.bool_)
        tolerance_ms = self.settings.future_tolerance_ms
        if pings.at_ms is not None:
            self._clock_ms = clock_of_arrivals(
                pings.at_ms, pings.observed_at_ms, self._clock_ms, tolerance_ms, at_ms, accepted
            )
        else:
            self._clock_ms = clock_of_observations(
                pings.observed_at_ms, decided, self._clock_ms, tolerance_ms, at_ms, accepted
            )
        pings = pings.part(slice(decided))
        for row in np.flatnonzero(~accepted).tolist():
            # Before the first accepted ping there is no clock but the row's own arrival.
            clock_ms = at_ms[row] if at_ms[row] != NO_CLOCK or pings.at_ms is None else pings.at_ms[row]
            self.pings.set_aside.add(
                "from_the_future",
                f"{self.pings.path}:{pings.lines[row]}",
                f"observed_at must be at most {tolerance_ms // 1000} s ahead of the clock ({clock_ms}), "
                f"got {pings.observed_at_ms[row]}",
            )
        if not accepted.all():
            pings, at_ms = pings.keep(accepted), at_ms[accepted]
        if len(pings):
            yield from self._new_partners(pings, int(at_ms[0]))
        yield from self._between(pings, at_ms)

    def _new_partners(self, pings: RecordedPings, ms: int) -> Iterator[TimedEntry]:
        known = self.settings.partners
        new = [name for name in dict.fromkeys(pings.partners) if name not in known]
        if new:
            self.settings = replace(self.settings, partners=known + tuple(new))
            # Not ahead of an alert event that this chunk is yet to meet.
            alert_ms = self.alert_events[self._next_alert].at_ms if self._next_alert < len(self.alert_events) else ms
            yield TimedEntry(max(0, min(ms, alert_ms)), self.settings)

    def _between(self, pings: RecordedPings, at_ms: I64) -> Iterator[TimedEntry]:
        partner_index = {name: index for index, name in enumerate(self.settings.partners)}
        start = 0
        while start < len(pings):
            stop = len(pings)
            if self._next_alert < len(self.alert_events):
                timed = self.alert_events[self._next_alert]
                stop = int(np.searchsorted(at_ms, timed.at_ms))
                if stop <= start:
                    self._next_alert += 1
                    yield TimedEntry(timed.at_ms, timed.event)
                    continue
            rows = slice(start, stop)
            yield TimedEntry(int(at_ms[stop - 1]), pings.batch(rows, partner_index, at_ms[rows]))
            start = stop


class RecordingSource(FixedPartitionedSource[tuple[str, RawEntry], None]):
    """A recording, split over shards: one partition a shard, all fed by one reader."""

    def __init__(self, recording: Recording, moved: Callable[[TimedEntry], None] = lambda _entry: None) -> None:
        """`moved` is told of every entry as it is read; `problem` is why reading ended early, if it did."""
        self.problem: UnreadableFile | None = None
        self.stopped = False
        self._moved = moved
        self._shards = recording.settings.shard_count
        self._entries = recording.entries()
        self._recording = recording
        self._waiting: list[deque[RawEntry]] = [deque() for _ in range(self._shards)]
        self._seq = 0

    def list_parts(self) -> list[str]:
        return [shard_key(shard) for shard in range(self._shards)]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _RecordingPartition:
        return _RecordingPartition(self, shard_of_key(for_part))

    def stop(self) -> None:
        """End the recording here. May be called from a signal handler."""
        self.stopped = True

    def take(self, shard: int) -> RawEntry | None:
        """The next entry of a shard's log, reading on as far as needed; None at the end."""
        if self.stopped:
            return None
        waiting = self._waiting[shard]
        while not waiting:
            try:
                timed = next(self._entries, None)
            except UnreadableFile as problem:
                # Bytewax wraps what a callback raises in errors of its own; the caller asks for this one.
                self.problem = problem
                self._entries = iter(())
                return None
            if timed is None:
                return None
            self._moved(timed)
            self._split(timed)
        return waiting.popleft()

    def _split(self, timed: TimedEntry) -> None:
        self._seq += 1
        if isinstance(timed.content, PingBatch):
            for shard, batch in enumerate(split_by_shard(timed.content, self._recording.settings)):
                if batch is not None:
                    assert batch.at_ms is not None
                    self._append(shard, int(batch.at_ms[-1]), batch)
        else:
            for shard in range(self._shards):
                self._append(shard, timed.ms, timed.content)

    def _append(self, shard: int, ms: int, content: LogEntry) -> None:
        kind, payload = encode_entry(content)
        self._waiting[shard].append(RawEntry(shard, ms, self._seq, kind, payload, ""))


class _RecordingPartition(StatefulSourcePartition[tuple[str, RawEntry], None]):
    def __init__(self, source: RecordingSource, shard: int) -> None:
        self._source, self._shard, self._key = source, shard, shard_key(shard)

    def next_batch(self) -> list[tuple[str, RawEntry]]:
        raw = self._source.take(self._shard)
        if raw is None:
            raise StopIteration
        return [(self._key, raw)]

    def snapshot(self) -> None:
        return None


@dataclass
class CollectedPushes:
    """Where the offline run's pushes go: kept as columns, written in order at the end."""

    pushes: list[tuple[Push, str]] = field(default_factory=list)
    device_count: int = 0
    pings_accepted: int = 0
    pings_refused: dict[str, int] = field(default_factory=dict)

    def add(self, entry: ShardPushes) -> None:
        self.pings_accepted += entry.notes.pings_accepted
        assert entry.notes.undecodable is None, f"an offline run wrote this entry: {entry.notes.undecodable}"
        for reason, count in entry.notes.pings_refused.items():
            self.pings_refused[reason] = self.pings_refused.get(reason, 0) + count
        for push in entry.pushes:
            self.pushes.append((push, entry.partners[push.partner]))
            self.device_count += len(push.id_end)

    def lines(self) -> Iterator[bytes]:
        """One JSON line a device, by `at`; where equal by alert, partner, device and rule 10's order.

        Nothing in this order depends on shards or batches.
        """
        self.pushes.sort(key=lambda pair: pair[0].at_ms)
        moment: list[tuple[str, str, str, int, int, float]] = []
        moment_ms = 0
        for push, partner in self.pushes:
            if push.at_ms != moment_ms:
                yield from _moment_lines(moment_ms, moment)
                moment, moment_ms = [], push.at_ms
            rank = KINDS.index(push.kind)
            moment += [
                (push.alert_id, partner, device_id, push.revision, rank, push.ring_km)
                for device_id in push.device_ids()
            ]
        yield from _moment_lines(moment_ms, moment)


def _moment_lines(at_ms: int, moment: list[tuple[str, str, str, int, int, float]]) -> Iterator[bytes]:
    for alert_id, partner, device_id, revision, rank, ring_km in sorted(moment):
        yield orjson.dumps(
            {
                "at": at_ms,
                "kind": KINDS[rank],
                "alert_id": alert_id,
                "revision": revision,
                "partner": partner,
                "device_id": device_id,
                "ring_km": int(ring_km) if ring_km == int(ring_km) else ring_km,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


class CollectingSink(FixedPartitionedSink[ShardPushes, None]):
    """Bytewax's view of `CollectedPushes`."""

    def __init__(self, collected: CollectedPushes, shards: int) -> None:
        self._collected, self._shards = collected, shards

    def list_parts(self) -> list[str]:
        return [shard_key(shard) for shard in range(self._shards)]

    def part_fn(self, item_key: str) -> int:
        return shard_of_key(item_key)

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> _CollectingPartition:
        return _CollectingPartition(self._collected)


class _CollectingPartition(StatefulSinkPartition[ShardPushes, None]):
    def __init__(self, collected: CollectedPushes) -> None:
        self._collected = collected

    def write_batch(self, values: list[ShardPushes]) -> None:
        for entry in values:
            self._collected.add(entry)

    def snapshot(self) -> None:
        return None
