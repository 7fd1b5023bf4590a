"""`tuanyuan send`: pings to the shard logs, from a file or from a seeded world."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import orjson
import redis
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flows.guards import RETRY_AFTER_S, AppendsRefused, Guards
from flows.log import LogWriter, add_partner, partner_name_problem
from flows.metrics import Metrics
from flows.recording import PingReader, RecordedPings, UnreadableFile
from flows.server import link_opener
from geoindex.columns import PingBatch
from geoindex.entries import Settings
from loadtest.world import World
from tuanyuan.connection import ValkeyOption, VarOption, server, settings_of
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, console, fail, note, notes

BATCH_PINGS = 65_536
GONE_S = 60.0
"""A server that is started again is back by then."""
BATCHES_PER_S_MIN = 20
"""Of a world that sends at a rate: its pings come in at most 50 ms steps."""

EPILOG = """
Examples:

    tuanyuan send pings.csv.gz                              device_id,lat,lng,observed_at[,partner]

    tuanyuan send --world 1000000 --rate 200000 --seconds 60

Times in a file are taken as they are: the live flow sets aside what is older than its live window.
"""


def send(
    file: Annotated[Path | None, typer.Argument(help="CSV of pings, gzip if .gz.")] = None,
    world: Annotated[
        int | None, typer.Option(min=1, help="Instead of a file: a seeded world of so many phones.")
    ] = None,
    rate: Annotated[int, typer.Option(min=1, help="Pings a second of the world.")] = 100_000,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="How long the world pings. Default: until Ctrl-C.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the world.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object of counts at the end.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 3 if a row was set aside.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Append location pings to the shard logs."""
    if (file is None) == (world is None):
        fail("name either a FILE or --world, not both and not neither", EXIT_USAGE)
    with server(valkey, var) as client:
        settings = settings_of(client)
        if file is not None:
            set_aside = _send_file(file, client, settings, json)
            if strict and set_aside:
                raise typer.Exit(EXIT_REFUSED)
        else:
            assert world is not None
            try:
                made = World(seed, world)
            except ValueError as problem:
                fail(f"--world: {problem}", EXIT_USAGE)
            _send_world(made, client, rate, seconds, json)


class PatientWriter:
    """Appends pings, and waits for as long as the server wants none: says so once, and goes on by itself."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._guards = Guards(client, unsafe=True, metrics=Metrics())
        self._guards.start()
        self._writer = LogWriter(link_opener(client, unsafe=True), settings, self._guards.check_pings)

    @property
    def settings(self) -> Settings:
        return self._writer.settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._writer.settings = settings

    def append_pings(self, batch: PingBatch) -> None:
        """Raises redis.RedisError if the server is gone for longer than GONE_S."""
        waits_for: str | None = None
        gone_at_s = time.monotonic() + GONE_S
        while True:
            try:
                self._writer.append_pings(batch)
            except (AppendsRefused, redis.OutOfMemoryError) as refusal:
                reason = str(refusal)
                gone_at_s = time.monotonic() + GONE_S
            except (redis.ConnectionError, redis.TimeoutError) as problem:
                if time.monotonic() > gone_at_s:
                    raise
                reason = f"the server does not answer: {problem}"
            else:
                if waits_for is not None:
                    note("goes on")
                return
            if waits_for is None:
                note(f"waits: {reason}")
            waits_for = reason
            time.sleep(RETRY_AFTER_S)

    def close(self) -> None:
        self._writer.close()
        self._guards.stop()


def _send_file(file: Path, client: redis.Redis, settings: Settings, json: bool) -> dict[str, int]:
    if not file.is_file():
        fail(f"no such file: {file}", EXIT_USAGE)
    reader = PingReader(file, BATCH_PINGS)
    sent = 0
    writer = PatientWriter(client, settings)
    try:
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=notes, transient=True
        ) as progress:
            task = progress.add_task(file.name, total=max(1, reader.size_bytes))
            for chunk in reader.chunks():
                pings = _with_usable_partners(chunk, reader)
                new = set(pings.partners) - set(writer.settings.partners)
                if new:
                    writer.settings = add_partner(client, sorted(new))
                partner_index = {name: index for index, name in enumerate(writer.settings.partners)}
                writer.append_pings(pings.batch(slice(None), partner_index))
                sent += len(pings)
                progress.update(task, completed=reader.bytes_read)
    except (UnreadableFile, ValueError) as problem:
        fail(f"{problem} ({sent:,} pings were sent before)", EXIT_USAGE)
    finally:
        writer.close()
    for words in reader.set_aside.examples:
        note(words)
    _report(sent, reader.set_aside.counts, json)
    return reader.set_aside.counts


def _with_usable_partners(pings: RecordedPings, reader: PingReader) -> RecordedPings:
    """Without the rows whose partner cannot be part of a key: they are set aside."""
    unusable = {name for name in set(pings.partners) if partner_name_problem(name)}
    if not unusable:
        return pings
    for line, name in zip(pings.lines, pings.partners, strict=True):
        if name in unusable:
            reader.set_aside.add("partner", f"{reader.path}:{line}", f"partner: {partner_name_problem(name)}")
    return pings.keep(np.array([name not in unusable for name in pings.partners], np.bool_))


def _send_world(world: World, client: redis.Redis, rate: int, seconds: float | None, json: bool) -> None:
    writer = PatientWriter(client, add_partner(client, world.partner_names))
    sent = 0
    try:
        with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=notes, transient=True) as progress:
            task = progress.add_task("sending", total=None)
            for batch in _paced(world, rate, seconds):
                writer.append_pings(with_partners(batch, world, writer.settings))
                sent += len(batch)
                progress.update(task, description=f"{sent:,} pings sent")
    except KeyboardInterrupt:
        pass  # the usual end of an endless world
    finally:
        writer.close()
    _report(sent, {}, json)


def _paced(world: World, rate: int, seconds: float | None) -> Iterator[PingBatch]:
    """Batches of the world by the wall clock: as many pings by now as the rate says, late ones made up for."""
    started_s = time.monotonic()
    given = 0
    step = max(1, min(BATCH_PINGS, rate // BATCHES_PER_S_MIN))
    total = None if seconds is None else round(rate * seconds)
    while total is None or given < total:
        due = int((time.monotonic() - started_s) * rate)
        if due - given < step and (total is None or given + step <= total):
            time.sleep((given + step - due) / rate)
        count = step if total is None else min(step, total - given)
        yield world.batch(count, round(time.time() * 1000))
        given += count


def with_partners(batch: PingBatch, world: World, settings: Settings) -> PingBatch:
    """A world's batch with the partner indices of the log's settings."""
    index = np.array([settings.partners.index(name) for name in world.partner_names], np.uint16)
    return PingBatch(
        index[batch.partner], batch.id_bytes, batch.id_end, batch.lat_e7, batch.lng_e7, batch.observed_at_ms
    )


def _report(sent: int, set_aside: dict[str, int], json: bool) -> None:
    if json:
        console.print_json(orjson.dumps({"pings_sent": sent, "pings_set_aside": set_aside}).decode())
    words = ", ".join(f"{reason} {count:,}" for reason, count in sorted(set_aside.items())) or "none"
    note(f"pings: {sent:,} sent; set aside: {words}")
