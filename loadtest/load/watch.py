"""What a deployment is doing, once a second: lag, queues, memory, CPU by role. Asks, changes nothing.

With a Valkey: lag (head of each log against what is done), devices, unread pushes, memory, alarms. With pids of this
machine: CPU and memory by role. Without either there are the load's own figures, and the report says what is missing.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, cast

import psutil
import redis

from flows.log import FIRST, LogId, done_key, last_id, log_key, parse_id, push_key, read_settings
from flows.metrics import read_stats
from flows.server import connect
from geoindex.entries import Settings
from loadtest.load.deployment import Deployment

GROUP = "api"
"""The gateways' consumer group (docs/partners.md names it)."""

Sample = dict[str, Any]


class Watch:
    """One deployment, from the moment this is made."""

    def __init__(self, deployment: Deployment, path: Path | None) -> None:
        """`path`: the deployment's file: who starts processes anew writes their pids there."""
        self._deployment, self._path = deployment, path
        self._read_at_ns = 0
        self._client = None if deployment.valkey is None else connect(deployment.valkey)
        self._settings: Settings | None = None
        self._cpu: dict[tuple[str, int], float] = {}
        self._at_s = time.monotonic()
        self._server_cpu_s: float | None = None
        self._accepted: float | None = None
        psutil.cpu_percent()  # the first answer means nothing

    @property
    def settings(self) -> Settings | None:
        if self._settings is None and self._client is not None:
            self._settings = read_settings(self._client)
        return self._settings

    def sample(self) -> Sample:
        """One look. What cannot be read is not in it."""
        now_s = time.monotonic()
        took_s, self._at_s = max(1e-3, now_s - self._at_s), now_s
        found: Sample = {"machine_cores": psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)}
        self._processes(found, took_s)
        if self._client is not None:
            # It may be being started anew: the figures of that second are missing.
            with contextlib.suppress(redis.RedisError):
                self._valkey(found, took_s)
        return found

    # ---- processes of this machine

    def _processes(self, found: Sample, took_s: float) -> None:
        cores: dict[str, float] = {}
        rss: dict[str, int] = {}
        for role, pid in self._pids().items():
            try:
                process = psutil.Process(pid)
                times = process.cpu_times()
                rss[role] = process.memory_info().rss
            except psutil.Error:
                continue  # being started anew
            used_s = float(times.user + times.system)
            before_s = self._cpu.get((role, pid))
            self._cpu[role, pid] = used_s
            if before_s is not None:
                cores[role] = (used_s - before_s) / took_s
        found |= {"cores": cores, "rss": rss}

    def _pids(self) -> dict[str, int]:
        if self._path is not None:
            try:
                at_ns = self._path.stat().st_mtime_ns
                if at_ns != self._read_at_ns:
                    self._deployment, self._read_at_ns = Deployment.read(self._path), at_ns
            except (OSError, ValueError):
                pass  # as it was
        return self._deployment.pids

    # ---- the server

    def _valkey(self, found: Sample, took_s: float) -> None:
        client = self._client
        assert client is not None
        settings = self.settings
        if settings is None:
            return
        found["lag_ms"] = self.lag_ms()
        found |= self._queues(settings)
        stats = read_stats(client)
        found["devices"] = int(stats.total("devices_live"))
        found["alarms"] = sorted({alarm.kind for alarm in stats.alarms})
        accepted = stats.total("pings_accepted_total")
        if self._accepted is not None and accepted >= self._accepted:
            found["matched_per_s"] = (accepted - self._accepted) / took_s
        self._accepted = accepted
        memory, cpu = client.info("memory"), client.info("cpu")
        found["server_memory"] = int(memory["used_memory"])
        found["server_memory_max"] = int(memory["maxmemory"])
        used_s = float(cpu["used_cpu_sys"]) + float(cpu["used_cpu_user"])
        if "valkey" not in found["cores"] and self._server_cpu_s is not None and used_s >= self._server_cpu_s:
            found["cores"]["valkey"] = (used_s - self._server_cpu_s) / took_s
        self._server_cpu_s = used_s

    def heads(self) -> list[LogId] | None:
        """The last entry of every log; empty without a server to ask, None if it does not answer now."""
        try:
            if self._client is None or self.settings is None:
                return []
            return [last_id(self._client, log_key(shard)) for shard in range(self.settings.shard_count)]
        except redis.RedisError:
            return None

    def is_done(self, heads: list[LogId] | None) -> bool:
        """Whether all pushes of these entries, and of those before them, are in the queues."""
        if not heads:
            return heads is not None
        assert self._client is not None
        try:
            raws = cast("list[bytes | None]", self._client.mget([done_key(shard) for shard in range(len(heads))]))
        except redis.RedisError:
            return False
        return all(raw is not None and parse_id(raw) >= head for raw, head in zip(raws, heads, strict=True))

    def lag_ms(self) -> float:
        """How far the slowest shard is behind its log: age of what is done, by the log's own times."""
        settings, client = self.settings, self._client
        assert settings is not None and client is not None
        with client.pipeline(transaction=False) as pipeline:
            for shard in range(settings.shard_count):
                pipeline.get(done_key(shard))
                pipeline.xrevrange(log_key(shard), count=1)
            replies = pipeline.execute()
        lag_ms = 0.0
        for shard, (done_raw, newest) in enumerate(zip(replies[::2], replies[1::2], strict=True)):
            done = _first_id(client, log_key(shard)) if done_raw is None else parse_id(done_raw)
            head = parse_id(newest[0][0]) if newest else FIRST
            if head > done:
                # A log that was idle has an old `done` and a new head: no more behind than that head is old.
                now_ms = time.time() * 1000
                lag_ms = max(lag_ms, min(float(head[0] - done[0]), max(0.0, now_ms - done[0])))
        return lag_ms

    def _queues(self, settings: Settings) -> Sample:
        """Pushes that partners' programs have not been given yet, and those they have not acknowledged, by partner."""
        client = self._client
        assert client is not None
        keys = [(name, push_key(shard, name)) for name in settings.partners for shard in range(settings.shard_count)]
        with client.pipeline(transaction=False) as pipeline:
            for _, key in keys:
                pipeline.xinfo_groups(key)
                pipeline.xlen(key)
            replies = pipeline.execute(raise_on_error=False)
        unread: dict[str, int] = dict.fromkeys(settings.partners, 0)
        pending: dict[str, int] = dict.fromkeys(settings.partners, 0)
        for (name, _), groups, length in zip(keys, replies[::2], replies[1::2], strict=True):
            if isinstance(groups, Exception) or isinstance(length, Exception):
                continue  # no such queue yet
            own = next((group for group in groups if group["name"] in (GROUP, GROUP.encode())), None)
            unread[name] += length if own is None else int(own["lag"] or 0)
            pending[name] += 0 if own is None else int(own["pending"])
        return {"unread": unread, "pending": pending}


def _first_id(client: redis.Redis, log: str) -> LogId:
    """Where a log begins: what nothing was ever done of is so far behind."""
    entries = cast("list[tuple[bytes, Any]]", client.xrange(log, count=1))
    return parse_id(entries[0][0]) if entries else FIRST
