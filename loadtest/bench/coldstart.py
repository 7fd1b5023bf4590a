"""From starting `tuanyuan run` to the first ping matched, kernels compiled before and the embedded server included."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np

from flows.desk import Desk, Relay
from flows.embedded import EmbeddedServer
from flows.log import LogWriter, ensure_settings, push_key
from flows.server import connect, link_opener
from flows.wire import decode_push
from geoindex.entries import DEFAULT_EXPIRY_MS, DEFAULT_SCHEDULE, Alert
from loadtest.bench.live import SHARD_COUNT, Told
from loadtest.bench.report import Report, Say
from loadtest.bench.traffic import Traffic, squeezed

PLACE = "Chengdu"
PHONES = 100
TIMEOUT_S = 60.0


def measure(repeats: int, say: Say) -> Report:
    """Each repeat on fresh data: logs with an alert and phones in its ring wait on disk."""
    report = Report("coldstart")
    seconds: list[float] = []
    for repeat in range(repeats + 1):
        elapsed_s, told = _start()
        if repeat:
            seconds.append(elapsed_s)
            say(f"{elapsed_s:.2f} s")
        report.expect("first push", True, told[0] == "bench" and told[2] in _ids())
    report.values = {
        "seconds": float(np.median(seconds)),
        "seconds_of_repeats": [round(value, 3) for value in seconds],
        "shards": SHARD_COUNT,
        "devices": PHONES,
        "repeats": repeats,
    }
    report.notes.append(
        "A new process, `tuanyuan run --var`, which starts the embedded server on its data, checks the kernels' "
        "cache, and reads the logs; until the first push of a ping can be read from a queue. One run before, not "
        "counted, fills caches."
    )
    return report


def _traffic() -> Traffic:
    return Traffic(PHONES)


def _ids() -> set[str]:
    (sent,) = _traffic().first_sight(0)
    return {sent.pings.device_id(row) for row in range(len(sent.pings))}


def _start() -> tuple[float, Told]:
    """Prepare logs, stop the server, start the program; seconds until its first push, and who was told."""
    traffic = _traffic()
    with tempfile.TemporaryDirectory(prefix="tuanyuan-bench-") as folder:
        directory = Path(folder) / "valkey"
        with EmbeddedServer.start(directory, port=None) as server:
            _prepare(server, traffic)
        log_path = Path(folder) / "run.log"
        with log_path.open("wb") as log:
            started_s = time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "tuanyuan.cli", "run", "--var", folder, "--quiet"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        try:
            told = _first_push(directory, traffic, process, log_path)
            return time.monotonic() - started_s, told
        finally:
            process.terminate()
            process.wait(30)


def _prepare(server: EmbeddedServer, traffic: Traffic) -> None:
    """The alert first, then the phones: it is a ping that is matched."""
    place = traffic.world.place(PLACE)
    client = connect(server.url)
    settings = ensure_settings(client, traffic.settings(SHARD_COUNT))
    desk = Desk(client)
    now_ms = desk.now_ms()
    desk.publish(Alert("bench", 1, place.lat, place.lng, now_ms, DEFAULT_SCHEDULE, now_ms + DEFAULT_EXPIRY_MS))
    Relay(client).copy_pending()
    writer = LogWriter(link_opener(client), settings)
    for sent in traffic.first_sight(now_ms):
        writer.append_pings(squeezed(sent.pings, place.lat, place.lng))
    writer.close()
    client.close()


def _first_push(directory: Path, traffic: Traffic, process: subprocess.Popen[bytes], log_path: Path) -> Told:
    deadline_s = time.monotonic() + TIMEOUT_S
    server = None
    while server is None:
        server = EmbeddedServer.find(directory)
        _check(process, log_path, deadline_s)
        time.sleep(0.005)
    client = connect(server.url)
    keys = {
        push_key(shard, partner): partner for shard in range(SHARD_COUNT) for partner in traffic.world.partner_names
    }
    try:
        while True:
            found = cast(Any, client.xread(cast(Any, dict.fromkeys(keys, "0-0")), count=1, block=100))
            for key, entries in found or []:
                for _, fields in entries:
                    for payload in fields.values():
                        push = decode_push(payload)
                        return push.alert_id, keys[key.decode()], push.device_ids[0]
            _check(process, log_path, deadline_s)
    finally:
        client.close()


def _check(process: subprocess.Popen[bytes], log_path: Path, deadline_s: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline_s:
        raise RuntimeError(f"`tuanyuan run` has not matched a ping:\n{log_path.read_text(errors='replace')[-3000:]}")
