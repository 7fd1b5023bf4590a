"""A deployment to be broken: a server of its own, flows that can be killed, its logs, queues and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import redis

from flows.checkpoints import CheckpointStore
from flows.desk import Desk
from flows.embedded import EmbeddedServer
from flows.log import LogId, done_key, ensure_settings, last_id, log_key, parse_id, push_key, trimmed_key
from flows.server import connect
from geoindex.entries import Settings
from loadtest.soak.accounts import StreamEntries
from loadtest.soak.flow import ForkedFlow, Trouble, start_fork_server
from loadtest.soak.injectors import kill_server
from loadtest.soak.life import PARTNERS

SHARD_COUNT = 4
PATIENCE_S = 60.0
"""For what takes a tenth of a second on a machine that does nothing else."""
MEMORY_BYTES_MAX = 1 << 30
SETTINGS = Settings(shard_count=SHARD_COUNT, partners=PARTNERS, hash_key=11)


def wait_until(holds: Callable[[], object], what: str, timeout_s: float = PATIENCE_S, poll_s: float = 0.002) -> None:
    """Return as soon as `holds()` is true. Raises RuntimeError after the timeout."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"waited {timeout_s:g} s in vain: {what}")
        time.sleep(poll_s)


class Deployment:
    """Closed by `exits`, with everything that it started."""

    def __init__(self, folder: Path, exits: ExitStack, settings: Settings = SETTINGS, begins_logs: bool = True) -> None:
        """`begins_logs` False: the caller writes the first entries."""
        self.folder = folder
        self.var = folder / "var"
        self.exits = exits
        self.flows: list[ForkedFlow] = []
        start_fork_server()
        self.server = self._start_server()
        exits.callback(lambda: self.server.close())
        self.client = connect(self.server.url)
        exits.callback(self.client.close)
        self.desk = Desk(self.client)
        self.settings = ensure_settings(self.client, settings) if begins_logs else settings
        self.store = CheckpointStore(self.var / "checkpoints", self.settings)

    @property
    def shards(self) -> range:
        return range(self.settings.shard_count)

    # ---- processes

    def _start_server(self) -> EmbeddedServer:
        return EmbeddedServer.start(self.folder / "valkey", port=None, memory_bytes_max=MEMORY_BYTES_MAX)

    def restart_server(self, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Kill it, and start it again on the same files."""
        kill_server(self.server)
        meanwhile()
        self.server = self._start_server()

    def flow(self, trouble: Trouble | None = None, url: str | None = None, **options: Any) -> ForkedFlow:
        """One more flow process; `options`: fields of `FlowConfig`."""
        log_path = self.folder / f"flow-{len(self.flows) + 1}.log"
        flow = ForkedFlow(url or self.server.url, self.var, log_path, trouble, **options)
        self.flows.append(flow)
        self.exits.callback(flow.kill)
        return flow

    # ---- how far it has come

    def heads(self) -> list[LogId]:
        return [last_id(self.client, log_key(shard)) for shard in self.shards]

    def done(self, shard: int) -> LogId:
        raw = cast("bytes | None", self.client.get(done_key(shard)))
        return parse_id(raw) if raw else (0, 0)

    def trimmed(self, shard: int) -> LogId:
        raw = cast("bytes | None", self.client.get(trimmed_key(shard)))
        return parse_id(raw) if raw else (0, 0)

    def positions(self, shard: int) -> list[LogId]:
        """Of the shard's final checkpoints, the newest first."""
        return [checkpoint.position for checkpoint in self.store.finals(shard)]

    def settle(self) -> None:
        """Until all that stands in the logs now is done."""
        heads = self.heads()
        wait_until(lambda: all(self.done(shard) >= heads[shard] for shard in self.shards), f"logs done up to {heads}")

    def wait_for_checkpoints(self, count: int = 1) -> None:
        """Until every shard has `count` new final ones."""
        for _ in range(count):
            newest = [self.positions(shard)[:1] for shard in self.shards]

            def all_newer(newest: list[list[LogId]] = newest) -> bool:
                return all(self.positions(shard)[:1] != newest[shard] for shard in self.shards)

            wait_until(all_newer, "newer checkpoints")

    # ---- what stands on the server

    def logs(self) -> dict[int, StreamEntries]:
        return {shard: cast(StreamEntries, self.client.xrange(log_key(shard))) for shard in self.shards}

    def queues(self) -> dict[str, StreamEntries]:
        keys = [push_key(shard, partner) for shard in self.shards for partner in self.settings.partners]
        return {key: cast(StreamEntries, self.client.xrange(key)) for key in keys}


def server_number(client: redis.Redis, section: str, name: str) -> int:
    """A number of INFO."""
    return int(client.info(section)[name])
