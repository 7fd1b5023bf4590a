"""Every setting of a process that changes *how* it runs. What changes outputs lives in the log (`entries.Settings`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flows.server import connect, masked_url

SHARD_COUNT_MAX = 4096
REWRITE_INTERVAL_S = 3600.0
"""Rule 14: raw pings stay in the file for at most the live window + 1 h."""


@dataclass(frozen=True, slots=True)
class FlowConfig:
    """Settings of a flow process. Read once at the entry point: `FlowConfig.read(os.environ, what the options said)`.

    Each can be given as an environment variable, `TUANYUAN_` and its name in capitals; an option wins.
    """

    valkey: str | None = None
    """The server's url; None: the embedded one, under `var`."""
    var: Path = Path("var")
    """Embedded server's data, checkpoints."""
    shards: str | None = None
    """The shards of this process, say "0-3,7"; None: all."""
    unsafe_server: bool = False
    """Go on with a server that may lose what it acknowledged. Said in every log and metric."""
    valkey_port: int = 0
    """Of the embedded server, on 127.0.0.1; 0: a free one."""
    memory_mb: int = 0
    """Limit of the embedded server's memory; 0: half of the machine's."""
    in_flight_max: int = 64
    """Entries of one shard inside the flow: enough to keep it busy, few enough to stay in the cache."""
    read_ahead_mb: int = 256
    """Entries read and not pushed yet, over all shards of the process."""
    reader_links: int = 8
    """Links that read the logs, at most one a shard. The server writes no more to a link than an entry, and what a
    socket buffer holds (208 KB), between two of its fsyncs: *measured*, 90 MB/s by one link, 160 by four."""
    checkpoint_interval_s: float = 60.0
    """Between two checkpoints of a shard; 0: none. A restart replays so much log, and twice as much is kept."""
    trim_logs: bool = True
    """Trim logs behind checkpoints. Without that they keep all, for audits, and raw pings for longer than promised."""
    keep_pushes: bool = False
    """Keep acknowledged pushes in the queues, for audits of all that was ever told. Without that they stay for as long
    as the log entries that caused them: what an audit can recompute it also finds."""
    queue_unread_alarm_s: float = 300.0
    """A push that a partner has not acknowledged for so long is an alarm."""
    rewrite_aof_interval_s: float | None = None
    """How often the server is asked to rewrite its append-only file, which else keeps raw pings that were trimmed; 0:
    never. None: hourly for the embedded server, never for another, whose owner may have other plans."""
    idle_wait_ms: int = 50
    """How long a source partition may wait when there is nothing to do; 5 in a Bytewax cluster, whose other processes
    send this worker items meanwhile."""

    figures: bool = True
    """Count live phones and told devices, and publish them for the gateway (`flows.figures`)."""

    def __post_init__(self) -> None:
        if self.valkey is not None:
            connect(self.valkey).close()  # opens no connection: only the url is looked at
        if self.shards is not None:
            parse_shards(self.shards, SHARD_COUNT_MAX)
        for name, value, least, most in (
            ("valkey_port", self.valkey_port, 0, 65_535),
            ("memory_mb", self.memory_mb, 0, 1 << 24),
            ("in_flight_max", self.in_flight_max, 1, 1 << 16),
            ("read_ahead_mb", self.read_ahead_mb, 1, 1 << 20),
            ("reader_links", self.reader_links, 1, 64),
            ("checkpoint_interval_s", self.checkpoint_interval_s, 0, 1_200),
            ("queue_unread_alarm_s", self.queue_unread_alarm_s, 1, 7 * 86_400),
            ("rewrite_aof_interval_s", self.rewrite_interval_s, 0, 86_400),
            ("idle_wait_ms", self.idle_wait_ms, 0, 1_000),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        if self.valkey is not None and (self.valkey_port or self.memory_mb):
            raise ValueError("valkey_port and memory_mb are for the embedded server; they cannot go with valkey")

    def __repr__(self) -> str:
        """Fit for a log line: without the password."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.valkey is not None:
            shown["valkey"] = masked_url(self.valkey)
        return f"FlowConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def rewrite_interval_s(self) -> float:
        """`rewrite_aof_interval_s`, or what it stands for."""
        if self.rewrite_aof_interval_s is not None:
            return self.rewrite_aof_interval_s
        return REWRITE_INTERVAL_S if self.valkey is None else 0.0

    @property
    def embedded_directory(self) -> Path:
        return self.var / "valkey"

    @property
    def checkpoint_directory(self) -> Path:
        return self.var / "checkpoints"

    def shard_list(self, shard_count: int) -> list[int]:
        """The shards of this process, ascending. Raises ValueError if one is not below `shard_count`."""
        return list(range(shard_count)) if self.shards is None else parse_shards(self.shards, shard_count)

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, **options: Any) -> FlowConfig:
        """From the environment and from options; an option that is None was not given.

        Raises ValueError naming the variable, what it must be and what it was.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            name = f"TUANYUAN_{field.name.upper()}"
            text = environment.get(name)
            if text:
                try:
                    values[field.name] = _PARSERS.get(field.name, str)(text)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        values.update((name, value) for name, value in options.items() if value is not None)
        return cls(**values)


def parse_shards(text: str, shard_count: int) -> list[int]:
    """Ranges like "0-3,7" -> [0, 1, 2, 3, 7], ascending. Raises ValueError."""
    shards: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isascii() and first.isdigit()) or (dash and not (last.isascii() and last.isdigit())):
            raise ValueError(f"shards must be numbers and ranges like 0-3,7, got {text!r}")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"a range of shards must rise, got {part.strip()!r}")
        if high >= shard_count:
            raise ValueError(f"shards must be below {shard_count}, got {part.strip()!r}")
        found = set(range(low, high + 1))
        if shards & found:
            raise ValueError(f"shards must be named once, got {text!r}")
        shards |= found
    return sorted(shards)


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"must be yes or no, got {text!r}")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"must be a whole number, got {text!r}") from None


_PARSERS: dict[str, Any] = {
    "var": Path,
    "unsafe_server": _flag,
    "valkey_port": _whole,
    "memory_mb": _whole,
    "in_flight_max": _whole,
    "read_ahead_mb": _whole,
    "reader_links": _whole,
    "checkpoint_interval_s": float,
    "trim_logs": _flag,
    "keep_pushes": _flag,
    "queue_unread_alarm_s": float,
    "rewrite_aof_interval_s": float,
    "idle_wait_ms": _whole,
    "figures": _flag,
}
