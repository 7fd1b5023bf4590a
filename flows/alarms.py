"""Alarms: what somebody should look at now. Raised where the cause is seen, and cleared there when it is over.

An alarm has a kind (`ALARM_KINDS`: few, and bounded), a source within the process ("shard 3", or nothing), and words
that say what was seen. The kinds are the gauge `alarm{kind}`, 0 or 1; the words travel with each process's snapshot
(`flows.metrics`) and are what `tuanyuan health` prints. Raising and clearing each write one line to the log.
"""

from __future__ import annotations

import logging
import threading
from typing import NamedTuple

logger = logging.getLogger(__name__)

ALARM_KINDS: dict[str, str] = {
    "no_flow": "no flow process publishes; nobody is told of anything until one runs",
    "server_down": "the server does not answer; everything waits, and goes on by itself",
    "supervisor": "the embedded server cannot be started again",
    "disk": "the disk of the embedded server is nearly full; pings are held back",
    "clock_offset": "the server's clock and this process's differ",
    "memory": "the server's memory is filling up; pings are held back so that pushes keep room",
    "unsafe_server": "the server no longer keeps what it acknowledges; nothing is written until it does",
    "pushes_held": "the server refuses pushes; they wait, and go out by themselves",
    "ticks_held": "the clock of a silent shard stands still, so its rings do not grow",
    "log_tail_lost": "a log or its queues lost their end; its shard went on from an older checkpoint",
    "checkpoint_age": "no checkpoint for three intervals; a restart would replay much",
    "raw_pings_kept": "raw pings are kept for longer than promised, or soon will be",
    "figures": "live phones and told devices are not counted: previews and the figures of alerts stand still",
    "queue_unread": "a partner does not read its queue",
    "audit_log": "rows of the audit log were taken away",
    "cases_unswept": "details of children may be kept for longer than promised",
    "alert_moved": "an alert is moved or shrunk again and again: does it look for somebody else than a child?",
}
"""What each kind means."""


class Alarm(NamedTuple):
    """One that is on."""

    kind: str
    source: str
    words: str


class AlarmBoard:
    """The alarms of one process. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._words: dict[tuple[str, str], str] = {}

    def set(self, kind: str, words: str, source: str = "") -> None:
        """Raise an alarm; one that is on already gets these words, without another log line."""
        assert kind in ALARM_KINDS, f"unknown alarm {kind!r}"
        with self._lock:
            is_new = (kind, source) not in self._words
            self._words[kind, source] = words
        if is_new:
            logger.error("alarm %s: %s", _name(kind, source), words)

    def clear(self, kind: str, source: str = "") -> None:
        """It is over. Does nothing if it is not on."""
        with self._lock:
            was_on = self._words.pop((kind, source), None) is not None
        if was_on:
            logger.warning("alarm %s: is over", _name(kind, source))

    def put(self, kind: str, words: str | None, source: str = "") -> None:
        """`set` with words, `clear` with None."""
        if words is None:
            self.clear(kind, source)
        else:
            self.set(kind, words, source)

    def current(self) -> list[Alarm]:
        """Those that are on, by kind and source."""
        with self._lock:
            return sorted(Alarm(kind, source, words) for (kind, source), words in self._words.items())


def _name(kind: str, source: str) -> str:
    return f"{kind} ({source})" if source else kind
