"""What a shard log holds, decoded: the only things that can change a shard.

    settings     first entry of every log; later ones change it from there on
    pings        `columns.PingBatch`
    publish      `AlertRevision` (event "publish")
    update       `AlertRevision` (event "update")
    close        `AlertClose`
    tick         `Tick`: nothing but the entry's own time

Times are integers in milliseconds since 1970 (UTC). Locations are WGS-84 degrees.
"""

from __future__ import annotations

from dataclasses import dataclass

from geoindex.columns import PingBatch

HOUR_MS = 3_600_000

FORMAT_VERSION = 1
"""Version of the bytes in log and queues."""
EMISSION_VERSION = 1
"""Version of *what is pushed, and in which order*. Raise it with every change of either."""
HASH_NAME = "mum128"
"""Name of `geoindex.kernels.hash_id`, the function behind shards and the device table."""

Schedule = tuple[tuple[float | None, float], ...]
"""Steps (hours since missing, radius in km): a radius holds until its hours have passed; the last hours is None."""

DEFAULT_SCHEDULE: Schedule = ((1.0, 100.0), (2.0, 200.0), (3.0, 300.0), (None, 500.0))
DEFAULT_EXPIRY_MS = 72 * HOUR_MS
"""After `missing_since`."""
AUTO_CLOSE_MS = 30 * 24 * HOUR_MS
"""After `expires_at`."""
RING_KM_MAX = 1000.0

STATUSES = ("actual", "exercise")
OUTCOMES = ("found", "false_report", "cancelled")
KINDS = ("alert", "update", "resolved")


@dataclass(frozen=True, slots=True)
class Settings:
    """What changes outputs: lives in the log and nowhere else."""

    shard_count: int = 8
    partners: tuple[str, ...] = ()
    live_window_ms: int = 6 * HOUR_MS
    future_tolerance_ms: int = 5 * 60_000
    push_ids_max: int = 1000
    default_schedule: Schedule = DEFAULT_SCHEDULE
    hash_name: str = HASH_NAME
    hash_key: int = 0
    """Secret of the deployment (u64), so that nobody can craft ids that collide."""
    format_version: int = FORMAT_VERSION
    emission_version: int = EMISSION_VERSION


@dataclass(frozen=True, slots=True)
class Alert:
    """One revision of an alert, complete: what it does not say is not inherited from the revision before."""

    alert_id: str
    revision: int
    lat: float
    lng: float
    missing_since_ms: int
    schedule: Schedule
    expires_at_ms: int
    status: str = "actual"
    audience: tuple[str, ...] | None = None
    """Partner names; None: all partners."""


@dataclass(frozen=True, slots=True)
class AlertRevision:
    """A publish or an edit. `desk_id`: the event's id (ms, seq) in the desk stream."""

    event: str
    alert: Alert
    desk_id: tuple[int, int]


@dataclass(frozen=True, slots=True)
class AlertClose:
    """The end of an alert. `revision` None: whatever the known revision is."""

    alert_id: str
    revision: int | None
    outcome: str
    desk_id: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed and nothing happened."""


LogEntry = Settings | PingBatch | AlertRevision | AlertClose | Tick
