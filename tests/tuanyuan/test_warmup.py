"""What is compiled before it is needed: a flow must not meet its first phone in a ring with a compiler at work."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from dataclasses import replace
import numpy as np
from tuanyuan.warmup import run_every_kernel

run_every_kernel()

from flows.log import RawEntry
from flows.match import decode, step
from flows.push_commands import PushCommands
from flows.wire import encode_entry
from geoindex.entries import DEFAULT_SCHEDULE, HOUR_MS, Alert, AlertRevision, Settings
from geoindex.shard import ShardMachine
from loadtest.world import World


def kernels():
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(("geoindex.", "flows."))]
    found = {
        f"{module.__name__}.{name}": value
        for module in modules
        for name, value in vars(module).items()
        if hasattr(value, "signatures")
    }
    return {name: len(kernel.signatures) for name, kernel in found.items()}


before = kernels()
now_ms = 1_700_000_000_000
world = World(7, 2_000)
place = world.densest_place()
alert = Alert("a", 1, place.lat, place.lng, now_ms, DEFAULT_SCHEDULE, now_ms + 72 * HOUR_MS)
batch = world.batch(1_000, now_ms)
lat_e7 = batch.lat_e7.copy()
lat_e7[3] = 950_000_000
machine = ShardMachine()
told = 0
settings = Settings(shard_count=1, partners=world.partner_names)
entries = [settings, AlertRevision("publish", alert, (1, 0)), batch, replace(world.batch(1_000, now_ms), lat_e7=lat_e7)]
for sequence, entry in enumerate(entries):
    kind, payload = encode_entry(entry)
    caused = step(machine, decode(RawEntry(0, now_ms, sequence, kind, payload, "")))
    told += len(caused.pushes.segments)
    numbers = np.zeros(len(caused.partners), np.int64)
    PushCommands(0).add((now_ms, sequence), caused.pushes.segments, caused.partners, numbers)
assert told, "nobody was in the ring: nothing was shown"
print({name: count for name, count in kernels().items() if count != before[name]})
"""


def test_phones_that_meet_a_ring_by_their_pings_and_bad_rows_compile_nothing_new() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "{}"
