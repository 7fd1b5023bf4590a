"""The world of one seed: one time, one server, one disk, actors that take turns, and an adversary with a seed.

    World.run_some ──> an actor's step ──> the program's own code ──> server or disk
                                                                        │ before and behind every exchange
                          another actor's step, in between <── interlude ──> the process dies here

An actor is what would be a thread: a flow process has five of them, senders, officers and partners one each. One runs
at a time; where a real thread would wait for server, disk or clock, others may run, and the process may die. All chance
comes from one generator, so a seed is a run.
"""

from __future__ import annotations

import hashlib
import random
import traceback
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import redis

from loadtest.simulation.clock import SimulatedClock
from loadtest.simulation.connection import Break, Route
from loadtest.simulation.disk import ProcessDisk, SimulatedDisk
from loadtest.simulation.server import Observer, SimulatedServer

START_MS = 1_700_000_000_000
NESTED_MAX = 2
"""Actors that may run inside one another's waits."""
TRACE_LINES = 80
"""Kept of a run, for whoever looks at a failure."""


class Died(BaseException):
    """A process dies here. Not an Exception: nothing in the program may catch it."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.name)
        self.process = process


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was broken."""

    rule: str
    words: str


@dataclass(frozen=True, slots=True)
class Rates:
    """What the adversary of one seed does, and how often: each seed has another few of its means (swarm testing).

    Chances are per exchange with server or disk for the first group, per turn for the second.
    """

    death: float
    interleaving: float
    link_break: float
    short_write: float
    disk_full: float

    server_restart: float
    lost_tail: float
    power_failure: float
    out_of_memory: float
    partition: float
    clock_jump: float
    pause: float
    reshard: float
    zombie: float
    clean_stop: float
    bit_rot: float
    time_jump: float


class Process:
    """One process: its way to the server, its view of the disk, its clock; `die` takes it out of the world."""

    def __init__(self, world: World, name: str, mortal: bool = True) -> None:
        self.world = world
        self.name = name
        self.mortal = mortal
        self.is_dead = False
        self.cut_off_until_ms = 0
        self.paused_until_ms = 0
        self.route = ProcessRoute(self)
        self.disk = ProcessDisk(world.disk, self.interlude, world.bytes_taken)
        ahead_ms = world.rng.choice((0, 0, 37, -2500, 7_200_000))
        self.clock = SimulatedClock(lambda: world.now_ms, self._let_others_run, ahead_ms)

    def die(self) -> None:
        self.is_dead = True
        self.disk.die()

    def interlude(self, moment: str) -> None:
        """Before or behind an exchange: this process may die, another actor may run."""
        self.world.interlude(self, moment)

    def _let_others_run(self, wait_ms: float) -> None:
        self.world.wait(self, wait_ms)


class ProcessRoute(Route):
    """A process's way to the server, with the adversary on it."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.world.server)
        self._process = process

    def _is_cut(self) -> bool:
        process = self._process
        world = process.world
        now_ms = world.now_ms
        return process.is_dead or process.cut_off_until_ms > now_ms or world.server_down_until_ms > now_ms

    def reach(self) -> None:
        if self._is_cut():
            raise redis.ConnectionError("the server cannot be reached")

    def fate(self, command_count: int) -> Break | None:
        if self._is_cut():
            return Break(0, 0, False)
        world = self._process.world
        if not world.is_hostile or world.rng.random() >= world.rates.link_break:
            return None
        world.faults["link_breaks"] += 1
        executed = world.rng.choice((0, command_count, world.rng.randint(0, command_count)))
        replies = world.rng.choice((0, 0, world.rng.randint(0, executed)))
        if replies < executed:
            world.faults["lost_replies"] += 1
        world.note(f"{self._process.name}: link breaks, {executed} of {command_count} executed, {replies} replies")
        return Break(executed, replies, world.rng.random() < 0.3)

    def interlude(self, moment: str) -> None:
        process = self._process
        process.world.interlude(process, moment)


@dataclass(slots=True)
class Actor:
    """What would be a thread of a process."""

    process: Process
    name: str
    step: Callable[[], None]
    weight: int
    """How often its turn comes."""
    busy: bool = False
    not_before_ms: int = 0


class World:
    """One seed's world. `actors` are added by whoever sets the scene."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seed = seed
        self.now_ms = START_MS + self.rng.randrange(86_400_000)
        self.is_hostile = True
        self.server = SimulatedServer(self.now_ms)
        self.server.refuses = self._refuses
        self.server_down_until_ms = 0
        self.out_of_memory_until_ms = 0
        self.disk = SimulatedDisk()
        self.actors: list[Actor] = []
        self.running: list[Actor] = []
        self.violations: list[Violation] = []
        self.faults: Counter[str] = Counter()
        self.turns = 0
        self.trace: deque[str] = deque(maxlen=TRACE_LINES)
        self._trace_hash = hashlib.blake2b(digest_size=8)
        self.rates = _rates(self.rng)

    def observe(self, observer: Observer) -> None:
        self.server.observer = observer

    # --- what happened ----------------------------------------------------------------------------------------------

    def note(self, words: str) -> None:
        """A line of the trace."""
        line = f"{self.turns:4d} +{(self.now_ms - START_MS) % 86_400_000 / 1000:.3f}s {words}"
        self.trace.append(line)
        self._trace_hash.update(line.encode())

    def trace_hash(self) -> str:
        return self._trace_hash.hexdigest()

    def violate(self, rule: str, words: str) -> None:
        self.note(f"VIOLATION {rule}: {words}")
        self.violations.append(Violation(rule, words))

    # --- time -------------------------------------------------------------------------------------------------------

    def pass_time(self, by_ms: int) -> None:
        self.now_ms += by_ms
        self.server.now_ms = self.now_ms

    def wait(self, process: Process, wait_ms: float) -> None:
        """A process waits: time passes, and another of its actors may run."""
        self.pass_time(max(1, min(20, round(wait_ms))))
        if len(self.running) <= NESTED_MAX:
            others = [actor for actor in self.actors if actor.process is process and not actor.busy]
            if others:
                self.run(self.rng.choice(others))
        if process.is_dead:
            raise Died(process)

    # --- turns ------------------------------------------------------------------------------------------------------

    def run(self, actor: Actor) -> None:
        """One step of an actor, if it is alive and awake."""
        process = actor.process
        if actor.busy or process.is_dead or process.paused_until_ms > self.now_ms or actor.not_before_ms > self.now_ms:
            return
        actor.busy = True
        self.running.append(actor)
        try:
            actor.step()
        except Died as death:
            if death.process is not process:
                raise
        except Exception as problem:
            where = "".join(traceback.format_exception(problem)[-4:])
            self.violate("unexpected exception", f"{process.name} {actor.name}: {problem!r}\n{where}")
            self.kill(process)
        finally:
            self.running.pop()
            actor.busy = False

    def run_some(self) -> None:
        """The turn of some actor."""
        now_ms, total = self.now_ms, 0
        awake: list[Actor] = []
        up_to: list[int] = []
        for actor in self.actors:
            if actor.process.paused_until_ms <= now_ms:
                total += actor.weight
                awake.append(actor)
                up_to.append(total)
        if awake:
            self.run(awake[bisect_right(up_to, self.rng.random() * total)])

    def interlude(self, process: Process, moment: str) -> None:
        """At an exchange of a process: it may die, or another actor may run."""
        if not self.is_hostile or process.is_dead:
            return
        chance = self.rng.random()
        if process.mortal and chance < self.rates.death:
            self.faults["deaths"] += 1
            actor = self.running[-1].name if self.running else ""
            self.note(f"{process.name} dies in its {actor}, {moment} an exchange")
            self.kill(process)
            raise Died(process)
        if chance > 1 - self.rates.interleaving and len(self.running) <= NESTED_MAX:
            self.faults["interleavings"] += 1
            self.run_some()
            if process.is_dead:
                raise Died(process)

    def kill(self, process: Process) -> None:
        """A process is gone, with its actors."""
        process.die()
        self.actors = [actor for actor in self.actors if actor.process is not process]

    # --- small faults -----------------------------------------------------------------------------------------------

    def bytes_taken(self, wanted: int) -> int:
        """How many bytes of a write the disk takes; -1: it is full."""
        if not self.is_hostile:
            return wanted
        chance = self.rng.random()
        if chance < self.rates.disk_full:
            self.faults["disk_full"] += 1
            return -1
        if chance > 1 - self.rates.short_write and wanted > 1:
            self.faults["short_writes"] += 1
            return self.rng.randint(1, wanted - 1)
        return wanted

    def _refuses(self, command: bytes) -> bool:
        if self.out_of_memory_until_ms <= self.now_ms or self.rng.random() < 0.6:
            return False
        self.faults["refused_writes"] += 1
        return True


def _rates(rng: random.Random) -> Rates:
    """Half of the means, each more or less often."""

    def some(most: float, of_seeds: float = 0.5) -> float:
        used = rng.random() < of_seeds
        strength = rng.choice((0.2, 0.5, 1.0))
        return most * strength if used else 0.0

    return Rates(
        death=some(0.006),
        interleaving=some(0.2, 0.7),
        link_break=some(0.044),
        short_write=some(0.2, 0.3),
        disk_full=some(0.03, 0.2),
        server_restart=some(0.02),
        lost_tail=some(0.02, 0.35),
        power_failure=some(0.01, 0.3),
        out_of_memory=some(0.02),
        partition=some(0.02),
        clock_jump=some(0.01, 0.3),
        pause=some(0.04),
        reshard=some(0.03),
        zombie=some(0.03),
        clean_stop=some(0.04),
        bit_rot=some(0.06, 0.25),
        time_jump=some(0.01, 0.3),
    )


CHECKPOINT_FOLDER = Path("/var/checkpoints")
