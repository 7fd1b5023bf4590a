"""`tuanyuan top`: the operator's figures in a terminal, live; over SSH as well."""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import orjson
import redis
import typer
from rich.console import Group
from rich.live import Live

from flows.log import SettingsMismatch
from tuanyuan.connection import NoServer, ValkeyOption, VarOption, find_server
from tuanyuan.console import EXIT_USAGE, console, fail
from tuanyuan.top_look import Looker
from tuanyuan.top_screen import screen

EPILOG = """
Examples:

    tuanyuan top

    ssh host tuanyuan top --once --valkey redis://valkey:6379

    tuanyuan top --once --json | jq .figures.pings_per_s

q or Ctrl-C ends it. Numbers of phones below 20 are not shown. When the server does not answer, the last numbers stay,
marked as stale, and go on by themselves when it does.
"""

DRAWN_EVERY_S = 0.5
ONCE_S = 2.2
"""Between the two looks of `--once`, which rates are made of: every process has published in between."""
QUIT_KEYS = {"q", "Q", "\x03"}


def top(
    once: Annotated[bool, typer.Option("--once", help="Print once, after two seconds, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="With --once: print one JSON object.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Pings, matches, latencies, lag, queues, memory, alarms and open alerts, live in the terminal."""
    if json and not once:
        fail("--json goes with --once", EXIT_USAGE)
    looker = Looker(lambda: find_server(valkey, var))
    try:
        looker.look()
    except (NoServer, SettingsMismatch) as problem:
        fail(str(problem))
    except redis.RedisError as problem:
        fail(f"the server does not answer: {problem}")
    if once or not console.is_terminal:
        _print_once(looker, json)
        return
    looker.start()
    try:
        with _keys() as is_key, Live(console=console, screen=True, auto_refresh=False, transient=True) as live:
            while True:
                width, height = console.size
                lines = screen(looker.newest, time.monotonic(), width, height)
                live.update(Group(*lines), refresh=True)
                if is_key(DRAWN_EVERY_S):
                    return
    except KeyboardInterrupt:
        return
    finally:
        looker.stop()


def _print_once(looker: Looker, json: bool) -> None:
    time.sleep(ONCE_S)
    try:
        looker.look()
    except (NoServer, SettingsMismatch) as problem:
        fail(str(problem))
    look = looker.newest
    if json:
        sys.stdout.buffer.write(orjson.dumps(look.as_json(), option=orjson.OPT_APPEND_NEWLINE))
        sys.stdout.buffer.flush()
        return
    rows = sum(len(part) for part in (look.alerts, look.figures.figures if look.figures else ()))
    for line in screen(look, time.monotonic(), console.width, 30 + rows):
        console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits for so many seconds, and says whether a key was pressed that ends it."""
    if not sys.stdin.isatty():
        yield _no_key
        return
    import termios  # not everywhere
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def is_key(timeout_s: float) -> bool:
        ready, _, _ = select.select([descriptor], [], [], timeout_s)
        return bool(ready) and os.read(descriptor, 1).decode(errors="replace") in QUIT_KEYS

    try:
        tty.setcbreak(descriptor)
        yield is_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_key(timeout_s: float) -> bool:
    time.sleep(timeout_s)
    return False
