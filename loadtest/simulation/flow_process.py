"""One flow process of the simulated world: the real `LiveFlow`, its threads as actors that take their steps in turn."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import redis

from flows.checkpoints import CheckpointUnusable
from flows.config import FlowConfig
from flows.desk import Relay
from flows.live import LiveFlow
from flows.log import RawEntry, SettingsMismatch
from flows.match import Reload, ShardLogic, decode, shard_key
from flows.server import ServerRefused, check_server
from geoindex.columns import U8
from geoindex.entries import Settings
from geoindex.shard import ShardMachine
from loadtest.simulation.connection import simulated_client
from loadtest.simulation.oracle import Oracle
from loadtest.simulation.world import CHECKPOINT_FOLDER, Actor, Died, Process, World

SMALL_BLOCK_BYTES = 500
"""Of the first block of a fan-out, in a third of the worlds: a push or two, where nearly all fit into one otherwise."""


class FlowProcess(Process):
    """A flow that owns some shards. Raises redis.RedisError, ServerRefused if the server does not answer."""

    def __init__(
        self, world: World, oracle: Oracle, name: str, shards: list[int], settings: Settings, options: dict[str, Any]
    ) -> None:
        super().__init__(world, name)
        self.shards = shards
        self._oracle = oracle
        client = simulated_client(self.route)
        check_server(client)
        config = FlowConfig(
            var=CHECKPOINT_FOLDER.parent,
            shards=",".join(map(str, shards)),
            idle_wait_ms=0,
            reader_links=1,
            unsafe_server=False,
            figures=False,
            **options,
        )
        self.flow = LiveFlow(config, client, settings, clock=self.clock, disk=self.disk)
        self.flow.checkpointer.prepare_room = _untouched
        if world.seed % 3 == 0:
            self.flow.writer.first_block_bytes = SMALL_BLOCK_BYTES
        self._relay = Relay(client, is_cluster=world.seed % 2 == 1)
        source, sink = self.flow.source, self.flow.sink
        self._partitions = {shard: source.build_part("log", shard_key(shard), None) for shard in shards}
        self._sinks = {shard: sink.build_part("queues", shard_key(shard), None) for shard in shards}
        self._logics = {shard: ShardLogic(self.flow.machine_of, self.flow.after_entry) for shard in shards}
        self._reader = Actor(self, "reader", self._read, 4)
        world.actors += [
            self._reader,
            Actor(self, "worker", self._work, 6),
            Actor(self, "writer", self.flow.writer.step, 4),
            Actor(self, "checkpoints", self._checkpoint, 3),
            Actor(self, "relay", self._copy, 1),
            Actor(self, "guards", self.flow.guards.look, 1),
        ]

    def machines(self) -> dict[int, ShardMachine]:
        """Those that have started, by shard."""
        return {shard: logic.machine for shard, logic in self._logics.items() if logic.machine is not None}

    def has_caught_up(self) -> bool:
        """Whether every machine has seen the whole log, and what it caused is in the queues."""
        return all(self.flow.reader.at_head(shard) for shard in self.shards)

    def stop(self) -> None:
        """As SIGTERM does: the worker ends at its next turn."""
        self.flow.stop()

    def _read(self) -> None:
        try:
            self.flow.reader.step()
        except (redis.RedisError, ServerRefused) as problem:
            pause_s = self.flow.reader.break_link(problem)
            self._reader.not_before_ms = self.world.now_ms + round(1000 * pause_s)

    def _checkpoint(self) -> None:
        if self.flow.checkpointer.pause_s() <= 0:
            self.flow.checkpointer.step()

    def _copy(self) -> None:
        with contextlib.suppress(redis.RedisError, SettingsMismatch):
            self._relay.copy_pending()  # else at the next turn, as the thread does

    def _work(self) -> None:
        """Every shard that has something hands it over once: in turns, so some are asked again."""
        left = self.world.rng.sample(self.shards, len(self.shards))
        while left:
            for shard in left:
                try:
                    items = self._partitions[shard].next_batch()
                except StopIteration:
                    self._end()
                    return
                if items:
                    break
            else:
                return
            left.remove(shard)
            self._apply(shard, [item for _, item in items])

    def _apply(self, shard: int, items: list[RawEntry | Reload]) -> None:
        entries = []
        for raw in items:
            if isinstance(raw, Reload):
                self.world.note(f"{self.name}: shard {raw.shard} starts behind {raw.position}")
                self._oracle.started(raw.shard, raw.position)
            entries.append(decode(raw))
        try:
            caused, _ = self._logics[shard].on_batch(entries)
        except CheckpointUnusable as problem:
            # It was good when it was chosen. The flow dies of it, and its supervisor starts another.
            self.world.note(f"{self.name} dies: {problem}")
            self.world.kill(self)
            raise Died(self) from None
        self._sinks[shard].write_batch(list(caused))

    def _end(self) -> None:
        """What `LiveFlow.run` does behind the dataflow."""
        problem = self.flow.source.problem
        if problem is not None:
            self.world.note(f"{self.name} refuses: {problem}")
            self._oracle.refused(self.name, problem)
        else:
            self.flow.finish()
            self.world.note(f"{self.name} has stopped")
        self.world.kill(self)


def _untouched(size_bytes: int) -> U8:
    """Memory that costs nothing where nobody writes: a megabyte more than a small machine needs."""
    return np.empty(size_bytes, np.uint8)
