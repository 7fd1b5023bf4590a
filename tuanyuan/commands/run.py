"""`tuanyuan run`: the live flow."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import threading
import time
from types import FrameType
from typing import Annotated

import redis
import typer

from flows.checkpointer import LogTooShort
from flows.embedded import EmbeddedServer
from flows.live import LiveFlow, open_flow
from flows.log import SettingsMismatch
from flows.malloc import keep_freed_memory
from flows.metrics import METRICS
from flows.server import ServerRefused, connect, masked_url
from flows.supervisor import Supervisor
from geoindex.entries import Settings
from geoindex.shard import SettingsRefused
from tuanyuan.connection import ValkeyOption, VarOption, read_config
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, duration_ms, fail, note

STATUS_S = 10.0

EPILOG = """
Examples:

    tuanyuan run                                    with the embedded server, its data under ./var

    tuanyuan run --valkey redis://10.0.0.5:6379 --shards 0-3

The first run on a server without logs decides what never changes: --shard-count. Ctrl-C or SIGTERM ends cleanly.
"""


def run(
    valkey: ValkeyOption = None,
    var: VarOption = None,
    shards: Annotated[str | None, typer.Option(help="Shards of this process, as 0-3,7. Default: all.")] = None,
    shard_count: Annotated[int, typer.Option(min=1, max=4096, help="Only for a server without logs.")] = 8,
    partner: Annotated[list[str] | None, typer.Option(help="Likewise; may be repeated.")] = None,
    live_window: Annotated[str, typer.Option(help="Likewise: how long a location stays live.")] = "6h",
    unsafe_server: Annotated[
        bool | None, typer.Option("--unsafe-server", help="Go on with a server that may lose what it acknowledged.")
    ] = None,
    valkey_port: Annotated[
        int | None, typer.Option(help="TCP port of the embedded server on 127.0.0.1. Default: a free one.")
    ] = None,
    checkpoint_interval: Annotated[
        float | None, typer.Option(help="Seconds between two checkpoints of a shard; 0: none. Default: 60.")
    ] = None,
    keep_pushes: Annotated[
        bool | None,
        typer.Option("--keep-pushes", help="Keep acknowledged pushes, for audits: the queues only grow."),
    ] = None,
    rewrite_aof_interval: Annotated[
        float | None,
        typer.Option(help="Seconds between two rewrites of the server's file; 0: never. Default: 3600 if embedded."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No status lines.")] = False,
) -> None:
    """Run the live flow: read the shard logs, match, write the push queues."""
    logging.getLogger().setLevel(logging.INFO)
    config = read_config(
        valkey=valkey,
        var=var,
        shards=shards,
        unsafe_server=unsafe_server,
        valkey_port=valkey_port,
        checkpoint_interval_s=checkpoint_interval,
        keep_pushes=keep_pushes,
        rewrite_aof_interval_s=rewrite_aof_interval,
    )
    for name in partner or ():
        if (partner or []).count(name) > 1:
            fail(f"--partner {name!r} is named twice", EXIT_USAGE)
    first_settings = Settings(
        shard_count=shard_count, partners=tuple(partner or ()), live_window_ms=duration_ms(live_window)
    )
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if config.valkey is None:
            try:
                embedded = EmbeddedServer.start(
                    config.embedded_directory,
                    config.valkey_port,
                    config.memory_mb << 20 or None,
                    note,
                )
            except (RuntimeError, OSError) as problem:
                fail(f"the embedded server does not start: {problem}")
            stack.callback(embedded.close)
            supervisor = Supervisor(embedded, on_wait=note)
            supervisor.start()
            stack.callback(supervisor.stop)
            url, shown = embedded.url, f"{embedded.tcp_url} (embedded, data in {config.embedded_directory})"
        else:
            url, shown = config.valkey, masked_url(config.valkey)
        client = connect(url)
        stack.callback(client.close)
        try:
            flow = open_flow(config, client, first_settings)
        except (ServerRefused, SettingsMismatch) as refusal:
            fail(str(refusal), EXIT_REFUSED)
        except ValueError as problem:
            fail(str(problem), EXIT_USAGE)
        except redis.RedisError as problem:
            fail(f"no answer from {shown}: {problem}")
        _run(flow, shown, quiet)


def _run(flow: LiveFlow, shown: str, quiet: bool) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        note("stopping: what is in the flow still goes out ...")
        flow.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    ended = threading.Event()

    def ready() -> None:
        # What is there by now stays: to look through it all for garbage took 70 ms, and 319 ms were seen, with the
        # interpreter's lock held.
        gc.freeze()
        note(f"server: {shown}")
        note(f"shards: {flow.settings.shard_count}; partners: {', '.join(flow.settings.partners) or 'none yet'}")
        note("ready; Ctrl-C stops")
        if not quiet:
            threading.Thread(target=_status, args=(ended,), name="status", daemon=True).start()

    try:
        flow.run(ready)
    except (SettingsRefused, LogTooShort) as refusal:
        fail(str(refusal), EXIT_REFUSED)
    finally:
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)
    note("stopped cleanly")


def _status(ended: threading.Event) -> None:
    """A line every ten seconds in which something happened."""
    last_pings, last_s = 0.0, time.monotonic()
    while not ended.wait(STATUS_S):
        pings, now_s = METRICS.total("pings_accepted_total"), time.monotonic()
        numbers = METRICS.snapshot()
        live = sum(value for name, _, value in numbers["gauges"] if name == "devices_live")
        pushes = sum(value for name, _, value in numbers["counters"] if name == "pushes_total")
        lag_ms = max((value for name, _, value in numbers["gauges"] if name == "lag_ms"), default=0)
        if pings != last_pings:
            note(
                f"{(pings - last_pings) / (now_s - last_s):,.0f} pings/s; {live:,.0f} phones live; "
                f"{pushes:,.0f} pushes; lag {lag_ms:,.0f} ms"
            )
        last_pings, last_s = pings, now_s
