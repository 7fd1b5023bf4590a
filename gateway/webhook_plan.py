"""What is sent when: the deliveries of one partner's webhook as a pure state machine, without clock, network or server.

    queue of a shard    e1 alert A │ e2 alert A │ e3 alert B │ e4 update A │ e5 alert B
                        sent         sent         sent         waits for     sent
                                                               e1 and e2

**Order.** For one device and alert: `alert`, then updates, then `resolved`. Its pushes all come by one queue, and
pushes of one alert, kind and revision name different devices; so an entry waits for every earlier one in its queue that
is about the same alert and says something else, and for no other. What a failure holds up is the rest of that alert in
that shard.

**Is it the entry, or the receiver?** The third failure in a row, of whatever entries, makes the receiver *down*:
nothing is sent then but test events, further and further apart, until one is accepted. If the first of these is
accepted, the failures were the entries' own, and stay counted; if it is not, they are forgiven. So an outage, however
long, costs no entry its place, and an entry that the receiver cannot stomach is given up after TRIES_MAX failures that
were its own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from flows.log import LogId
from flows.wire import PushEntry
from gateway.handover import EntryName
from gateway.webhook_sender import Answer, Outcome

TRIES_MAX = 8
"""Failures of its own after which an entry goes to the dead letters: after about two minutes."""
DOWN_AFTER = 3
WINDOW = 16
"""Entries of one queue that are being sent, or wait to be sent again."""
IN_FLIGHT_MAX = 32
"""Requests to one receiver at a time."""
BASE_S = 1.0
RETRY_S_MAX = 120.0
PROBE_S_MAX = 30.0
"""A receiver that is up again is found after so long at most."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How long is waited between tries; tests have another one."""

    base_s: float = BASE_S
    retry_s_max: float = RETRY_S_MAX
    probe_s_max: float = PROBE_S_MAX

    def after(self, failures: int, most_s: float, random: random.Random) -> float:
        """Twice as long each time, and of that between half and all: who failed together does not return together."""
        return min(most_s, self.base_s * 2.0 ** min(failures - 1, 32)) * random.uniform(0.5, 1.0)


class Fate(StrEnum):
    """What becomes of an entry that was sent."""

    DONE = "done"
    AGAIN = "again"
    GIVEN_UP = "given_up"


@dataclass(slots=True, eq=False)
class Entry:
    """One queue entry on its way."""

    stream: str
    """Where it is pending: the queue, or the dead letters that it is replayed from."""
    pending_id: LogId
    """Its id there."""
    name: EntryName
    push: PushEntry
    tries: int = 0
    """Failures that count."""
    reason: str = ""
    """Of the last failure."""
    due_s: float = 0.0
    in_flight: bool = False

    @property
    def replayed(self) -> bool:
        """From the dead letters: it comes when it comes."""
        return self.stream.startswith("dead:")

    @property
    def phase(self) -> tuple[str, int]:
        """Entries of one alert and phase name different devices."""
        return self.push.kind, self.push.revision


@dataclass(slots=True)
class DeliveryPlan:
    """All entries of one partner that are on their way. Times: monotonic seconds, given by the caller."""

    pace: Pace = field(default_factory=Pace)
    random: random.Random = field(default_factory=random.Random)
    down: bool = False
    _lanes: dict[str, dict[LogId, Entry]] = field(default_factory=dict)
    """By stream, in the order of its ids."""
    _streak: int = 0
    """Failures since something was accepted."""
    _blamed: Counter[Entry] = field(default_factory=Counter)
    """How many of these failures were counted against which entry."""
    _probes: int = 0
    """Test events that were not accepted since the receiver is down."""
    _laters: int = 0
    """Answers in a row that asked for time."""
    _later_until_s: float = 0.0
    """The receiver asked for so much time."""
    _probe_at_s: float = 0.0
    _probing: bool = False

    # --- what there is ----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def __iter__(self) -> Iterator[Entry]:
        for lane in self._lanes.values():
            yield from lane.values()

    def room(self, stream: str) -> int:
        """How many more entries of this stream may be on their way."""
        return WINDOW - len(self._lanes.get(stream, ()))

    def holds(self, stream: str, pending_id: LogId) -> bool:
        """Whether this one is on its way already."""
        return pending_id in self._lanes.get(stream, ())

    def add(self, entries: Iterable[Entry]) -> None:
        """More entries, in any order."""
        for entry in entries:
            lane = self._lanes.setdefault(entry.stream, {})
            assert entry.pending_id not in lane, "an entry is added once"
            behind = not lane or next(reversed(lane)) < entry.pending_id
            lane[entry.pending_id] = entry
            if not behind:
                self._lanes[entry.stream] = dict(sorted(lane.items()))

    def drop(self, entry: Entry) -> None:
        """It is on its way no more."""
        del self._lanes[entry.stream][entry.pending_id]
        self._blamed.pop(entry, None)

    # --- what to do -------------------------------------------------------------------------------------------------

    def to_send(self, now_s: float) -> list[Entry]:
        """Entries to be sent now; they are in flight from here on."""
        found: list[Entry] = []
        if self.down or now_s < self._later_until_s:
            return found
        room = IN_FLIGHT_MAX - sum(entry.in_flight for entry in self)
        waiting = dict.fromkeys(self._lanes)
        while waiting:
            for stream in list(waiting):
                if len(found) == room:
                    return found
                entry = next((one for one in self._free(stream) if not one.in_flight and one.due_s <= now_s), None)
                if entry is None:
                    del waiting[stream]
                    continue
                entry.in_flight = True
                found.append(entry)
                self._lanes[stream] = self._lanes.pop(stream)  # the others have their turn before it
        return found

    def to_probe(self, now_s: float) -> bool:
        """Whether a test event is to be sent now; it is on its way from here on."""
        if not self.down or self._probing or now_s < max(self._probe_at_s, self._later_until_s):
            return False
        self._probing = True
        return True

    def next_s(self, now_s: float) -> float | None:
        """When there will be something to do that no answer and no new entry brings about; None: never."""
        if self.down:
            return None if self._probing else max(self._probe_at_s, self._later_until_s)
        due = [
            max(entry.due_s, self._later_until_s)
            for stream in self._lanes
            for entry in self._free(stream)
            if not entry.in_flight
        ]
        return min((at_s for at_s in due if at_s > now_s), default=None)

    def _free(self, stream: str) -> Iterator[Entry]:
        """Entries of a stream that wait for no earlier one, the oldest first."""
        phases: dict[str, tuple[str, int] | None] = {}
        for entry in self._lanes[stream].values():
            if not entry.replayed and phases.setdefault(entry.push.alert_id, entry.phase) != entry.phase:
                phases[entry.push.alert_id] = None  # nor does anything behind it go ahead
            else:
                yield entry

    # --- what came of it --------------------------------------------------------------------------------------------

    def answered(self, entry: Entry, answer: Answer, now_s: float) -> Fate:
        """What becomes of an entry; one that is done or given up is on its way no more."""
        entry.in_flight = False
        if answer.outcome is Outcome.ACCEPTED:
            self._accepted()
            self.drop(entry)
            return Fate.DONE
        entry.reason = answer.reason
        if answer.outcome is Outcome.GONE:
            return Fate.AGAIN  # its webhook ends; it is whoever's comes next
        if answer.outcome is Outcome.LATER:
            self._later(answer, now_s)
            return Fate.AGAIN
        self._laters = 0
        entry.tries += 1
        entry.due_s = now_s + self.pace.after(entry.tries, self.pace.retry_s_max, self.random)
        self._streak += 1
        self._blamed[entry] += 1
        if self.down and self._probes:
            self._forgive(entry)  # sent before it was known
        elif self._streak >= DOWN_AFTER and not self.down:
            self.down, self._probes = True, 0
            self._probe_at_s = now_s + self.pace.after(1, self.pace.probe_s_max, self.random)
        if entry.tries >= TRIES_MAX and not self.down:
            self.drop(entry)
            return Fate.GIVEN_UP
        return Fate.AGAIN

    def probed(self, answer: Answer, now_s: float) -> list[Entry]:
        """What the test event found out; entries that are given up now."""
        self._probing = False
        if answer.outcome is Outcome.LATER:
            self._later(answer, now_s)
            return []
        if answer.outcome is not Outcome.ACCEPTED:
            self._probes += 1
            for entry in list(self._blamed):
                self._forgive(entry)
            self._probe_at_s = now_s + self.pace.after(self._probes + 1, self.pace.probe_s_max, self.random)
            return []
        was_out = self._probes > 0
        self._accepted()
        for entry in self:
            if was_out:
                entry.due_s = min(entry.due_s, now_s)
        given_up = [entry for entry in self if entry.tries >= TRIES_MAX and not entry.in_flight]
        for entry in given_up:
            self.drop(entry)
        return given_up

    def _accepted(self) -> None:
        self.down = False
        self._streak = self._probes = self._laters = 0
        self._blamed.clear()

    def _later(self, answer: Answer, now_s: float) -> None:
        self._laters += 1
        wait_s = answer.retry_after_s
        if wait_s is None:
            wait_s = self.pace.after(self._laters, self.pace.probe_s_max, self.random)
        self._later_until_s = max(self._later_until_s, now_s + wait_s)

    def _forgive(self, entry: Entry) -> None:
        entry.tries -= self._blamed.pop(entry, 0)
