"""One seed from beginning to end, and many of them on several processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import redis

from flows.log import ensure_settings
from flows.server import ServerRefused
from geoindex.entries import HOUR_MS, Settings
from loadtest.simulation.connection import Route, simulated_client
from loadtest.simulation.flow_process import FlowProcess
from loadtest.simulation.mutations import mutated
from loadtest.simulation.oracle import Oracle
from loadtest.simulation.people import LATE_PARTNER, Map, Officer, Partner, Sender
from loadtest.simulation.world import Actor, Died, Violation, World

PARTNERS = ("amap", "baidu")
TURNS = 80
QUIET_ROUNDS_MAX = 300
QUIET_ROUNDS_MIN = 14
"""So that rings grow, ticks come and checkpoints become final once more."""
QUIET_ROUND_MS = 130
DAY_MS = 24 * HOUR_MS


@dataclass(frozen=True, slots=True)
class SeedResult:
    """What became of one seed."""

    seed: int
    violations: list[Violation]
    trace: list[str]
    """The last lines of what happened."""
    trace_hash: str
    turns: int
    pushes: int
    faults: Counter[str]
    is_beyond_repair: bool
    """The adversary's disk faults left no checkpoint to start from; the run ended there."""


@dataclass(slots=True)
class Totals:
    """What became of many seeds."""

    seeds: int = 0
    seconds: float = 0.0
    turns: int = 0
    pushes: int = 0
    beyond_repair: list[int] = field(default_factory=list)
    """Seeds that ended early: the adversary's disk faults left no checkpoint to start from. Nothing was violated until
    then, and nothing was accounted for at an end."""
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[SeedResult] = field(default_factory=list)

    def add(self, result: SeedResult) -> None:
        self.seeds += 1
        self.turns += result.turns
        self.pushes += result.pushes
        self.faults += result.faults
        if result.violations:
            self.failed.append(result)
        elif result.is_beyond_repair:
            self.beyond_repair.append(result.seed)

    @property
    def played_to_the_end(self) -> int:
        """Seeds whose every turn was played, and whose accounts at the end were right."""
        return self.seeds - len(self.failed) - len(self.beyond_repair)

    def as_json(self) -> dict[str, Any]:
        self.failed.sort(key=lambda result: result.seed)
        self.beyond_repair.sort()
        return {
            "seeds": self.seeds,
            "played_to_the_end": self.played_to_the_end,
            "beyond_repair": len(self.beyond_repair),
            "beyond_repair_seeds": self.beyond_repair,
            "violations": sum(len(result.violations) for result in self.failed),
            "failing_seeds": [result.seed for result in self.failed],
            "rules": dict(
                Counter(violation.rule for result in self.failed for violation in result.violations).most_common()
            ),
            "seconds": round(self.seconds, 3),
            "turns": self.turns,
            "pushes": self.pushes,
            "faults": dict(sorted(self.faults.items())),
        }


class Scene:
    """The flows of a world, whoever starts them again, and the adversary's larger means."""

    def __init__(self, seed: int) -> None:
        world = self.world = World(seed)
        rng = world.rng
        self.shard_count = rng.choice((1, 2, 2, 3, 4))
        self.settings = Settings(
            shard_count=self.shard_count,
            partners=PARTNERS,
            live_window_ms=rng.choice((20_000, 45_000, 120_000, 6 * HOUR_MS)),
            push_ids_max=rng.choice((2, 3, 1000)),
            hash_key=rng.getrandbits(64),
        )
        self.oracle = Oracle(world, self.shard_count, self.settings.live_window_ms + HOUR_MS)
        world.observe(self.oracle)
        world.disk.on_rename = self.oracle.renamed
        ensure_settings(simulated_client(Route(world.server)), self.settings)
        world.server.keep()  # a deployment is older than a second
        self._options = {
            "checkpoint_interval_s": rng.choice((2.0, 8.0, 30.0)),
            "in_flight_max": rng.choice((2, 8, 64)),
        }
        self._clock_ahead_ms_max = 0
        self._births = 0
        self._layout: list[list[int]] = []
        self._flows: list[FlowProcess | None] = []
        self._zombies: list[FlowProcess] = []
        self._start_at_ms: list[int] = []
        self._lay_out(1)
        self._means = self._listed_means()
        place = Map(rng)
        self.sender = Sender(world, self.oracle, self.settings, place)
        self.officers = [Officer(world, self.oracle, name, place, PARTNERS) for name in ("a", "b")]
        self.partners = [Partner(world, self.oracle, name, self.shard_count) for name in (*PARTNERS, LATE_PARTNER)]

    # --- the supervisor ---------------------------------------------------------------------------------------------

    def _lay_out(self, count: int) -> None:
        """Spread the shards over so many flow processes, from scratch."""
        self._layout = [list(range(self.shard_count))[index::count] for index in range(min(count, self.shard_count))]
        self._flows = [None] * len(self._layout)
        self._start_at_ms = [self.world.now_ms] * len(self._layout)

    def _supervise(self) -> None:
        """Start what is not running."""
        for index, flow in enumerate(self._flows):
            if flow is not None and flow.is_dead:
                flow = self._flows[index] = None
                self._start_at_ms[index] = self.world.now_ms + self.world.rng.choice((0, 200, 3000))
            if flow is None and self.world.now_ms >= self._start_at_ms[index]:
                self._flows[index] = self._born(self._layout[index])

    def _born(self, shards: list[int]) -> FlowProcess | None:
        self._births += 1
        name = f"flow-{self._births}"
        try:
            flow = FlowProcess(self.world, self.oracle, name, shards, self.settings, self._options)
        except (redis.RedisError, ServerRefused, Died):
            return None
        self.world.note(f"{name} starts with shards {shards}")
        return flow

    def _alive(self) -> list[FlowProcess]:
        self._zombies = [flow for flow in self._zombies if not flow.is_dead]
        return [flow for flow in self._flows if flow is not None and not flow.is_dead] + self._zombies

    # --- the adversary ----------------------------------------------------------------------------------------------

    def disturb(self) -> None:
        """Faults that are due this turn."""
        world, random = self.world, self.world.rng.random
        for chance, name, act in self._means:
            if name == "lost_tails" and world.now_ms - self.oracle.last_final_ms < 1000:
                chance *= 8  # a tail that ends just before a checkpoint is the one that hurts
            if random() < chance and act() is not False:
                world.faults[name] += 1
                world.note(f"adversary: {name}")

    def _listed_means(self) -> list[tuple[float, str, Callable[[], bool | None]]]:
        """How often each is used, a turn; what it is called in the accounts."""
        rates = self.world.rates
        return [
            (rates.server_restart, "server_restarts", lambda: self._restart_server(0)),
            (rates.lost_tail, "lost_tails", lambda: self._restart_server(self.world.rng.choice((50, 300, 1000)))),
            (rates.power_failure, "power_failures", self._fail_power),
            (rates.out_of_memory, "out_of_memory", self._fill_memory),
            (rates.partition, "partitions", self._cut_off),
            (rates.clock_jump, "clock_jumps", self._jump_clock),
            (rates.pause, "pauses", self._pause),
            (rates.reshard, "reshards", self._reshard),
            (rates.zombie, "zombies", self._add_zombie),
            (rates.clean_stop, "clean_stops", self._stop_one),
            (rates.bit_rot, "bits_rotten", self._rot),
            (rates.time_jump, "time_jumps", self._jump_time),
        ]

    def _restart_server(self, lost_ms: int) -> None:
        world, rng = self.world, self.world.rng
        lost = world.server.restart(lost_ms)
        if lost_ms:
            world.note(f"server loses {lost} writes")
            world.faults["lost_writes"] += lost
            self.oracle.tail_was_lost()
        world.server_down_until_ms = world.now_ms + rng.choice((0, 100, 4000))

    def _fail_power(self) -> None:
        for flow in self._alive():
            self.world.kill(flow)
        self.world.faults["files_torn_or_lost"] += self.world.disk.lose_power(self.world.rng)
        self._restart_server(0)

    def _fill_memory(self) -> None:
        self.world.out_of_memory_until_ms = self.world.now_ms + self.world.rng.choice((200, 2000, 10_000))

    def _cut_off(self) -> None:
        processes = sorted({actor.process.name: actor.process for actor in self.world.actors}.items())
        _, process = self.world.rng.choice(processes)
        process.cut_off_until_ms = self.world.now_ms + self.world.rng.choice((300, 3000, 60_000))

    def _jump_clock(self) -> None:
        rng = self.world.rng
        server = self.world.server
        server.clock_ahead_ms += rng.choice((-1, 1)) * rng.choice((1500, 30_000, 900_000, 2 * HOUR_MS))
        self._clock_ahead_ms_max = max(self._clock_ahead_ms_max, server.clock_ahead_ms)

    def _pause(self) -> bool | None:
        alive = self._alive()
        if not alive:
            return False
        world = self.world
        flow = world.rng.choice(alive)
        flow.paused_until_ms = world.now_ms + world.rng.choice((1000, 10_000, 120_000))
        if world.rng.random() < 0.5:
            # Somebody takes it for dead.
            other = self._born(flow.shards)
            if other is not None:
                self._zombies.append(other)
        return None

    def _reshard(self) -> None:
        rng = self.world.rng
        for flow in self._alive():
            if rng.random() < 0.5:
                self.world.kill(flow)
            elif rng.random() < 0.5:
                flow.stop()
                self._zombies.append(flow)  # it ends by itself, maybe after the next ones have begun
            else:
                self._zombies.append(flow)  # somebody forgot it
        self._lay_out(rng.choice((1, 2, 4)))

    def _add_zombie(self) -> bool | None:
        rng = self.world.rng
        if len(self._zombies) >= 2:
            self.world.kill(self._zombies.pop(0))
            return False
        flow = self._born(sorted(rng.sample(range(self.shard_count), rng.randint(1, self.shard_count))))
        if flow is None:
            return False
        self._zombies.append(flow)
        return None

    def _stop_one(self) -> bool | None:
        alive = self._alive()
        if not alive:
            return False
        self.world.rng.choice(alive).stop()
        return None

    def _rot(self) -> bool | None:
        """A bit of a final checkpoint turns, if another one is left."""
        world, rng = self.world, self.world.rng
        folders: dict[Any, list[Any]] = {}
        for path in world.disk.files:
            if path.suffix == ".checkpoint" and path not in self.oracle.spoilt:
                folders.setdefault(path.parent, []).append(path)
        choices = [path for paths in folders.values() if len(paths) > 1 for path in paths]
        if not choices:
            return False
        path = rng.choice(sorted(choices))
        content = world.disk.files[path].content
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        self.oracle.spoilt.add(path)
        return None

    def _jump_time(self) -> None:
        """Nothing happens for long: windows close, alerts expire, rings have grown meanwhile."""
        rng = self.world.rng
        self.world.pass_time(rng.choice((60_000, 200_000, HOUR_MS, 8 * HOUR_MS, 31 * DAY_MS)))

    # --- a run ------------------------------------------------------------------------------------------------------

    def play(self, turns: int) -> None:
        """The turns of a hostile world, then a quiet one, then the accounts."""
        world, rng = self.world, self.world.rng
        is_slow = rng.random() < 0.75
        for _ in range(turns):
            if world.violations or self.oracle.is_beyond_repair:
                return
            world.turns += 1
            world.pass_time(_pause_ms(rng, is_slow))
            self._supervise()
            self.disturb()
            for _ in range(3):
                world.run_some()
        self._calm_down()
        if world.violations or self.oracle.is_beyond_repair:
            return
        self.oracle.check({shard: machine for flow in self._alive() for shard, machine in flow.machines().items()})

    def _calm_down(self) -> None:
        """No more faults: everything that is under way must come to its end."""
        world = self.world
        world.is_hostile = False
        world.out_of_memory_until_ms = world.server_down_until_ms = 0
        # Until a clock that was set back has caught up, nothing grows, ticks or becomes idle.
        world.server.clock_ahead_ms = self._clock_ahead_ms_max
        for flow in self._zombies:
            world.kill(flow)
        for actor in world.actors:
            actor.process.cut_off_until_ms = actor.process.paused_until_ms = 0
        world.note("quiet")
        self.officers[0].closes_all = world.rng.random() < 0.7
        for number in range(QUIET_ROUNDS_MAX):
            world.pass_time(QUIET_ROUND_MS)
            self._supervise()
            for actor in self._quiet_actors():
                world.run(actor)
            if world.violations or self.oracle.is_beyond_repair:
                return
            if number >= QUIET_ROUNDS_MIN and self._unsettled() is None:
                return
        words = self._unsettled()
        world.violate("a quiet world settles", f"not after {QUIET_ROUNDS_MAX * QUIET_ROUND_MS / 1000:.0f} s: {words}")

    def _unsettled(self) -> str | None:
        """What has not come to its end; None: nothing."""
        for flow, shards in zip(self._flows, self._layout, strict=True):
            if flow is None or flow.is_dead or not flow.has_caught_up():
                return f"the flow of shards {shards} has not caught up"
        return self.oracle.unsettled((*PARTNERS, LATE_PARTNER))

    def _quiet_actors(self) -> Iterator[Actor]:
        for actor in list(self.world.actors):
            rests = actor.name in ("relay", "consumer") and self.world.rng.random() < 0.65
            if not rests and (actor.name not in ("sender", "officer") or self._closes(actor)):
                yield actor

    def _closes(self, actor: Actor) -> bool:
        """Whether this is the officer who closes every search."""
        return actor.process is self.officers[0] and self.officers[0].closes_all


def _pause_ms(rng: random.Random, is_slow: bool) -> int:
    """Time between two turns: minutes a run, or seconds."""
    chance = rng.random()
    if chance < 0.3:
        return 0
    if chance < 0.55:
        return rng.randrange(1, 50)
    if chance < 0.8 or not is_slow:
        return rng.randrange(50, 700)
    return rng.randrange(700, 5000) if chance < 0.94 else rng.randrange(5000, 40_000)


def run_seed(seed: int, turns: int = TURNS) -> SeedResult:
    """One seed; the same seed gives the same run."""
    scene = Scene(seed)
    world = scene.world
    scene.play(turns)
    world.note(f"ends with {scene.oracle.pushes} pushes")
    return SeedResult(
        seed,
        world.violations,
        list(world.trace),
        world.trace_hash(),
        world.turns,
        scene.oracle.pushes,
        world.faults,
        scene.oracle.is_beyond_repair,
    )


# --- many seeds -------------------------------------------------------------------------------------------------------


@contextmanager
def _silence() -> Iterator[None]:
    """The program warns of every fault it meets, and here it meets thousands."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run_seeds(
    seeds: Sequence[int],
    jobs: int = 1,
    mutation: str | None = None,
    on_result: Callable[[SeedResult], None] = lambda result: None,
    stop_at_failure: bool = False,
) -> Totals:
    """Run them all, `jobs` at a time, each in whatever process is free. `on_result` hears of each, in no order."""
    started_s = time.monotonic()
    totals = Totals()

    def take(result: SeedResult) -> bool:
        totals.add(result)
        on_result(result)
        return stop_at_failure and bool(result.violations)

    if jobs == 1 or len(seeds) == 1:
        context: AbstractContextManager[object] = nullcontext() if mutation is None else mutated(mutation)
        with _silence(), context:
            for seed in seeds:
                if take(run_seed(seed)):
                    break
    else:
        # A fresh large array is then lazily zeroed memory of its own: a machine has one of 8 MB, and uses little of it;
        # so no huge pages either, of which each would be zeroed whole.
        os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 20))
        os.environ.setdefault("NUMPY_MADVISE_HUGEPAGE", "0")
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # others would only wait, at first by turning round
        with multiprocessing.get_context("spawn").Pool(jobs, _begin_worker, (mutation,)) as pool:
            for result in pool.imap_unordered(_run_and_tidy, seeds, chunksize=2):
                if take(result):
                    break
    totals.seconds = time.monotonic() - started_s
    return totals


_FOR_GOOD = ExitStack()
"""A worker's mutation lasts as long as the worker."""


def _begin_worker(mutation: str | None) -> None:
    logging.disable(logging.CRITICAL)
    # What was imported is never garbage, and a world is garbage all at once: a tenth of the time went into looking.
    gc.freeze()
    gc.disable()
    if mutation is not None:
        _FOR_GOOD.enter_context(mutated(mutation))


def _run_and_tidy(seed: int) -> SeedResult:
    result = run_seed(seed)
    gc.collect()
    return result
