"""What is known of a child beside the alert: words, picture, whose case it is, how it ended; and its erasing.

    case:{desk}:<id>      JSON: Case                     photo:{desk}:<id>     a JPEG of our own making
    cases-open:{desk}     set: ids                       cases-closed:{desk}   sorted set: id -> ms of closing

    open ──close──> closed ──details_days──> erased: division, officer, times stay; child, words, picture, category go

A case is written in the MULTI of the desk event that it belongs to, and never travels through the matcher. The sweeper
closes what the desk knows as closed without us (from the terminal, or by itself 30 days past its expiry), erases what
is due, and raises the alarm of alerts that are moved again and again. Any gateway may sweep, several at once too:
every step is compared and set.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Any, cast

import msgspec
import redis

from flows.clock import CLOCK, Clock
from flows.desk import Desk, DeskAlert
from flows.log import read_settings
from flows.metrics import METRICS, Metrics
from flows.server import raise_if_lost, worth_a_line
from gateway import statistics
from gateway.handover import forget_handed
from geoindex.entries import AUTO_CLOSE_MS, HOUR_MS, Alert
from geoindex.rings import radius_km, unit_vector

logger = logging.getLogger(__name__)

OPEN_KEY = "cases-open:{desk}"
CLOSED_KEY = "cases-closed:{desk}"
DAY_MS = 24 * HOUR_MS
SWEEP_INTERVAL_S = 60.0
FAILURES_ALARM = 10
"""Sweeps that fail in a row before it is an alarm."""

MOVES_MAX = 3
"""So many moves or shrinkings of one alert within an hour are an alarm."""
MOVES_WINDOW_MS = HOUR_MS
EARTH_RADIUS_KM = 6371.0088


class ChildWords(msgspec.Struct, frozen=True, kw_only=True):
    """Who is missing. Empty: not known."""

    name: str = ""
    sex: str = "unknown"
    age: int | None = None
    clothes: str = ""
    features: str = ""


class Words(msgspec.Struct, frozen=True, kw_only=True):
    """What people read of an alert."""

    child: ChildWords = ChildWords()
    headline: str = ""
    place: str = ""
    text: str = ""
    contact: str = ""


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One alert's case. Times in ms since 1970, by the server's clock."""

    alert_id: str
    division: str
    """Six digits."""
    officer: str
    """Who published it, as the audit log names it."""
    status: str
    published_at_ms: int
    words: Words | None
    """None: erased."""
    photo: str | None = None
    """SHA-256 of the picture, hex; None: there is none."""
    moves_ms: tuple[int, ...] = ()
    """When it was moved or shrunk, of the last hour before the newest of them."""
    jump_ms: int | None = None
    """When it was last moved by more than its ring."""
    outcome: str | None = None
    """None: open."""
    category: str | None = None
    """Of the outcome; None: not said, or erased."""
    closed_at_ms: int | None = None
    erased_at_ms: int | None = None

    @property
    def counted(self) -> bool:
        """Whether it stands in the statistics."""
        return self.status == "actual"


def case_key(alert_id: str) -> str:
    """The case of one alert."""
    return f"case:{{desk}}:{alert_id}"


def photo_key(alert_id: str) -> str:
    """The picture of one alert."""
    return f"photo:{{desk}}:{alert_id}"


def read_case(client: redis.Redis, alert_id: str) -> Case | None:
    """None: there is no case, as of an alert that was published at the terminal."""
    return parse_case(cast("bytes | None", client.get(case_key(alert_id))))


def read_cases(client: redis.Redis, alert_ids: list[str]) -> list[Case | None]:
    """Many of them, in order."""
    if not alert_ids:
        return []
    return [parse_case(raw) for raw in cast("list[bytes | None]", client.mget(list(map(case_key, alert_ids))))]


def parse_case(raw: bytes | None) -> Case | None:
    """A case from its bytes."""
    return None if raw is None else msgspec.json.decode(raw, type=Case)


def write_case(pipeline: Any, case: Case) -> None:
    """Queue its writing, and where it belongs."""
    pipeline.set(case_key(case.alert_id), msgspec.json.encode(case))
    if case.closed_at_ms is None:
        pipeline.sadd(OPEN_KEY, case.alert_id)
    else:
        pipeline.srem(OPEN_KEY, case.alert_id)


def write_closed(pipeline: Any, case: Case, outcome: str, category: str | None, closed_at_ms: int) -> None:
    """Queue a case's end, and its place in the statistics."""
    closed = msgspec.structs.replace(case, outcome=outcome, category=category, closed_at_ms=closed_at_ms)
    write_case(pipeline, closed)
    pipeline.zadd(CLOSED_KEY, {case.alert_id: closed_at_ms})
    if case.counted:
        statistics.count_closed(pipeline, closed_at_ms, case.division, outcome, category)


def change_case(
    client: redis.Redis,
    alert_id: str,
    change: Callable[[Case | None, Any], None],
    also_watched: tuple[str, ...] = (),
) -> None:
    """Compare and set: `change` gets the case and queues commands; again when somebody was faster. It may raise."""
    while True:
        with client.pipeline(transaction=True) as pipeline:
            cast(Any, pipeline).watch(case_key(alert_id), *also_watched)
            case = read_case(client, alert_id)
            pipeline.multi()
            change(case, pipeline)
            try:
                pipeline.execute()
            except redis.WatchError as error:
                raise_if_lost(error)
                continue
        return


# --- moving -----------------------------------------------------------------------------------------------------------


def distance_km(first: Alert, second: Alert) -> float:
    """Great-circle distance between two revisions' places, on the sphere of the matching rules."""
    chord = math.dist(unit_vector(first.lat, first.lng), unit_vector(second.lat, second.lng))
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, chord / 2))


def with_move(case: Case, known: Alert, edited: Alert, now_ms: int) -> Case:
    """The case with what an edit does to its ring: a move or a shrinking is noted, growth is not.

    A ring may be corrected. One that wanders, or closes in, looks for something else than people who could help.
    """
    radii_km = [radius_km(alert.schedule, now_ms - alert.missing_since_ms) for alert in (known, edited)]
    moved_km = distance_km(known, edited)
    shrunk = radii_km[1] < radii_km[0] or edited.schedule[-1][1] < known.schedule[-1][1]
    if moved_km == 0 and not shrunk:
        return case
    moves_ms = (*(at_ms for at_ms in case.moves_ms if at_ms > now_ms - MOVES_WINDOW_MS), now_ms)
    jump_ms = now_ms if moved_km > radii_km[0] else case.jump_ms
    return msgspec.structs.replace(case, moves_ms=moves_ms[-2 * MOVES_MAX :], jump_ms=jump_ms)


def move_alarm(case: Case, now_ms: int) -> str | None:
    """What is wrong with an alert's moves within the last hour, in words; None: nothing."""
    moves = sum(at_ms > now_ms - MOVES_WINDOW_MS for at_ms in case.moves_ms)
    if moves >= MOVES_MAX:
        return f"alert {case.alert_id!r} of division {case.division} was moved or shrunk {moves} times within an hour"
    if case.jump_ms is not None and case.jump_ms > now_ms - MOVES_WINDOW_MS:
        return f"alert {case.alert_id!r} of division {case.division} was moved by more than its ring"
    return None


# --- sweeping ---------------------------------------------------------------------------------------------------------


class Sweeper:
    """Closes, erases and alarms, once a minute. `sweep` is one look, at a time of the caller's."""

    def __init__(
        self,
        client: redis.Redis,
        details_days: float,
        metrics: Metrics = METRICS,
        clock: Clock = CLOCK,
        interval_s: float = SWEEP_INTERVAL_S,
    ) -> None:
        self._client = client
        self._desk = Desk(client)
        self._details_ms = round(details_days * DAY_MS)
        self._metrics = metrics
        self._clock = clock
        self._interval_s = interval_s
        self._alarmed: set[str] = set()
        self._words_at_ms = -HOUR_MS
        self._failures = 0
        self._stopping = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="case-sweeper", daemon=True)

    def start(self) -> None:
        """Sweep now, and then once a minute."""
        self._thread.start()

    def stop(self) -> None:
        """End, and wait for it."""
        with self._stopping:
            self._stopped = True
            self._stopping.notify_all()
        if self._thread.is_alive():
            self._thread.join(10)

    def sweep(self, now_ms: int) -> None:
        """One look at all cases that are open or wait to be erased. Raises redis.RedisError."""
        due = cast("list[bytes]", self._client.zrangebyscore(CLOSED_KEY, "-inf", now_ms - self._details_ms))
        for raw in due:
            self._erase(raw.decode(), now_ms)
        if now_ms - self._words_at_ms >= HOUR_MS:
            self._erase_words(now_ms)
            self._words_at_ms = now_ms
        open_ids = sorted(raw.decode() for raw in cast("set[bytes]", self._client.smembers(OPEN_KEY)))
        alarms: set[str] = set()
        for alert_id, case in zip(open_ids, read_cases(self._client, open_ids), strict=True):
            known = self._desk.show(alert_id)
            if case is None or known is None:
                logger.error(
                    "case %r is listed as open, but %s", alert_id, "has no words" if case is None else "no alert"
                )
                continue
            if not known.is_open(now_ms):
                self._close(alert_id, known)
            elif (words := move_alarm(case, now_ms)) is not None:
                alarms.add(alert_id)
                self._metrics.alarms.set("alert_moved", words, alert_id)
        for alert_id in self._alarmed - alarms:
            self._metrics.alarms.clear("alert_moved", alert_id)
        self._alarmed = alarms

    def _close(self, alert_id: str, known: DeskAlert) -> None:
        """Note that an alert ended elsewhere than at this desk: at the terminal, or by itself."""

        def change(case: Case | None, pipeline: Any) -> None:
            if case is not None and case.closed_at_ms is None:
                by_itself = known.outcome is None
                at_ms = known.alert.expires_at_ms + AUTO_CLOSE_MS if by_itself else known.changed_at_ms
                write_closed(pipeline, case, known.outcome or "cancelled", None, at_ms)

        change_case(self._client, alert_id, change)

    def _erase(self, alert_id: str, now_ms: int) -> None:
        def change(case: Case | None, pipeline: Any) -> None:
            if case is not None:
                bare = msgspec.structs.replace(case, words=None, photo=None, category=None, erased_at_ms=now_ms)
                write_case(pipeline, bare)
            pipeline.delete(photo_key(alert_id))
            pipeline.zrem(CLOSED_KEY, alert_id)

        change_case(self._client, alert_id, change)
        settings = read_settings(self._client)
        if settings is not None:
            forget_handed(self._client, settings.shard_count, alert_id, settings.partners)
        self._metrics.count("cases_erased_total")

    def _erase_words(self, now_ms: int) -> None:
        """Words that were given at the terminal stand at the desk itself: they are kept no longer than a case's."""
        for known in self._desk.list():
            ended_ms = known.changed_at_ms if known.outcome else known.alert.expires_at_ms + AUTO_CLOSE_MS
            if known.content and ended_ms <= now_ms - self._details_ms:
                self._desk.forget_words(known.alert.alert_id)

    def look(self) -> None:
        """Sweep now; what fails is tried again in a minute, and is an alarm before long."""
        try:
            self.sweep(self._desk.now_ms())
        except Exception as error:
            # Not the server alone may be in the way: a case that cannot be read must not end the erasing of all others.
            self._failures += 1
            if worth_a_line(self._failures):
                is_known = isinstance(error, redis.RedisError)
                logger.warning("cases cannot be swept (try %d): %s", self._failures, error, exc_info=not is_known)
            if self._failures >= FAILURES_ALARM:
                words = f"cases could not be swept {self._failures} times in a row: {error}"
                self._metrics.alarms.set("cases_unswept", words)
            return
        self._failures = 0
        self._metrics.alarms.clear("cases_unswept")

    def _run(self) -> None:
        while True:
            self.look()
            with self._stopping:
                if not self._stopped:
                    self._clock.wait(self._stopping, self._interval_s)
                if self._stopped:
                    return
