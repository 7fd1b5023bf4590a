"""One scenario's deployment with life in it, and its quiet phase: what a scenario is given to break."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flows.desk import DESK_KEY, Desk
from flows.log import FIRST, LogId, last_id, parse_id, push_key
from flows.server import connect
from geoindex.entries import Settings
from loadtest.soak.accounts import Account, StreamEntries, account, alert_events
from loadtest.soak.deployment import PATIENCE_S, SETTINGS, Deployment, wait_until
from loadtest.soak.flow import ForkedFlow, Trouble
from loadtest.soak.life import PHONES, Delivered, LogKeeper, Mangle, Officers, Partner, Senders, Worker, as_it_is

Say = Callable[[str], None]
Measured = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Setting:
    """What a scenario needs of its stage."""

    trims: bool = False
    """Whether logs are trimmed behind checkpoints; what was trimmed is kept elsewhere for the account."""
    keeps_acknowledged: bool = True
    """False: the server loses what it acknowledged, so only logs and queues are held against each other."""
    begins_logs: bool = True
    disk_mb: int | None = None
    """The deployment lives on a disk of this size."""
    settings: Settings = SETTINGS
    checkpoint_interval_s: float = 0.2


class Stage(Deployment):
    """A deployment and the people around it."""

    def __init__(
        self, folder: Path, exits: ExitStack, setting: Setting, seed: int, say: Say, deadline_s: float
    ) -> None:
        super().__init__(folder, exits, setting.settings, setting.begins_logs)
        self.setting = setting
        self.chance = random.Random(seed)
        self.measured: Measured = {}
        """What a scenario found out besides the account, by names that end in a unit."""
        self.say = say
        self._seed = seed
        self._deadline_s = deadline_s
        self.senders: Senders | None = None
        self.officers: Officers | None = None
        self.partners: list[Partner] = []
        self.keeper: LogKeeper | None = None
        if setting.trims:
            self.keeper = LogKeeper(self.server.url, setting.settings.shard_count)
            self.keeper.start()
            exits.callback(self.keeper.ending.set)

    # ---- what a scenario does

    def flow(self, trouble: Trouble | None = None, url: str | None = None, **options: Any) -> ForkedFlow:
        """One more flow process, with checkpoints taken often."""
        own = {
            "checkpoint_interval_s": self.setting.checkpoint_interval_s,
            "trim_logs": self.setting.trims,
            "keep_pushes": True,
        }
        return super().flow(trouble, url, **(own | options))

    def live(
        self,
        url: str | None = None,
        mangle: Mangle = as_it_is,
        senders: bool = True,
        officers: bool = True,
        per_s: float = 30.0,
        phone_count: int = PHONES,
        claim_after_s: float = 1.0,
    ) -> None:
        """Let phones ping, officers work and partners read, all through `url`."""
        url = url or self.server.url
        if senders:
            self.senders = Senders(url, self.settings, self._seed, mangle, per_s, phone_count)
            self.begin(self.senders)
        if officers:
            client = connect(url)
            self.exits.callback(client.close)
            self.officers = Officers(Desk(client), self._seed)
            self.begin(self.officers)
        if self.setting.keeps_acknowledged:
            for name in self.settings.partners:
                self.partner(name, url, claim_after_s)

    def partner(
        self,
        name: str,
        url: str | None = None,
        claim_after_s: float = 1.0,
        delivered: Mapping[tuple[str, LogId], Delivered] | None = None,
    ) -> Partner:
        """One partner reads from now on. `delivered`: what it was given before, by another consumer."""
        partner = Partner(url or self.server.url, name, self.settings.shard_count, claim_after_s=claim_after_s)
        partner.delivered |= delivered or {}
        self.partners.append(partner)
        self.begin(partner)
        return partner

    def begin(self, worker: Worker) -> None:
        """Let somebody work until the scenario ends."""
        worker.start()
        self.exits.callback(worker.ending.set)

    def beside(self, name: str) -> Stage:
        """Another deployment of the same kind, in a folder of its own, for comparison."""
        folder = self.folder / name
        folder.mkdir()
        return Stage(folder, self.exits, self.setting, self._seed, self.say, self._deadline_s)

    def rounds(self, times: int) -> Iterator[int]:
        """0, 1, ... below `times`, ending early when the scenario's time is over, but not before the first."""
        for number in range(times):
            if number and time.monotonic() > self._deadline_s:
                self.say(f"{number} of {times} rounds in the time there is")
                break
            if number and number % 25 == 0:
                self.say(f"round {number} of {times}")
            yield number
            self.measured["rounds"] = number + 1

    def pause(self, least_s: float, most_s: float) -> None:
        """A random while."""
        time.sleep(self.chance.uniform(least_s, most_s))

    def spend(self, seconds: float) -> None:
        """So long, or as long as the scenario's time lasts."""
        time.sleep(max(0.2, min(seconds, self._deadline_s - time.monotonic())))

    # ---- the end

    def quiet(self) -> None:
        """Nothing breaks any more, everything open is closed, everything owed arrives, and the flows end cleanly.

        Raises RuntimeError if that takes longer than patience lasts.
        """
        if self.senders is not None:
            self.senders.end()
        if self.officers is not None:
            self.officers.end()
        self._closed_and_copied()
        self.settle()
        queued = {(key, parse_id(raw)) for key, entries in self.queues().items() for raw, _ in entries}
        for partner in self.partners:
            wanted = {entry for entry in queued if entry[0].endswith(f":{partner.partner}")}
            wait_until(
                lambda partner=partner, wanted=wanted: (  # type: ignore[misc]
                    partner.problem is not None or (partner.delivered.keys() >= wanted and not self._pending(partner))
                ),
                f"{partner.partner} to have read and acknowledged everything",
                poll_s=0.02,
            )
            partner.end()
        for flow in self.flows:
            if flow.is_alive and flow.stop() != 0:
                raise RuntimeError(f"a flow must end with 0 when it is asked to, it said: {flow.said[-2000:]}")
        if self.keeper is not None:
            self.keeper.end()

    def _closed_and_copied(self) -> None:
        for known in self.desk.list(only_open=True):
            self.desk.close(known.alert.alert_id, "found")
        self.wait_copied()

    def wait_copied(self) -> None:
        """Until all that stands on the desk is in every log. Raises RuntimeError after a while."""
        newest = last_id(self.client, DESK_KEY)
        if newest > FIRST and not self.desk.wait_copied(newest, PATIENCE_S):
            raise RuntimeError("the desk's events must have been copied to every log")

    def _pending(self, partner: Partner) -> int:
        keys = [push_key(shard, partner.partner) for shard in self.shards]
        return sum(cast(dict[str, int], self.client.xpending(key, "soak"))["pending"] for key in keys)

    def account(self) -> Account:
        """Logs against queues."""
        logs = self.logs() if self.keeper is None else self.keeper.entries
        return account(logs, self.queues(), self.settings.partners)

    def broken_promises(self) -> list[str]:
        """What people were told that is not so: acknowledged alert events, delivered pushes."""
        problems: list[str] = []
        if not self.setting.keeps_acknowledged:
            return problems
        on_desk = {parse_id(raw) for raw, _ in cast(StreamEntries, self.client.xrange(DESK_KEY))}
        if self.officers is not None and (lost := set(self.officers.acknowledged) - on_desk):
            problems.append(f"{len(lost)} acknowledged alert events are not on the desk, such as {min(lost)}")
        logs = self.logs() if self.keeper is None else self.keeper.entries
        for shard, entries in logs.items():
            if missing := on_desk - {event.desk_id for event in alert_events(entries)}:
                problems.append(f"shard {shard}: {len(missing)} alert events were not copied to its log")
        queued = {(key, parse_id(raw)) for key, entries in self.queues().items() for raw, _ in entries}
        for partner in self.partners:
            if strange := partner.delivered.keys() - queued:
                problems.append(f"{partner.partner} was given {len(strange)} entries that no queue holds")
        return problems

    def delivered(self, partner: str) -> list[Delivered]:
        """What a partner was given so far."""
        return [entry for reader in self.partners if reader.partner == partner for entry in reader.delivered.values()]
