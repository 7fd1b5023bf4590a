"""Reconciliation: what a server's logs owe, beside what stands in its queues, on a flow that may be running.

    done:{s} ──> the cut: only what was caused up to there is looked at
    checkpoint or first entry ──> OwedPushes <── log entries up to the cut ──> owed ──┐
    queues up to the cut ──> told ────────────────────────────────────────────────────┴──> faults

Each shard on its own, one after the other: its cut is consistent, for a MULTI moves `done` together with the pushes.
What a shard vouches for: every push caused after `began` and up to `cut`. A log that was not trimmed is read from its
first entry. Otherwise the oldest checkpoint that the log still reaches is *given*: where devices were, who was told,
which alerts are open; that is all the shard machine contributes (`facts_of`). The queue keeper leaves in the queues
what was caused by entries that are in the log, and `trimmed:{s}:<partner>` says what it took out, so whatever is
missing behind that is a fault.

Without log or checkpoint there remain the checks that need neither, over all that stands in the queues: nothing twice,
`alert` before `update` before `resolved`, and `resolved` to everyone told of an alert that has ended.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import redis

from flows.audit import NEVER_SEEN, Owed, OwedPushes, StartingFacts
from flows.checkpoints import Checkpoint, CheckpointStore, CheckpointUnusable
from flows.log import FIRST, LogId, done_key, format_id, log_key, parse_id, push_key, trimmed_key
from flows.push_commands import PUSH_COUNT_MAX, log_id_of, push_id
from flows.queue_keeper import disabled_partners, queue_trimmed_key
from flows.wire import PingColumns, PushEntry, decode_entry, decode_push, screen_pings
from geoindex.columns import I64, U32, Bool
from geoindex.device_kernels import NO_TIME
from geoindex.entries import KINDS, Settings
from geoindex.shard import SettingsRefused, ShardMachine

FAULTS = ("missed", "extra", "duplicate", "unretracted", "out_of_order", "displaced", "undecodable")
"""missed        owed, and in no queue
extra         in a queue, and not owed
duplicate     told a second time: one `alert`, one `resolved`, one `update` a revision, for each device and alert
unretracted   told of an alert that has ended, and never that it has
out_of_order  `update` before `alert`, anything after `resolved`, an older revision after a newer one
displaced     owed and told, but under the id of another log entry than the one that owes it: too early or too late
undecodable   a queue entry that is no push"""
FAULTS_KEPT_MAX = 10_000
"""Of each shard and kind of fault; all are counted."""
QUEUE_READ_COUNT = 200
LOG_READ_BYTES = 16 << 20
LOG_READ_COUNT_MAX = 2_000
TRIES = 3
"""Beginnings from a newer checkpoint, when the log was trimmed while it was read."""
ROW_BITS = 32

Progress = Callable[[int, int, float], None]
"""Told of the shard, its pings so far, and how much of its log that was (0 to 1)."""


class Fault(NamedTuple):
    """One device, and what is wrong with what it was told."""

    fault: str
    shard: int
    partner: str
    device_id: str
    alert_id: str
    kind: str
    revision: int
    entry: str
    """The queue entry; of a missed push, the log entry that owes it."""

    def line(self) -> str:
        if self.fault == "undecodable":
            return f"undecodable: entry {self.entry} of {push_key(self.shard, self.partner)}"
        where = "owed by log entry" if self.fault == "missed" else "queue entry"
        return (
            f"{self.fault}: {self.kind} of {self.alert_id!r} revision {self.revision} to {self.device_id!r} of "
            f"{self.partner!r}, shard {self.shard}, {where} {self.entry}"
        )


@dataclass(frozen=True, slots=True)
class ShardAccount:
    """What was found out about one shard."""

    shard: int
    began: LogId | None
    """Every push caused after this log entry was looked at; FIRST: from the first on; None: nothing was recomputed."""
    cut: LogId
    """And up to this one."""
    pings: int
    owed: int
    told: int
    """Pushes in the queues, one device each."""
    compared: int
    """Those of them that were compared with what is owed."""
    counts: dict[str, int]
    faults: list[Fault]
    later: dict[str, LogId]
    """Partners whose queues were trimmed beyond `began`: only what was caused from here on could be compared."""
    notes: list[str]
    """What was in the way."""


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """What was found out about a deployment, or one partner of it."""

    shards: list[ShardAccount]
    left_out: list[str]
    """Disabled partners: their queues are dropped, so nothing can be said of them."""

    @property
    def counts(self) -> dict[str, int]:
        """Faults by kind."""
        return {fault: sum(account.counts[fault] for account in self.shards) for fault in FAULTS}

    @property
    def faults(self) -> Iterator[Fault]:
        for account in self.shards:
            yield from account.faults

    @property
    def clean(self) -> bool:
        return not any(self.counts.values())

    @property
    def complete(self) -> bool:
        """Whether what is owed could be worked out for every shard."""
        return all(account.began is not None for account in self.shards)

    def line(self) -> str:
        told = sum(account.told for account in self.shards)
        counts = self.counts
        always = ", ".join(f"{counts[fault]:,} {fault}" for fault in FAULTS[:4])
        rare = "".join(f", {counts[fault]:,} {fault.replace('_', ' ')}" for fault in FAULTS[4:] if counts[fault])
        return f"{told:,} pushes, {always}{rare}"


def facts_of(machine: ShardMachine) -> StartingFacts:
    """What a shard machine knows, for an account that goes on from there."""
    state, table = machine.state(), machine.device_table
    records = table.columns.records[: table.row_count]
    rows = cast(U32, np.flatnonzero(records["id_length"]).astype(np.uint32))
    position = np.full(table.row_count, -1, np.int64)
    position[rows] = np.arange(len(rows))
    id_bytes, id_end = table.ids_of(rows)
    assert NO_TIME == NEVER_SEEN, "one value means: no location"
    return StartingFacts(
        settings=machine.settings,
        clock_ms=state.clock_ms,
        desk_id=state.last_desk_id,
        closed=state.closed,
        open=[(opened.alert, position[table.rows_told(opened.slot)]) for opened in state.alerts],
        partner=table.partners_of(rows),
        id_bytes=id_bytes,
        id_end=id_end,
        lat_e7=records["lat_e7"][rows],
        lng_e7=records["lng_e7"][rows],
        observed_at_ms=records["observed_at_ms"][rows],
    )


def reconcile(
    client: redis.Redis,
    store: CheckpointStore,
    settings: Settings,
    partner: str | None = None,
    since_ms: int | None = None,
    on_progress: Progress = lambda shard, pings, part: None,
) -> Reconciliation:
    """Audit every shard, and all partners or one. `since_ms`: go back no further than that, if a checkpoint allows it.

    A checkpoint that cannot be used is passed over, and named in the account. Raises redis.RedisError.
    """
    disabled = disabled_partners(client)
    wanted = [name for name in settings.partners if partner in (None, name)]
    reader = _Reader(client, store, settings, [name for name in wanted if name not in disabled], since_ms, on_progress)
    return Reconciliation(
        [reader.account(shard) for shard in range(settings.shard_count)],
        [name for name in wanted if name in disabled],
    )


# --- one shard's account ----------------------------------------------------------------------------------------------


class _Told(NamedTuple):
    """One queue entry."""

    entry_id: LogId
    kind: str
    alert_id: str
    revision: int
    rows: I64


@dataclass(slots=True)
class _Tellings:
    """Devices told or owed, as columns: which entry, which thing, which row. One place of each is one push."""

    entry: I64
    """Index of the queue entry, or of the `Owed`."""
    thing: I64
    row: I64

    @property
    def key(self) -> I64:
        """One number for a thing and a device."""
        return self.thing << ROW_BITS | self.row


@dataclass
class ShardLedger:
    """Both sides of one shard's account: `owed` is fed with log entries, `hold` with queue entries in queue order."""

    shard: int
    partners: Sequence[str]
    owed: OwedPushes
    given_told: list[tuple[str, I64]] = field(default_factory=list)
    """Of alerts open at the beginning: who had been told."""
    told: list[_Told] = field(default_factory=list)
    undecodable: list[tuple[str, LogId]] = field(default_factory=list)
    _things: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _alerts: dict[str, int] = field(default_factory=dict)

    def hold(self, partner: str, entry_id: LogId, push: PushEntry) -> None:
        """An entry that stands in a partner's queue."""
        rows = self.owed.roll.rows_of_names(self.partners.index(partner), push.device_ids)
        self.told.append(_Told(entry_id, push.kind, push.alert_id, push.revision, rows))

    def faults(
        self, began: LogId | None, cut_of: dict[str, LogId], audited: Iterable[str]
    ) -> tuple[dict[str, int], list[Fault], int]:
        """Faults by kind, the faults themselves (at most FAULTS_KEPT_MAX of a kind), pushes that were compared.

        `began`: as in `ShardAccount`; `cut_of`: below which id each queue was trimmed. Only `audited` partners count.
        """
        is_audited = np.array([name in set(audited) for name in self.partners], np.bool_)
        partner_of = self.owed.roll.partners().astype(np.int64)
        told = self._tellings(self.told)
        counts: Counter[str] = Counter(dict.fromkeys(FAULTS, 0))
        found: list[Fault] = []

        def report(fault: str, entries: Sequence[_Told | Owed], tellings: _Tellings, wrong: I64) -> None:
            counts[fault] += len(wrong)
            for place in wrong[:FAULTS_KEPT_MAX].tolist():
                found.append(self._fault(fault, entries[int(tellings.entry[place])], int(tellings.row[place])))

        for partner, entry_id in self.undecodable:
            counts["undecodable"] += 1
            found.append(Fault("undecodable", self.shard, partner, "", "", "", 0, format_id(entry_id)))
        again = self._told_again(told)
        report("duplicate", self.told, told, again)
        report("out_of_order", self.told, told, self._out_of_order(told, again))
        compared = 0
        if began is not None:
            owed = self._tellings(self.owed.owed)
            bounds = [log_id_of(cut_of.get(name, FIRST)) for name in self.partners]
            owed_there = is_audited[partner_of[owed.row]] & self._from(
                bounds, [entry.log_id for entry in self.owed.owed], owed, partner_of
            )
            caused = [log_id_of(entry.entry_id) for entry in self.told]
            told_there = self._from(bounds, caused, told, partner_of)
            told_there &= np.array([log_id > began for log_id in caused], np.bool_)[told.entry]
            compared = int(told_there.sum())
            owed_at, told_at = np.flatnonzero(owed_there), np.flatnonzero(told_there)
            report("missed", self.owed.owed, owed, owed_at[~np.isin(owed.key[owed_at], told.key[told_at])])
            told_keys, first = np.unique(told.key[told_at], return_index=True)
            is_owed = np.isin(told_keys, owed.key)
            report("extra", self.told, told, told_at[first[~is_owed]])
            report("displaced", self.told, told, self._displaced(owed, owed_at, told, told_at[first[is_owed]], caused))
        self._unretracted(told, cut_of, is_audited, partner_of, report)
        return dict(counts), found, compared

    def _tellings(self, entries: Sequence[_Told | Owed]) -> _Tellings:
        lengths = [len(entry.rows) for entry in entries]
        things = [self._thing(entry.kind, entry.alert_id, entry.revision) for entry in entries]
        return _Tellings(
            entry=np.repeat(np.arange(len(entries)), lengths),
            thing=np.repeat(np.array(things, np.int64), lengths),
            row=np.concatenate([np.zeros(0, np.int64), *(entry.rows for entry in entries)]),
        )

    def _thing(self, kind: str, alert_id: str, revision: int) -> int:
        return self._things.setdefault((kind, alert_id, revision), len(self._things))

    def _alert(self, alert_id: str) -> int:
        return self._alerts.setdefault(alert_id, len(self._alerts))

    def _from(self, bounds: list[LogId], caused: list[LogId], of: _Tellings, partner_of: I64) -> Bool:
        """Which were caused at the bound of their device's partner, or later."""
        partner = partner_of[of.row]
        there = np.zeros(len(of.row), np.bool_)
        for bound in set(bounds):
            late = np.array([log_id >= bound for log_id in caused], np.bool_)[of.entry]
            there |= late & np.array([one == bound for one in bounds], np.bool_)[partner]
        return there

    def _told_again(self, told: _Tellings) -> I64:
        """Places at which a device is told what it was told before. An alert is told and resolved once, at whatever
        revision.
        """
        once: dict[tuple[str, str, int], int] = {}
        thing_once = np.array(
            [
                once.setdefault((kind, alert_id, revision if kind == "update" else 0), len(once))
                for kind, alert_id, revision in self._things
            ],
            np.int64,
        )
        key = thing_once[told.thing] << ROW_BITS | told.row
        order = np.argsort(key, kind="stable")
        return np.sort(order[1:][key[order[1:]] == key[order[:-1]]])

    def _out_of_order(self, told: _Tellings, again: I64) -> I64:
        """Places at which a device is told something that belongs before what it was told last of that alert."""
        kind = np.array([KINDS.index(kind) for kind, _, _ in self._things], np.int64)
        alert = np.array([self._alert(alert_id) for _, alert_id, _ in self._things], np.int64)
        revision = np.array([revision for _, _, revision in self._things], np.int64)
        places = np.delete(np.arange(len(told.row)), again)
        key = alert[told.thing[places]] << ROW_BITS | told.row[places]
        order = places[np.argsort(key, kind="stable")]
        before, after = order[:-1], order[1:]
        same = (told.row[before] == told.row[after]) & (alert[told.thing[before]] == alert[told.thing[after]])
        earlier, later = told.thing[before], told.thing[after]
        turned = (kind[later] < kind[earlier]) | (
            (kind[later] == kind[earlier]) & (revision[later] < revision[earlier])
        )
        return np.sort(after[same & turned])

    def _displaced(self, owed: _Tellings, owed_at: I64, told: _Tellings, told_at: I64, caused: list[LogId]) -> I64:
        """Of the places that are owed: those whose entry was caused by another log entry than the one that owes it."""
        numbers: dict[LogId, int] = {}
        owing = np.array([numbers.setdefault(one.log_id, len(numbers)) for one in self.owed.owed], np.int64)
        causing = np.array([numbers.setdefault(log_id, len(numbers)) for log_id in caused], np.int64)
        keys = owed.key[owed_at]
        order = np.argsort(keys)
        place = np.searchsorted(keys[order], told.key[told_at])
        place = np.minimum(place, max(0, len(keys) - 1))
        if not len(keys):
            return told_at[:0]
        match = owed_at[order[place]]
        differs = (owed.key[match] == told.key[told_at]) & (owing[owed.entry[match]] != causing[told.entry[told_at]])
        displaced: I64 = told_at[differs]
        return displaced

    def _unretracted(
        self,
        told: _Tellings,
        cut_of: dict[str, LogId],
        is_audited: Bool,
        partner_of: I64,
        report: Callable[[str, Sequence[_Told | Owed], _Tellings, I64], None],
    ) -> None:
        """Devices told of an alert that has ended, in the queues or before, and not told that it has."""
        ended = self.owed.closed | {entry.alert_id for entry in self.told if entry.kind == "resolved"}
        told_of = self._of_kind(told, "alert", ended)
        resolved = self._of_kind(told, "resolved", ended)
        alert = np.array([self._alert(alert_id) for _, alert_id, _ in self._things], np.int64)
        resolved_keys = alert[told.thing[resolved]] << ROW_BITS | told.row[resolved]
        keys = alert[told.thing[told_of]] << ROW_BITS | told.row[told_of]
        _, first = np.unique(keys, return_index=True)
        told_of, keys = told_of[first], keys[first]
        report("unretracted", self.told, told, told_of[~np.isin(keys, resolved_keys)])

        # Told before the beginning, and the end lies behind it: unless its queue was trimmed beyond the end.
        resolving = {entry.alert_id: entry for entry in self.owed.owed if entry.kind == "resolved"}
        before: list[Owed] = []
        for alert_id, rows in self.given_told:
            entry = resolving.get(alert_id)
            if entry is None:
                continue
            bounds = [log_id_of(cut_of.get(name, FIRST)) for name in self.partners]
            reached = is_audited & np.array([entry.log_id >= bound for bound in bounds], np.bool_)
            rows = rows[reached[partner_of[rows]]]
            rows = rows[~np.isin(self._alert(alert_id) << ROW_BITS | rows, np.concatenate([resolved_keys, keys]))]
            before.append(entry._replace(kind="alert", rows=rows))
        tellings = self._tellings(before)
        report("unretracted", before, tellings, np.arange(len(tellings.row)))

    def _of_kind(self, told: _Tellings, kind: str, alerts: set[str]) -> I64:
        """Places of one kind, of these alerts."""
        wanted = np.array([one == kind and alert_id in alerts for one, alert_id, _ in self._things], np.bool_)
        return np.flatnonzero(wanted[told.thing])

    def _fault(self, fault: str, entry: _Told | Owed, row: int) -> Fault:
        partner, device_id = self.owed.roll.name(row)
        where = entry.entry_id if isinstance(entry, _Told) else entry.log_id
        return Fault(
            fault,
            self.shard,
            self.partners[partner],
            device_id,
            entry.alert_id,
            entry.kind,
            entry.revision,
            format_id(where),
        )


# --- reading ----------------------------------------------------------------------------------------------------------


class _LogTrimmed(Exception):
    """The log was trimmed beyond what was read of it."""


@dataclass(slots=True)
class _Start:
    """Where a shard's account begins."""

    began: LogId | None
    facts: StartingFacts | None
    notes: list[str]


class _Reader:
    """Reads what an account needs. Changes nothing on the server."""

    def __init__(
        self,
        client: redis.Redis,
        store: CheckpointStore,
        settings: Settings,
        partners: Sequence[str],
        since_ms: int | None,
        on_progress: Progress,
    ) -> None:
        self._client = client
        self._store = store
        self._settings = settings
        self._partners = partners
        self._since_ms = since_ms
        self._on_progress = on_progress

    def account(self, shard: int) -> ShardAccount:
        """One shard's account. When its log is trimmed meanwhile: once more, from a newer checkpoint."""
        for number in range(TRIES):
            with contextlib.suppress(_LogTrimmed):
                return self._account(shard, self._start(shard, newest=number > 0))
        reason = f"the log was trimmed while it was read, {TRIES} times; take checkpoints less often"
        return self._account(shard, _Start(None, None, [reason]))

    def _account(self, shard: int, start: _Start) -> ShardAccount:
        # First the cut, then queues, which are quickly read, then the log, which the trimmer follows more slowly.
        done = self._id(done_key(shard))
        ledger = ShardLedger(shard, self._settings.partners, OwedPushes(start.facts))
        ledger.given_told = list(ledger.owed.told())
        cut_of: dict[str, LogId] = {}
        for partner in self._partners:
            self._read_queue(shard, partner, done, ledger)
            cut_of[partner] = self._id(queue_trimmed_key(shard, partner))
        if start.began is not None:
            self._read_log(shard, start.began, done, ledger.owed)
        counts, faults, compared = ledger.faults(start.began, cut_of, self._partners)
        began = start.began
        return ShardAccount(
            shard=shard,
            began=began,
            cut=done,
            pings=ledger.owed.pings,
            owed=sum(len(entry.rows) for entry in ledger.owed.owed),
            told=sum(len(entry.rows) for entry in ledger.told),
            compared=compared,
            counts=counts,
            faults=faults,
            later={
                partner: log_id_of(cut)
                for partner, cut in cut_of.items()
                if began is not None and log_id_of(cut) > (began[0], began[1] + 1)
            },
            notes=start.notes,
        )

    def _id(self, key: str) -> LogId:
        raw = cast("bytes | None", self._client.get(key))
        return FIRST if raw is None else parse_id(raw)

    # Where to begin.

    def _start(self, shard: int, newest: bool) -> _Start:
        finals = self._store.finals(shard)
        trimmed, usable, notes = self._usable(shard, finals)
        if trimmed == FIRST and self._since_ms is None and not newest:
            return _Start(FIRST, None, notes)
        usable.reverse()  # the oldest first
        if newest:
            usable.reverse()
        elif self._since_ms is not None:
            # The newest of those that are old enough, else as far back as there is anything.
            old = [final for final in usable if final.position[0] <= self._since_ms]
            if not old and trimmed == FIRST:
                return _Start(FIRST, None, notes)
            usable = old[::-1] + [final for final in usable if final not in old]
        for checkpoint in usable:
            try:
                machine = self._store.load(checkpoint)
            except (CheckpointUnusable, SettingsRefused) as problem:
                notes.append(str(problem))
                continue
            return _Start(checkpoint.position, facts_of(machine), notes)
        if trimmed == FIRST:
            return _Start(FIRST, None, notes)
        notes.append(
            f"the log was trimmed up to {format_id(trimmed)}, and there is no checkpoint to begin with in "
            f"{self._store.directory}: what is owed is not known"
        )
        return _Start(None, None, notes)

    def _usable(self, shard: int, finals: Sequence[Checkpoint]) -> tuple[LogId, list[Checkpoint], list[str]]:
        """Up to where the log was trimmed; the checkpoints that it and the queues agree with, the newest first."""
        with self._client.pipeline(transaction=True) as pipeline:
            pipeline.get(trimmed_key(shard))
            pipeline.get(done_key(shard))
            for final in finals:
                pipeline.xrange(log_key(shard), min=format_id(final.position), max=format_id(final.position))
            trimmed_raw, done_raw, *entries = pipeline.execute()
        trimmed, done = (FIRST if raw is None else parse_id(raw) for raw in (trimmed_raw, done_raw))
        usable: list[Checkpoint] = []
        notes: list[str] = []
        for final, found in zip(finals, entries, strict=True):
            if final.position < trimmed:
                continue  # replaced by newer ones since the folder was read
            if final.position > done or not (found or final.position == trimmed):
                notes.append(f"{final.path}: the log or the queues have lost their tail since")
                continue
            usable.append(final)
        return trimmed, usable, notes

    # Both sides.

    def _read_queue(self, shard: int, partner: str, done: LogId, ledger: ShardLedger) -> None:
        key, after = push_key(shard, partner), "-"
        last = format_id(push_id(done, PUSH_COUNT_MAX))
        while entries := cast(list[Any], self._client.xrange(key, after, last, QUEUE_READ_COUNT)):
            for raw_id, fields in entries:
                try:
                    (payload,) = fields.values()
                    ledger.hold(partner, parse_id(raw_id), decode_push(payload))
                except ValueError:
                    ledger.undecodable.append((partner, parse_id(raw_id)))
            after = f"({entries[-1][0].decode()}"

    def _read_log(self, shard: int, began: LogId, done: LogId, owed: OwedPushes) -> None:
        """Feed the entries behind `began` and up to `done`. Raises _LogTrimmed."""
        position, count, from_ms = began, 16, began[0]
        told_at_s = time.monotonic()
        while position < done:
            with self._client.pipeline(transaction=True) as pipeline:
                pipeline.xrange(log_key(shard), f"({format_id(position)}", format_id(done), count)
                pipeline.get(trimmed_key(shard))
                entries, trimmed = pipeline.execute()
            if trimmed is not None and parse_id(trimmed) > position:
                raise _LogTrimmed
            if not entries:
                return
            size_bytes = 0
            from_ms = from_ms or parse_id(entries[0][0])[0]
            for raw_id, fields in entries:
                position = parse_id(raw_id)
                size_bytes += sum(map(len, fields.values()))
                feed(owed, position, fields)
            count = max(1, min(LOG_READ_COUNT_MAX, LOG_READ_BYTES * len(entries) // max(1, size_bytes)))
            if time.monotonic() - told_at_s > 1:
                told_at_s = time.monotonic()
                self._on_progress(shard, owed.pings, (position[0] - from_ms) / max(1, done[0] - from_ms))


def feed(owed: OwedPushes, log_id: LogId, fields: dict[bytes, bytes]) -> None:
    """Apply one log entry as it stands in the log; one that is none owes nothing, as the flow sets it aside."""
    try:
        ((kind, payload),) = fields.items()
        entry = decode_entry(kind, payload)
    except ValueError:  # more than one field, or a MalformedEntry
        return
    if isinstance(entry, PingColumns):
        entry, _ = screen_pings(entry, len(owed.partners))
    owed.apply(log_id[0], entry, log_id[1])
