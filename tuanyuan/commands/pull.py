"""`tuanyuan pull PARTNER`: a partner's pushes."""

from __future__ import annotations

import os
import socket
import sys
from typing import Annotated

import orjson
import typer

from flows.consumers import Consumer, Delivery
from flows.log import format_id
from flows.wire import PushEntry
from tuanyuan.connection import ValkeyOption, VarOption, server, settings_of
from tuanyuan.console import EXIT_USAGE, fail, note

EPILOG = """
Examples:

    tuanyuan pull amap                 what waits now: a JSON line an entry, of at most 1,000 devices

    tuanyuan pull amap --follow        and whatever comes, until Ctrl-C

Entries are acknowledged after they have been printed. What a consumer was given and did not acknowledge comes again:
deduplicate on `stream` and `id`. What comes five times in vain goes to the dead letters: tuanyuan dead-letters --help
"""


def pull(
    partner: Annotated[str, typer.Argument(help="The partner's name.")],
    follow: Annotated[bool, typer.Option("--follow", help="Wait for more, until Ctrl-C.")] = False,
    entries_max: Annotated[int | None, typer.Option("--max", min=1, help="Stop after so many entries.")] = None,
    group: Annotated[str, typer.Option(help="Consumer group: who shares the work.")] = "default",
    consumer: Annotated[str | None, typer.Option(help="Name in the group. Default: host and process.")] = None,
    no_ack: Annotated[bool, typer.Option("--no-ack", help="Look without acknowledging.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines: the only form, so this changes nothing.")] = True,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Print a partner's pushes, and acknowledge them."""
    del json
    with server(valkey, var) as client:
        settings = settings_of(client)
        if partner not in settings.partners:
            fail(f"no such partner: {partner!r}; there are {', '.join(settings.partners) or 'none yet'}", EXIT_USAGE)
        name = consumer or f"{socket.gethostname()}-{os.getpid()}"
        try:
            reader = Consumer(client, partner, settings.shard_count, group, name)
        except ValueError as problem:
            fail(str(problem), EXIT_USAGE)
        printed = devices = 0
        held: list[Delivery] = []
        try:
            while entries_max is None or printed < entries_max:
                deliveries = reader.read(100 if entries_max is None else 1, 1.0 if follow else 0)
                if not deliveries and not follow:
                    break
                held += deliveries
                shown = deliveries if entries_max is None else deliveries[: entries_max - printed]
                sys.stdout.buffer.write(b"".join(map(_line, shown)))
                sys.stdout.buffer.flush()
                if not no_ack:
                    reader.acknowledge(shown)
                    held = held[: len(held) - len(deliveries)] + deliveries[len(shown) :]
                printed += len(shown)
                devices += sum(len(delivery.push.device_ids) for delivery in shown)
        except KeyboardInterrupt:
            pass
        except BrokenPipeError:
            # Whoever read has gone.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            # What was not shown, or only looked at, is the next reader's at once.
            reader.give_back(held)
        note(f"{printed:,} entries, {devices:,} devices")


def _line(delivery: Delivery) -> bytes:
    entry = {"stream": delivery.stream, "id": format_id(delivery.entry_id), **push_to_json(delivery.push)}
    return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)


def push_to_json(push: PushEntry) -> dict[str, object]:
    """A push as partners and operators see it."""
    return {
        "alert_id": push.alert_id,
        "revision": push.revision,
        "kind": push.kind,
        "ring_km": push.ring_km,
        "at": push.at_ms,
        "device_ids": push.device_ids,
    }
