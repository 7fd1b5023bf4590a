"""What is broken, scenario by scenario. Each leaves flows running that can bring everything to its end.

A scenario is a function of a stage and a size: so many rounds, or so many seconds. What goes on meanwhile and the
accounts afterwards are the stage's.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil

from flows.consumers import Consumer, Delivery
from flows.log import LogWriter, append_entry, log_key, settings_key
from flows.metrics import read_stats
from flows.server import link_opener
from flows.wire import decode_push, encode_entry, split_by_shard
from geoindex.columns import PingBatch
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, AlertClose, AlertRevision, LogEntry, Tick
from loadtest.soak.deployment import server_number, wait_until
from loadtest.soak.flow import (
    BEFORE_A_CHECKPOINT,
    EXIT_REFUSED,
    IN_A_CHECKPOINT,
    IN_A_CLOSING,
    ForkedFlow,
    Trouble,
    shared_clock,
)
from loadtest.soak.injectors import Network, Proxy, cut_tail, flip_a_byte
from loadtest.soak.life import PARTNERS, growing_alert, phones, somewhere
from loadtest.soak.stage import Stage

TOLD_PHONES = 3000
TWO_HOURS_S = 7200.0
READ_AHEAD_MB = 8
"""Of the flow whose memory is watched."""
MEMORY_SPARE_MB = 96
"""Devices that came, checkpoints, and what Python does not give back."""


@dataclass(frozen=True, slots=True)
class Size:
    """How often, or how long; a scenario uses what fits it."""

    times: int = 1
    seconds: float = 1.0
    hours: float = 1.0
    """Of the past, that something stands for."""


# ---- flows that die


def kill_flow(stage: Stage, size: Size) -> None:
    """SIGKILL between the start of the process and half a second later."""
    stage.live()
    for _ in stage.rounds(size.times):
        flow = stage.flow()
        stage.pause(0.05, 0.7)
        flow.kill()
    stage.flow()


def kill_before_checkpoint(stage: Stage, size: Size) -> None:
    """It dies when pushes are in the queues and no checkpoint knows of them."""
    _kill_at(stage, size, list(BEFORE_A_CHECKPOINT))


def kill_in_checkpoint(stage: Stage, size: Size) -> None:
    """It dies while a checkpoint is copied, written, made final, or the log trimmed behind it."""
    _kill_at(stage, size, list(IN_A_CHECKPOINT))


def _kill_at(stage: Stage, size: Size, points: list[str]) -> None:
    stage.live()
    for number in stage.rounds(size.times):
        flow = stage.flow(Trouble(crash=points[number % len(points)]))
        _expect(flow.wait() == -signal.SIGKILL, f"a flow must kill itself {points[number % len(points)]}", flow)
    stage.flow()


def kill_in_closing(stage: Stage, size: Size) -> None:
    """Thousands were told; it dies when the end of the alert has gone out to some shards, and to one half."""
    stage.live(senders=False, officers=False)
    points = list(IN_A_CLOSING)
    torn = 0
    for number in stage.rounds(size.times):
        flow = stage.flow()
        alert_id, batch = f"told-{number}", _inside(phones(number, TOLD_PHONES))
        _send(stage, batch)
        stage.desk.publish(growing_alert(alert_id, stage.desk.now_ms(), 0.1))
        _wait_told(stage, alert_id, "alert", batch)
        flow.kill()
        flow = stage.flow(Trouble(crash=points[number % len(points)]))
        stage.desk.close(alert_id, "found")
        _expect(flow.wait() == -signal.SIGKILL, f"a flow must kill itself {points[number % len(points)]}", flow)
        torn += 0 < _told(stage, alert_id, "resolved", batch) < TOLD_PHONES
    stage.measured["closings_told_to_some_only"] = torn
    stage.flow()


# ---- checkpoints


def flipped_byte(stage: Stage, size: Size) -> None:
    """One bit of the newest checkpoint of a shard."""
    stage.live()
    for _ in stage.rounds(size.times):
        flow = stage.flow()
        stage.wait_for_checkpoints(2)
        flow.kill()
        damaged = stage.store.finals(stage.chance.choice(stage.shards))[0]
        flip_a_byte(damaged.path, stage.chance)
        flow = stage.flow()
        wait_until(
            lambda flow=flow, path=damaged.path: f"a checkpoint cannot be used: {path}" in flow.said,  # type: ignore[misc]
            "the damage to be noticed",
        )
        flow.stop()
    stage.flow()


def deleted_folder(stage: Stage, size: Size) -> None:
    """All checkpoints gone: with whole logs it starts from them; with trimmed ones it refuses, until they are back."""
    stage.live()
    folder, away = stage.var / "checkpoints", stage.var / "checkpoints.away"
    for _ in stage.rounds(size.times):
        flow = stage.flow(trim_logs=False)
        if stage.trimmed(0) == (0, 0):
            stage.wait_for_checkpoints()
            flow.kill()
            shutil.rmtree(folder)
            flow = stage.flow(trim_logs=False)
        stage.wait_for_checkpoints(2)
        flow.kill()
        flow = stage.flow()  # this one trims
        wait_until(lambda: all(stage.trimmed(shard) > (0, 0) for shard in stage.shards), "logs to be trimmed")
        flow.stop()
        folder.rename(away)
        queues = stage.queues()
        flow = stage.flow()
        _expect(flow.wait() == EXIT_REFUSED, "a flow must refuse a trimmed log without a checkpoint", flow)
        _expect("cannot be started: there is no checkpoint" in flow.said, "the refusal must say why", flow)
        _expect(stage.queues() == queues, "a flow that refuses must write nothing", flow)
        shutil.rmtree(folder, ignore_errors=True)
        away.rename(folder)
    stage.flow()


# ---- processes


def other_process_counts(stage: Stage, size: Size) -> None:
    """1 process, then 2, 4 and 1 again; stopped or killed in between."""
    stage.live()
    splits = [["0-3"], ["0-1", "2-3"], ["0", "1", "2", "3"], ["0-3"]]
    for number in stage.rounds(size.times):
        for step, split in enumerate(splits):
            flows = [stage.flow(shards=shards) for shards in split]
            stage.wait_for_checkpoints()
            for flow in flows:
                if (number + step) % 2:
                    flow.kill()
                else:
                    _expect(flow.stop() == 0, "a flow must end with 0", flow)
    stage.flow()


def two_workers(stage: Stage, size: Size) -> None:
    """The same shards in two processes, by mistake."""
    stage.live()
    flows = [stage.flow(), stage.flow()]
    stage.spend(size.seconds)
    stage.settle()
    for flow in flows:
        _expect(flow.is_alive, "both must go on", flow)


# ---- the server


def _ready_flow(stage: Stage) -> ForkedFlow:
    """A flow that has found its server: one that starts without a server ends, as `tuanyuan run` does."""
    flow = stage.flow()
    wait_until(lambda: "ready" in flow.said, "the flow to be ready")
    return flow


def kill_valkey(stage: Stage, size: Size) -> None:
    """SIGKILL of the server, and a new one on the same file."""
    stage.live()
    flow = _ready_flow(stage)
    for _ in stage.rounds(size.times):
        stage.pause(0.1, 0.6)
        stage.restart_server(lambda: stage.pause(0.0, 0.3))
    stage.settle()
    _expect(flow.is_alive, "the flow must go on by itself", flow)


def truncated_tail(stage: Stage, size: Size) -> None:
    """The server dies and its append-only file has lost its end, somewhere in an entry."""
    stage.live()
    flow = _ready_flow(stage)
    for _ in stage.rounds(size.times):
        stage.pause(0.3, 0.8)
        stage.restart_server(lambda: cut_tail(stage.server.directory, stage.chance.randrange(1, 60_000)))
    stage.settle()
    _expect(flow.is_alive, "the flow must go on by itself", flow)


def lost_replies(stage: Stage, size: Size) -> None:
    """The server has done what it was asked to, and nobody hears of it; or it was asked by half a command."""
    proxy = Proxy(stage.server.url.removeprefix("unix://"), str(stage.folder / "proxy.sock"))
    stage.exits.callback(proxy.close)
    stage.live(url=proxy.url)
    flow = stage.flow(url=proxy.url)
    stage.settle()
    proxy.losing = 0.05
    stage.spend(size.seconds)
    proxy.losing = 0.0
    stage.measured |= {"replies_lost": proxy.replies_lost, "requests_torn": proxy.requests_torn}
    _expect(proxy.replies_lost > 0, "replies must have been lost", flow)
    _expect(flow.is_alive, "the flow must go on by itself", flow)


def partition(stage: Stage, size: Size) -> None:
    """The flow lives in a network of its own, whose wire is cut."""
    network = Network()
    stage.exits.callback(network.close)
    proxy = Proxy(stage.server.url.removeprefix("unix://"), network.address)
    stage.exits.callback(proxy.close)
    stage.live()
    flow = stage.flow(Trouble(network=network.path), url=proxy.url)
    stage.settle()
    for _ in stage.rounds(size.times):
        network.cut()
        done = [stage.done(shard) for shard in stage.shards]
        stage.spend(size.seconds)
        network.mend()
        mended_s = time.monotonic()
        heads = stage.heads()
        _expect(min(heads) > max(done), "senders must have gone on", flow)
        stage.settle()
        stage.measured["caught_up_s"] = round(time.monotonic() - mended_s, 2)
    _expect(flow.is_alive, "the flow must go on by itself", flow)


def out_of_memory(stage: Stage, size: Size) -> None:
    """`maxmemory` is reached: the server takes no writes, then has room again."""
    stage.live()
    flow = stage.flow()
    limit = cast(dict[str, str], stage.client.config_get("maxmemory"))["maxmemory"]
    for _ in stage.rounds(size.times):
        stage.pause(0.2, 0.5)
        stage.client.config_set("maxmemory", 1 << 20)
        stage.spend(size.seconds)
        stage.client.config_set("maxmemory", limit)
        stage.settle()
    stage.measured["refused_batches"] = cast(Any, stage.senders).refused
    _expect(server_number(stage.client, "stats", "evicted_keys") == 0, "nothing may be evicted", flow)
    _expect(cast(Any, stage.senders).refused > 0, "pings must have been refused", flow)
    _expect(flow.is_alive, "the flow must go on by itself", flow)


def full_disk(stage: Stage, size: Size) -> None:
    """Not a byte more fits: the server ends, checkpoints fail; then there is room again."""
    stage.live()
    flow = stage.flow()
    filler = stage.folder / "filler"
    for _ in stage.rounds(size.times):
        stage.pause(0.2, 0.5)
        _fill(filler)
        ended = stage.server
        wait_until(lambda ended=ended: not _runs(ended.pid), "the server to end on a full disk")  # type: ignore[misc]
        stage.pause(0.1, 0.5)
        filler.unlink()
        stage.restart_server()
        stage.settle()
    _expect(flow.is_alive, "the flow must go on by itself", flow)


# ---- partners


def consumer_dies(stage: Stage, size: Size) -> None:
    """A consumer of the group is given pushes and dies before it acknowledges them."""
    stage.live(claim_after_s=0.5)
    stage.flow()
    taken = 0
    for number in stage.rounds(size.times):
        for partner in PARTNERS:
            dying = Consumer(stage.client, partner, stage.settings.shard_count, "soak", f"dying-{number}")
            found: list[Delivery] = []
            while not found:
                # A consumer without a past: others' are too fresh to be claimed, so these are new ones.
                found = dying.read(10, 0.2)
            taken += len(found)
        stage.pause(0.0, 0.2)
    stage.measured["entries_taken_to_the_grave"] = taken


# ---- pings


def burst(stage: Stage, size: Size) -> None:
    """Ten times the pings, half of the time with a flow that stands still and then has to make up for it."""
    stage.live(per_s=20.0, phone_count=500)
    flow = stage.flow(read_ahead_mb=READ_AHEAD_MB)
    stage.spend(size.seconds)
    process = psutil.Process(flow.pid)
    calm_bytes = peak_bytes = process.memory_info().rss
    assert stage.senders is not None
    sent = stage.senders.pings
    stage.senders.per_s *= 10
    for frozen in (True, False):
        os.kill(flow.pid, signal.SIGSTOP if frozen else signal.SIGCONT)
        until_s = time.monotonic() + size.seconds
        while time.monotonic() < until_s:
            peak_bytes = max(peak_bytes, process.memory_info().rss)
            time.sleep(0.02)
    stage.measured["burst_pings_per_s"] = round((stage.senders.pings - sent) / (2 * size.seconds))
    stage.senders.per_s /= 10
    stage.settle()
    peak_bytes = max(peak_bytes, process.memory_info().rss)
    stage.measured["memory_mb_calm"] = calm_bytes >> 20
    stage.measured["memory_mb_peak"] = peak_bytes >> 20
    bound = READ_AHEAD_MB + MEMORY_SPARE_MB
    _expect(peak_bytes - calm_bytes < bound << 20, f"memory must grow by less than {bound} MB", flow)


def duplicate_pings(stage: Stage, size: Size) -> None:
    """Half of the batches come twice."""

    def twice(batch: PingBatch, chance: np.random.Generator) -> list[PingBatch]:
        return [batch] * (1 + int(chance.random() < 0.5))

    stage.live(mangle=twice)
    stage.flow()
    stage.spend(size.seconds)


def shuffled_pings(stage: Stage, size: Size) -> None:
    """Every ping comes up to ten minutes late, in any order."""

    def late(batch: PingBatch, chance: np.random.Generator) -> list[PingBatch]:
        return [replace(batch, observed_at_ms=batch.observed_at_ms - chance.integers(0, 600_000, len(batch)))]

    stage.live(mangle=late)
    stage.flow()
    stage.spend(size.seconds)


def pings_of_other_days(stage: Stage, size: Size) -> None:
    """One in five was observed 24 hours from now, or 24 hours ago."""

    def wrong(batch: PingBatch, chance: np.random.Generator) -> list[PingBatch]:
        days = chance.choice([-1, 0, 0, 0, 0, 0, 0, 0, 0, 1], len(batch))
        return [replace(batch, observed_at_ms=batch.observed_at_ms + days * 24 * HOUR_MS)]

    stage.live(mangle=wrong)
    stage.flow()
    stage.spend(size.seconds)

    def set_aside() -> dict[str, float]:
        return read_stats(stage.client).by_label("pings_refused_total", "reason")

    wait_until(lambda: set_aside().keys() >= {"too_old", "from_the_future"}, "both kinds to be set aside and counted")
    stage.measured |= {f"pings_{reason}": round(count) for reason, count in set_aside().items()}


# ---- clocks


def flow_clock(stage: Stage, size: Size) -> None:
    """The flow's machine jumps two hours ahead, two hours back, and is put right."""
    clock = shared_clock()
    stage.live()
    flow = stage.flow(Trouble(clock_ahead_s=clock))
    for _ in stage.rounds(size.times):
        for ahead_s in (TWO_HOURS_S, -TWO_HOURS_S, 0.0):
            clock.value = ahead_s
            stage.spend(size.seconds)
    _expect(flow.is_alive, "the flow must go on", flow)


def server_clock(stage: Stage, size: Size) -> None:
    """The server's clock jumps two hours ahead and back: as its logs see it, entries two hours from now, and then many
    within one millisecond, for ids never turn back.
    """
    stage.live()
    flow = stage.flow()
    for _ in stage.rounds(size.times):
        stage.spend(size.seconds)
        for shard in stage.shards:
            kind, payload = encode_entry(Tick())
            ahead_ms = max(stage.heads()[shard][0], stage.desk.now_ms()) + round(TWO_HOURS_S * 1000)
            stage.client.xadd(log_key(shard), {kind: payload}, id=f"{ahead_ms}-*")
        stage.spend(size.seconds)
    stage.settle()
    _expect(flow.is_alive, "the flow must go on", flow)


def outage_across_growth(stage: Stage, size: Size) -> None:
    """A flow sees the first minutes of an alert and ends; the next entry of the logs comes two hours later, by their
    own clock. The ring grew at the first hour, when nobody was there.
    """
    begin_ms = stage.desk.now_ms() - round(TWO_HOURS_S * 1000) - 60_000
    for shard in stage.shards:
        kind, payload = encode_entry(stage.settings)
        stage.client.xadd(log_key(shard), {kind: payload}, id=f"{begin_ms}-0")
        stage.client.set(settings_key(shard), payload)
    first_km = DEFAULT_SCHEDULE[0][1]
    near, far = phones(0, 400), phones(1, 400)
    _append_at(stage, begin_ms + 1000, somewhere(near, np.random.default_rng(1), begin_ms + 1000, first_km / 2))
    _append_at(stage, begin_ms + 1000, _north(far, 1.5 * first_km, begin_ms + 1000))
    alert = replace(growing_alert("child", begin_ms + 2000, 0.1), schedule=DEFAULT_SCHEDULE)
    for shard in stage.shards:
        _add(stage, shard, begin_ms + 2000, AlertRevision("publish", alert, (begin_ms + 2000, 0)))
    flow = stage.flow()
    stage.settle()
    _expect(_told(stage, "child", "alert") == 400, "the near ones must be told before the outage", flow)
    _expect(flow.stop() == 0, "a flow must end with 0", flow)
    for shard in stage.shards:
        append_entry(stage.client, shard, Tick())  # two hours later
    flow = stage.flow()
    wait_until(lambda: _told(stage, "child", "alert") == 800, "the far ones to be told")
    for shard in stage.shards:
        append_entry(stage.client, shard, AlertClose("child", None, "found", (begin_ms + 3000, 0)))
    grew_ms = alert.missing_since_ms + HOUR_MS
    late = [push.at_ms for push in _pushes(stage, "child", "alert") if push.ring_km == DEFAULT_SCHEDULE[1][1]]
    _expect(set(late) == {grew_ms}, f"they must be told as of the hour itself, {grew_ms}, got {set(late)}", flow)


# ---- races


def ping_races_alert(stage: Stage, size: Size) -> None:
    """New phones ping in the ring while their alert is published, now the one and now the other a little earlier."""
    stage.live(senders=False, officers=False)
    stage.flow()
    orders = {"ping_first": 0, "alert_first": 0}
    for number in stage.rounds(size.times):
        batch = _inside(phones(number, 40))
        alert = growing_alert(f"race-{number}", stage.desk.now_ms(), 60.0)
        _at_once(partial(_send, stage, batch), partial(stage.desk.publish, alert), _head_start_s(stage, number))
        _wait_told(stage, alert.alert_id, "alert", batch)
        stage.desk.close(alert.alert_id, "found")
        for first in _orders(stage, batch, alert.alert_id):
            orders[first] += 1
    stage.measured |= {f"logs_with_{name}": count for name, count in orders.items()}


def close_races_match(stage: Stage, size: Size) -> None:
    """New phones ping in the ring while the alert is closed: each is told both, or nothing."""
    stage.live(senders=False, officers=False)
    stage.flow()
    told = 0
    for number in stage.rounds(size.times):
        alert = growing_alert(f"race-{number}", stage.desk.now_ms(), 60.0)
        early, late = _inside(phones(2 * number, 40)), _inside(phones(2 * number + 1, 40))
        _send(stage, early)
        stage.desk.publish(alert)
        _wait_told(stage, alert.alert_id, "alert", early)
        close = partial(stage.desk.close, alert.alert_id, "found")
        _at_once(partial(_send, stage, late), close, _head_start_s(stage, number))
        _wait_told(stage, alert.alert_id, "resolved", early)
        stage.settle()
        told += _told(stage, alert.alert_id, "alert", late)
    stage.measured["late_phones_told"] = told
    stage.measured["late_phones"] = 40 * cast(int, stage.measured["rounds"])


# ---- hands


def _expect(holds: bool, what: str, flow: ForkedFlow) -> None:
    if not holds:
        raise RuntimeError(f"{what}; the flow said:\n{flow.said[-2000:]}")


def _send(stage: Stage, batch: PingBatch) -> None:
    writer = LogWriter(link_opener(stage.client), stage.settings)
    writer.append_pings(replace(batch, observed_at_ms=np.full(len(batch), stage.desk.now_ms(), np.int64)))
    writer.close()


def _inside(batch: PingBatch) -> PingBatch:
    """All within half a kilometre of home: in every ring around it."""
    return somewhere(batch, np.random.default_rng(len(batch)), 0, 0.3)


def _north(batch: PingBatch, km: float, observed_at_ms: int) -> PingBatch:
    moved = somewhere(batch, np.random.default_rng(len(batch)), observed_at_ms, 0.3)
    return replace(moved, lat_e7=(moved.lat_e7 + round(km / 111.19508 * 1e7)).astype(np.int32))


def _add(stage: Stage, shard: int, at_ms: int, entry: LogEntry) -> None:
    kind, payload = encode_entry(entry)
    stage.client.xadd(log_key(shard), {kind: payload}, id=f"{at_ms}-*")


def _append_at(stage: Stage, at_ms: int, batch: PingBatch) -> None:
    for shard, part in enumerate(split_by_shard(batch, stage.settings)):
        if part is not None:
            _add(stage, shard, at_ms, part)


def _pushes(stage: Stage, alert_id: str, kind: str) -> list[Any]:
    return [
        push
        for entries in stage.queues().values()
        for _, fields in entries
        for push in (decode_push(payload) for payload in fields.values())
        if (push.alert_id, push.kind) == (alert_id, kind)
    ]


def _told(stage: Stage, alert_id: str, kind: str, batch: PingBatch | None = None) -> int:
    """How many devices were told, of all or of those of a batch."""
    told = {device_id for push in _pushes(stage, alert_id, kind) for device_id in push.device_ids}
    return len(told if batch is None else told & {batch.device_id(row) for row in range(len(batch))})


def _wait_told(stage: Stage, alert_id: str, kind: str, batch: PingBatch) -> None:
    wait_until(
        lambda: _told(stage, alert_id, kind, batch) == len(batch), f"every phone to be told: {kind}", poll_s=0.02
    )


def _head_start_s(stage: Stage, number: int) -> float:
    """For the first of two that race: positive or negative in turn, up to a few milliseconds."""
    return stage.chance.uniform(0.0, 0.012) * (1 if number % 2 else -1)


def _at_once(first: Callable[[], object], second: Callable[[], object], head_start_s: float) -> None:
    """Both in threads of their own; `head_start_s`: of the first, negative: of the second."""
    barrier = threading.Barrier(2)
    problems: list[BaseException] = []

    def racing(act: Callable[[], object], wait_s: float) -> None:
        barrier.wait()
        time.sleep(max(0.0, wait_s))
        try:
            act()
        except BaseException as problem:
            problems.append(problem)

    threads = [
        threading.Thread(target=racing, args=(first, -head_start_s)),
        threading.Thread(target=racing, args=(second, head_start_s)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def _orders(stage: Stage, batch: PingBatch, alert_id: str) -> list[str]:
    """For each shard that has pings of the batch: which stands first in its log."""
    found: list[str] = []
    ids = [batch.device_id(row).encode() for row in range(len(batch))]
    for entries in stage.logs().values():
        kinds = [next(iter(fields.items())) for _, fields in entries]
        published = next(at for at, (kind, raw) in enumerate(kinds) if kind == b"publish" and alert_id.encode() in raw)
        pinged = [at for at, (kind, raw) in enumerate(kinds) if kind == b"pings" and any(one in raw for one in ids)]
        if pinged:
            found.append("ping_first" if pinged[0] < published else "alert_first")
    return found


def _fill(path: Path) -> None:
    """Until the disk is full to the last byte."""
    with path.open("wb", buffering=0) as file:
        block = bytes(1 << 20)
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


def _runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
