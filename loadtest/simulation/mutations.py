"""The program broken on purpose, a line at a time: a simulator that does not find these proves nothing.

Each is a mistake that somebody could make, or made. `mutated` puts it in place of the real code while it lasts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np

from flows import checkpoints, desk, queues
from flows.checkpointer import Checkpointer, _LogFacts
from flows.checkpoints import CheckpointStore
from flows.desk import RELAY_EVENTS_MAX, Relay
from flows.log import FIRST, done_key, format_id, log_key, parse_id, relay_key
from flows.log_reader import LogReader
from flows.queues import PushWriter
from flows.server import packed
from flows.wire import decode_entry, encode_entry
from geoindex.shard import MINUTE_MS, ShardMachine

Patch = tuple[Any, str, Any]
"""Where, the name of what, and what is put in its place."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """One mistake. `patches` gives what is put in place of what."""

    words: str
    patches: Callable[[], list[Patch]]


@contextmanager
def mutated(name: str) -> Iterator[None]:
    """The program with a mistake. Raises KeyError if there is none of that name."""
    patches = [mock.patch.object(owner, attribute, new) for owner, attribute, new in MUTATIONS[name].patches()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _trims_too_early() -> list[Patch]:
    def cut(self: Any, shard: int, connection: Any) -> Any:
        finals = self._store.finals(shard)
        return finals[0].position if finals else None

    return [(Checkpointer, "_cut", cut)]


def _final_before_done() -> list[Patch]:
    settle = Checkpointer._settle

    def early(self: Any, shard: int) -> None:
        lane = self._lanes[shard]
        if lane.written is not None:
            lane.done = max(lane.done, lane.written.position)
        settle(self, shard)

    def ready(self: Any) -> list[int]:
        return [shard for shard, lane in self._lanes.items() if lane.written is not None]

    return [(Checkpointer, "_settle", early), (Checkpointer, "_ready", ready)]


def _takes_any_checkpoint() -> list[Patch]:
    return [(_LogFacts, "fault", lambda self, position: None)]


def _without_checksums() -> list[Patch]:
    return [(checkpoints, "zlib", SimpleNamespace(crc32=lambda raw, value=0: 0))]


def _without_sync() -> list[Patch]:
    write = CheckpointStore.write

    def unsynced(self: Any, *arguments: Any) -> Any:
        with mock.patch.multiple(self._disk, sync=lambda descriptor: None, sync_bytes=lambda descriptor: None):
            return write(self, *arguments)

    return [(CheckpointStore, "write", unsynced)]


def _wipes_at_checkpoint() -> list[Patch]:
    snapshot = ShardMachine.snapshot

    def wiping(self: Any, room: Any = None) -> Any:
        self._devices.sweep(self.clock_ms - self.settings.live_window_ms)
        return snapshot(self, room)

    return [(ShardMachine, "snapshot", wiping)]


# --- restoring --------------------------------------------------------------------------------------------------------


def _restored(spoil: Callable[[Any], None]) -> list[Patch]:
    """A restored machine that has lost something."""
    restored = ShardMachine.restored.__func__  # type: ignore[attr-defined]

    def spoiling(cls: Any, state: Any, fill: Any) -> Any:
        machine = restored(cls, state, fill)
        spoil(machine)
        return machine

    return [(ShardMachine, "restored", classmethod(spoiling))]


def _forgets_told() -> list[Patch]:
    def spoil(machine: Any) -> None:
        machine._devices.columns.told[: machine._devices.row_count] = 0

    return _restored(spoil)


def _forgets_closed() -> list[Patch]:
    return _restored(lambda machine: machine._closed.clear())


def _sweeps_at_restart() -> list[Patch]:
    def spoil(machine: Any) -> None:
        machine._devices.sweep(machine.clock_ms - machine.settings.live_window_ms)

    return _restored(spoil)


def _reverses_free_rows() -> list[Patch]:
    def spoil(machine: Any) -> None:
        free = machine._devices.columns_in_use()["free_rows"]
        free[:] = free[::-1].copy()

    return _restored(spoil)


# --- logs and the server's runs ---------------------------------------------------------------------------------------


def _ignores_runs_when_writing() -> list[Patch]:
    return [(PushWriter, "_check_runs", lambda self: self._opened_link())]


def _ignores_runs_when_reading() -> list[Patch]:
    opened_link = LogReader._opened_link

    def opened(self: Any, lane: Any) -> Any:
        if lane.link is None:
            self._run_id = None  # as if it were the first
        return opened_link(self, lane)

    return [(LogReader, "_opened_link", opened)]


def _ignores_trimmed() -> list[Patch]:
    accept = LogReader._accept

    def accepting(self: Any, link: Any, asked: Any, count: int, streams: object, trimmed: Any) -> None:
        accept(self, link, asked, count, streams, dict.fromkeys(trimmed))

    return [(LogReader, "_accept", accepting)]


def _full_reader_asks_nothing() -> list[Patch]:
    step = LogReader.step

    def blind(self: Any) -> None:
        if any(state.stopped is None and not self._is_full(state) for state in self._shards.values()):
            step(self)

    return [(LogReader, "step", blind)]


# --- pushes -----------------------------------------------------------------------------------------------------------


def _split_block(block: Any) -> tuple[list[bytes], bytes]:
    """A block's XADDs, and what moves `done`: between MULTI and EXEC."""
    multi, execute = packed("MULTI"), packed("EXEC")
    assert block.parts[0] == multi, "a block begins with MULTI"
    return block.parts[1:-1], cast(bytes, block.parts[-1]).removesuffix(execute)


def _plain_pipeline() -> list[Patch]:
    make = queues._block

    def block(shard: int, entries: Any) -> Any:
        made = make(shard, entries)
        pushes, done = _split_block(made)
        made.parts = [*pushes, done]
        return made

    def replies(self: Any, link: Any, sent: Any) -> tuple[str | None, list[bool]]:
        problem, is_new = None, []
        for _ in range(sent.push_count + (sent.done is not None)):
            reply = link.receive()
            is_new.append(not isinstance(reply, Exception))
            if isinstance(reply, Exception) and "equal or smaller" not in str(reply):
                problem = str(reply)
        return problem, is_new

    return [(queues, "_block", block), (PushWriter, "_replies", replies)]


def _skips_refused_blocks() -> list[Patch]:
    settle = PushWriter._settle

    def skipping(self: Any, link: Any, shard: int, block: Any, problem: str | None, is_new: list[bool]) -> None:
        settle(self, link, shard, block, None, is_new)

    return [(PushWriter, "_settle", skipping)]


def _takes_lost_replies_for_success() -> list[Patch]:
    break_link = PushWriter._break_link

    def breaking(self: Any, problem: Exception) -> None:
        break_link(self, problem)
        for shard, lane in self._lanes.items():
            if lane.block is not None:
                done, lane.block = lane.block.done, None
                if done is not None:
                    self._on_done(shard, done)

    return [(PushWriter, "_break_link", breaking)]


def _done_before_pushes() -> list[Patch]:
    make = queues._block

    def block(shard: int, entries: Any) -> Any:
        made = make(shard, entries)
        pushes, done = _split_block(made)
        made.parts = [done, packed("MULTI"), *pushes, packed("EXEC")]
        return made

    return [(queues, "_block", block)]


def _done_may_turn_back() -> list[Patch]:
    make = queues._block

    def block(shard: int, entries: Any) -> Any:
        made = make(shard, entries)
        if made.done is not None:
            made.parts[-1] = packed("SET", done_key(shard), format_id(made.done)) + packed("EXEC")
        return made

    return [(queues, "_block", block)]


def _done_with_a_part() -> list[Patch]:
    make = queues._block

    def block(shard: int, parts: Any) -> Any:
        return make(shard, [replace(part, is_end=True) for part in parts])

    return [(queues, "_block", block)]


def _ids_of_the_server() -> list[Patch]:
    make = queues._block

    def block(shard: int, entries: Any) -> Any:
        made = make(shard, entries)
        made.parts = [_ENTRY_ID.sub(rb"$1\r\n*\r\n\1", b"".join(made.parts))]
        return made

    return [(queues, "_block", block)]


_ENTRY_ID = re.compile(rb"\$\d+\r\n\d+-\d+\r\n(\$\d+\r\n(?:alert|update|resolved)\r\n)")
"""The id of an XADD to a queue, ahead of the push's kind."""


# --- the machine ------------------------------------------------------------------------------------------------------


def _grows_late() -> list[Patch]:
    def advance(self: Any, at_ms: int) -> Iterator[Any]:
        while self._due_ms <= at_ms:
            opened = self._alerts.next_due()
            self.clock_ms = at_ms
            yield from self._run_due(opened)
            self._due_ms = self._alerts.next_due_ms()
        if at_ms >= self._sweep_due_ms:
            minute_ms = at_ms - at_ms % MINUTE_MS
            if self._settings is not None:
                self._devices.sweep(minute_ms - self._settings.live_window_ms)
            self._sweep_due_ms = minute_ms + MINUTE_MS
        self.clock_ms = at_ms

    return [(ShardMachine, "_advance", advance)]


def _late_pings_move() -> list[Patch]:
    apply_pings = ShardMachine._apply_pings

    def moving(self: Any, at_ms: int, batch: Any) -> Any:
        age_ms = at_ms - batch.observed_at_ms
        accepted = (age_ms <= self.settings.live_window_ms) & (age_ms >= -self.settings.future_tolerance_ms)
        observed_at_ms = np.where(accepted, at_ms, batch.observed_at_ms)
        return apply_pings(self, at_ms, replace(batch, observed_at_ms=observed_at_ms))

    return [(ShardMachine, "_apply_pings", moving)]


# --- the desk ---------------------------------------------------------------------------------------------------------


def _edits_again() -> list[Patch]:
    return [(desk, "raise_if_lost", lambda lost: None)]


def _watches_nothing() -> list[Patch]:
    watch_and_read = desk._watch_and_read

    def read(pipeline: Any, keys: Any, *reads: Any) -> Any:
        return watch_and_read(pipeline, ["a key that nobody writes"], *reads)

    return [(desk, "_watch_and_read", read)]


def _marks_before_copying() -> list[Patch]:
    def copy_to(self: Any, shards: Any, seen: Any) -> Any:
        return min(copy_to_one(self, shard) for shard in shards)

    def copy_to_one(self: Any, shard: int) -> Any:
        while True:
            raw = self._client.get(relay_key(shard))
            copied = FIRST if raw is None else parse_id(raw)
            behind = self._client.xrange(desk.DESK_KEY, f"({format_id(copied)}", count=RELAY_EVENTS_MAX)
            events = [(parse_id(raw_id), fields) for raw_id, fields in behind]
            if not events:
                return copied
            assert len(events) <= RELAY_EVENTS_MAX, "as many as were asked for"
            self._client.set(relay_key(shard), format_id(events[-1][0]))
            for desk_id, fields in events:
                entry = self._entry(desk_id, fields)
                if entry is not None:
                    self._client.xadd(log_key(shard), dict([entry]))

    return [(Relay, "_copy_to", copy_to)]


def _copies_without_desk_id() -> list[Patch]:
    entry_of = Relay._entry

    def entry(self: Any, desk_id: Any, fields: Any) -> Any:
        copied = entry_of(self, desk_id, fields)
        return copied and encode_entry(replace(cast(Any, decode_entry(*copied)), desk_id=(0, 1)))

    return [(Relay, "_entry", entry)]


MUTATIONS: dict[str, Mutation] = {
    "trims-too-early": Mutation("the log is trimmed behind the newer checkpoint", _trims_too_early),
    "final-before-done": Mutation("a checkpoint is final as soon as it is written", _final_before_done),
    "takes-any-checkpoint": Mutation(
        "the newest checkpoint is taken, whatever log and queues say", _takes_any_checkpoint
    ),
    "without-checksums": Mutation("a damaged checkpoint is believed", _without_checksums),
    "without-sync": Mutation("a checkpoint gets its name before it is on the disk", _without_sync),
    "wipes-at-checkpoint": Mutation("expired locations are wiped when a checkpoint is taken", _wipes_at_checkpoint),
    "forgets-told": Mutation("a restored machine does not know whom it told", _forgets_told),
    "forgets-closed": Mutation("a checkpoint lacks the ids of closed alerts", _forgets_closed),
    "sweeps-at-restart": Mutation("expired locations are wiped when a machine is restored", _sweeps_at_restart),
    "reverses-free-rows": Mutation("a restored machine gives free rows in another order", _reverses_free_rows),
    "writes-for-another-run": Mutation(
        "what was read of another run of the server is pushed", _ignores_runs_when_writing
    ),
    "reads-another-run": Mutation("reading goes on when the server was restarted", _ignores_runs_when_reading),
    "ignores-trimmed": Mutation("a reader that slept through a trim reads on", _ignores_trimmed),
    "full-reader-is-blind": Mutation("a reader without room never learns of a restart", _full_reader_asks_nothing),
    "plain-pipeline": Mutation("pushes go out in a plain pipeline instead of a MULTI", _plain_pipeline),
    "skips-refused-blocks": Mutation("a block that the server refused is not sent again", _skips_refused_blocks),
    "lost-replies-are-success": Mutation("a block without a reply is not sent again", _takes_lost_replies_for_success),
    "done-before-pushes": Mutation("`done` is written before the pushes", _done_before_pushes),
    "done-with-a-part": Mutation(
        "`done` rises with the first block of a fan-out instead of the last", _done_with_a_part
    ),
    "done-may-turn-back": Mutation("a worker that is behind sets `done` back", _done_may_turn_back),
    "ids-of-the-server": Mutation("push ids are the server's, not derived from the log", _ids_of_the_server),
    "grows-late": Mutation("a ring grows with the clock of the entry that revealed it", _grows_late),
    "late-pings-move": Mutation("a ping that comes late moves its device", _late_pings_move),
    "edits-again": Mutation("an edit whose answer was lost is made again", _edits_again),
    "watches-nothing": Mutation("the desk's compare-and-set does not compare", _watches_nothing),
    "marks-before-copying": Mutation("the relay marks events as copied before it copies them", _marks_before_copying),
    "copies-without-desk-id": Mutation("the relay gives every copy the same desk id", _copies_without_desk_id),
}
