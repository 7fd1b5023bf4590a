"""Rules 7 to 10, 12, 13 and 15: what becomes of an alert and of those who were told."""

from __future__ import annotations

from dataclasses import replace

from tests.reference.examples.builders import (
    DAY,
    FAR,
    HOME_LAT,
    HOUR,
    KM_55,
    KM_99,
    KM_101,
    KM_199,
    MINUTE,
    SECOND,
    SETTINGS,
    T0,
    close,
    example,
    ping,
    publish,
    tick,
    told,
    update,
)

EXPIRES = T0 + 72 * HOUR
"""Of an alert missing since T0."""
NORTH_LAT = FAR
"""Where an alert moves to, out of reach of HOME."""

EXAMPLES = [
    # ---- rule 7
    example(
        7,
        "a device is told once however often it pings, leaves and comes back, and though the ring grows",
        [
            publish(T0),
            ping(T0 + 1, "phone", KM_55),
            ping(T0 + 1, "phone", KM_55),
            ping(T0 + SECOND, "phone", FAR),
            ping(T0 + MINUTE, "phone", KM_99),
            ping(T0 + 4 * HOUR, "phone", KM_199),
        ],
        [told(T0 + 1, "alert", "phone", 100)],
    ),
    example(
        7,
        "two alerts tell a device twice",
        [publish(T0, alert_id="a1"), publish(T0, alert_id="a2", lat=KM_101), ping(T0 + 1, "phone", KM_55)],
        [told(T0 + 1, "alert", "phone", 100, alert_id="a1"), told(T0 + 1, "alert", "phone", 100, alert_id="a2")],
    ),
    example(
        7,
        "one phone known to two partners is two devices",
        [
            publish(T0),
            ping(T0 + 1, "phone", KM_55, partner="amap"),
            ping(T0 + 1, "phone", FAR, partner="baidu"),
            ping(T0 + 2, "phone", KM_55, partner="baidu"),
        ],
        [told(T0 + 1, "alert", "phone", 100), told(T0 + 2, "alert", "phone", 100, partner="baidu")],
    ),
    # ---- rule 8
    example(
        8,
        "an edit updates those told and alerts those newly inside",
        [
            ping(T0, "near", KM_55),
            ping(T0, "next", KM_101),
            publish(T0 + 1),
            update(T0 + MINUTE, schedule=((None, 150.0),)),
        ],
        [
            told(T0 + 1, "alert", "near", 100),
            told(T0 + MINUTE, "update", "near", 150, revision=2),
            told(T0 + MINUTE, "alert", "next", 150, revision=2),
        ],
    ),
    example(
        8,
        "those told stay told when the ring moves away",
        [
            ping(T0, "south", KM_55),
            ping(T0, "north", NORTH_LAT),
            publish(T0 + 1),
            update(T0 + 2, lat=NORTH_LAT),
            update(T0 + 3, 3, lat=HOME_LAT),
            close(T0 + 4),
        ],
        [
            told(T0 + 1, "alert", "south", 100),
            told(T0 + 2, "update", "south", 100, revision=2),
            told(T0 + 2, "alert", "north", 100, revision=2),
            told(T0 + 3, "update", "south", 100, revision=3),
            told(T0 + 3, "update", "north", 100, revision=3),
            told(T0 + 4, "resolved", "south", 100, revision=3),
            told(T0 + 4, "resolved", "north", 100, revision=3),
        ],
    ),
    example(
        8,
        "those told stay told when the audience is narrowed",
        [
            ping(T0, "a", KM_55),
            ping(T0, "b", KM_55, partner="baidu"),
            publish(T0),
            update(T0 + 1, audience=("amap",)),
            ping(T0 + 2, "a2", KM_55),
            ping(T0 + 2, "b2", KM_55, partner="baidu"),
            close(T0 + 3),
        ],
        [
            told(T0, "alert", "a", 100),
            told(T0, "alert", "b", 100, partner="baidu"),
            told(T0 + 1, "update", "a", 100, revision=2),
            told(T0 + 1, "update", "b", 100, revision=2, partner="baidu"),
            told(T0 + 2, "alert", "a2", 100, revision=2),
            told(T0 + 3, "resolved", "a", 100, revision=2),
            told(T0 + 3, "resolved", "b", 100, revision=2, partner="baidu"),
            told(T0 + 3, "resolved", "a2", 100, revision=2),
        ],
    ),
    example(
        8,
        "a widened audience alerts the partner that was left out",
        [
            ping(T0, "b", KM_55, partner="baidu"),
            publish(T0, audience=("amap",)),
            update(T0 + 1, audience=("amap", "baidu")),
            update(T0 + 2, 3),
        ],
        [
            told(T0 + 1, "alert", "b", 100, revision=2, partner="baidu"),
            told(T0 + 2, "update", "b", 100, revision=3, partner="baidu"),
        ],
    ),
    example(
        8,
        "an edit is a complete replacement, and what it does not say is the default",
        [
            ping(T0, "199 km", KM_199),
            publish(T0, schedule=((None, 50.0),), audience=("baidu",)),
            update(T0 + 1),
            tick(T0 + HOUR),
        ],
        [told(T0 + HOUR, "alert", "199 km", 200, revision=2)],
    ),
    example(
        8,
        "an edit of missing_since restarts the ring",
        [
            ping(T0, "phone", KM_55),
            publish(T0, missing_since=T0 - 5 * HOUR),
            update(T0 + 1, missing_since=T0 - 30 * MINUTE),
            ping(T0 + 2, "next", KM_101),
            tick(T0 + 30 * MINUTE),
        ],
        [
            told(T0, "alert", "phone", 500),
            told(T0 + 1, "update", "phone", 100, revision=2),
            told(T0 + 30 * MINUTE, "alert", "next", 200, revision=2),
        ],
    ),
    example(
        8,
        "a publish of a known alert with a higher revision is an edit",
        [ping(T0, "phone", KM_55), publish(T0), publish(T0 + 1, 2)],
        [told(T0, "alert", "phone", 100), told(T0 + 1, "update", "phone", 100, revision=2)],
    ),
    example(
        8,
        "an update of an unknown alert does nothing",
        [ping(T0, "phone", KM_55), update(T0, 2), ping(T0 + 1, "phone", KM_55), publish(T0 + 2, 1)],
        [told(T0 + 2, "alert", "phone", 100)],
    ),
    example(
        8,
        "an edit does not alert a device that is no longer live but updates one that was told",
        [
            ping(T0, "told", KM_55),
            ping(T0, "north", NORTH_LAT),
            publish(T0),
            update(T0 + 7 * HOUR, lat=NORTH_LAT),
        ],
        [told(T0, "alert", "told", 100), told(T0 + 7 * HOUR, "update", "told", 500, revision=2)],
    ),
    # ---- rule 9
    example(
        9,
        "the end is told to those who left the ring or fell silent",
        [
            publish(T0),
            ping(T0 + 1, "left", KM_55),
            ping(T0 + 1, "silent", KM_55),
            ping(T0 + 2, "left", FAR),
            ping(T0 + 2, "never inside", FAR),
            close(T0 + 9 * HOUR),
        ],
        [
            told(T0 + 1, "alert", "left", 100),
            told(T0 + 1, "alert", "silent", 100),
            told(T0 + 9 * HOUR, "resolved", "left", 500),
            told(T0 + 9 * HOUR, "resolved", "silent", 500),
        ],
    ),
    example(
        9,
        "after its end nothing more is pushed for an alert",
        [
            ping(T0, "phone", KM_55),
            publish(T0),
            close(T0 + 1),
            close(T0 + 2),
            close(T0 + 2, 9),
            update(T0 + 3, 10),
            publish(T0 + 4, 11),
            ping(T0 + 5, "phone", KM_55),
            ping(T0 + 5, "other", KM_55),
            tick(T0 + 40 * DAY),
            publish(T0 + 40 * DAY, 12, missing_since=T0 + 40 * DAY),
            ping(T0 + 40 * DAY, "other", KM_55),
        ],
        [told(T0, "alert", "phone", 100), told(T0 + 1, "resolved", "phone", 100)],
    ),
    example(
        9,
        "a closed id is never opened again",
        [
            ping(T0, "phone", KM_55),
            publish(T0),
            close(T0 + 1),
            publish(T0 + 2, 2),
            ping(T0 + 3, "other", KM_55),
            close(T0 + 4, 9),
        ],
        [told(T0, "alert", "phone", 100), told(T0 + 1, "resolved", "phone", 100)],
    ),
    example(
        9,
        "all three outcomes end an alert",
        [
            ping(T0, "phone", KM_55),
            *(publish(T0, alert_id=outcome) for outcome in ("found", "false_report", "cancelled")),
            *(close(T0 + 1, alert_id=outcome, outcome=outcome) for outcome in ("found", "false_report", "cancelled")),
        ],
        [told(T0, "alert", "phone", 100, alert_id=outcome) for outcome in ("found", "false_report", "cancelled")]
        + [told(T0 + 1, "resolved", "phone", 100, alert_id=name) for name in ("found", "false_report", "cancelled")],
    ),
    example(
        9,
        "a close that comes before its alert is remembered",
        [close(T0), publish(T0 + 1, 5), ping(T0 + 2, "phone", KM_55), update(T0 + 3, 6)],
        [],
    ),
    example(
        9,
        "a close with a revision carries it, and one that is not above the known is ignored",
        [
            ping(T0, "phone", KM_55),
            publish(T0, 3),
            close(T0 + 1, 2),
            close(T0 + 2, 3),
            close(T0 + 3, 4),
        ],
        [told(T0, "alert", "phone", 100, revision=3), told(T0 + 3, "resolved", "phone", 100, revision=4)],
    ),
    example(
        9,
        "the end of one alert leaves the others open",
        [
            publish(T0, alert_id="a1"),
            publish(T0, alert_id="a2"),
            close(T0 + 1, alert_id="a1"),
            ping(T0 + 2, "phone", KM_55),
        ],
        [told(T0 + 2, "alert", "phone", 100, alert_id="a2")],
    ),
    # ---- rule 10
    example(
        10,
        "a device hears alert, then updates, then resolved",
        [
            publish(T0),
            ping(T0 + 1, "phone", KM_55),
            update(T0 + 2, 2),
            update(T0 + HOUR, 3),
            update(T0 + 2 * HOUR, 5),
            close(T0 + 3 * HOUR),
        ],
        [
            told(T0 + 1, "alert", "phone", 100),
            told(T0 + 2, "update", "phone", 100, revision=2),
            told(T0 + HOUR, "update", "phone", 200, revision=3),
            told(T0 + 2 * HOUR, "update", "phone", 300, revision=5),
            told(T0 + 3 * HOUR, "resolved", "phone", 500, revision=5),
        ],
    ),
    example(
        10,
        "the order holds within one millisecond",
        [publish(T0), ping(T0, "phone", KM_55), update(T0, 2), update(T0, 3), close(T0), ping(T0, "phone", KM_55)],
        [
            told(T0, "alert", "phone", 100),
            told(T0, "update", "phone", 100, revision=2),
            told(T0, "update", "phone", 100, revision=3),
            told(T0, "resolved", "phone", 100, revision=3),
        ],
    ),
    # ---- rule 12
    example(
        12,
        "an alert still matches at expires_at and nobody new 1 ms later",
        [
            publish(T0),
            ping(EXPIRES, "in time", KM_55),
            ping(EXPIRES + 1, "too late", KM_55),
            close(EXPIRES + 2),
        ],
        [told(EXPIRES, "alert", "in time", 500), told(EXPIRES + 2, "resolved", "in time", 500)],
    ),
    example(
        12,
        "growth due at expires_at runs and growth due later does not",
        [
            ping(T0, "101 km", KM_101),
            publish(T0, alert_id="lives to 1 h", expires_at=T0 + HOUR),
            publish(T0, alert_id="dies before 1 h", expires_at=T0 + HOUR - 1),
            tick(T0 + 5 * HOUR),
        ],
        [told(T0 + HOUR, "alert", "101 km", 200, alert_id="lives to 1 h")],
    ),
    example(
        12,
        "an expired alert can be edited, which reaches those told only",
        [
            publish(T0, expires_at=T0 + HOUR),
            ping(T0 + 1, "told", KM_55),
            ping(T0 + 2 * HOUR, "new", KM_55),
            update(T0 + 3 * HOUR, expires_at=T0 + 2 * HOUR),
        ],
        [told(T0 + 1, "alert", "told", 100), told(T0 + 3 * HOUR, "update", "told", 500, revision=2)],
    ),
    example(
        12,
        "an edit that extends an expired alert alerts those inside, and growth goes on",
        [
            publish(T0, expires_at=T0 + HOUR - 1),
            ping(T0 + 1, "told", KM_55),
            ping(T0 + 90 * MINUTE, "new", KM_199),
            ping(T0 + 90 * MINUTE, "grown", KM_199 + 0.5),  # 254.6 km
            update(T0 + 100 * MINUTE),
            tick(T0 + 2 * HOUR),
        ],
        [
            told(T0 + 1, "alert", "told", 100),
            told(T0 + 100 * MINUTE, "update", "told", 200, revision=2),
            told(T0 + 100 * MINUTE, "alert", "new", 200, revision=2),
            told(T0 + 2 * HOUR, "alert", "grown", 300, revision=2),
        ],
    ),
    example(
        12,
        "an edit that extends exactly to now alerts those inside, and one to 1 ms ago does not",
        [
            ping(T0 + 2 * HOUR, "phone", KM_55),
            publish(T0 + 2 * HOUR, alert_id="now", expires_at=T0 + HOUR),
            publish(T0 + 2 * HOUR, alert_id="past", expires_at=T0 + HOUR),
            update(T0 + 3 * HOUR, alert_id="now", expires_at=T0 + 3 * HOUR),
            update(T0 + 3 * HOUR, alert_id="past", expires_at=T0 + 3 * HOUR - 1),
        ],
        [told(T0 + 3 * HOUR, "alert", "phone", 500, revision=2, alert_id="now")],
    ),
    example(
        12,
        "an edit can bring the expiry forward",
        [publish(T0), update(T0 + 1, expires_at=T0 + MINUTE), ping(T0 + MINUTE + 1, "phone", KM_55)],
        [],
    ),
    example(
        12,
        "an alert left open is closed 30 days past expiry, at that moment",
        [
            publish(T0),
            ping(T0 + 1, "phone", KM_55),
            tick(EXPIRES + 30 * DAY - 1),
            ping(EXPIRES + 31 * DAY, "phone", KM_55),
            publish(EXPIRES + 33 * DAY, 9, missing_since=EXPIRES + 33 * DAY),
            ping(EXPIRES + 33 * DAY, "phone", KM_55),
        ],
        [told(T0 + 1, "alert", "phone", 100), told(EXPIRES + 30 * DAY, "resolved", "phone", 500)],
    ),
    example(
        12,
        "the automatic close runs before an edit at the same moment",
        [ping(T0, "phone", KM_55), publish(T0), update(EXPIRES + 30 * DAY, 2)],
        [told(T0, "alert", "phone", 100), told(EXPIRES + 30 * DAY, "resolved", "phone", 500)],
    ),
    example(
        12,
        "an edit that extends the expiry puts the automatic close off",
        [
            ping(T0, "phone", KM_55),
            publish(T0),
            update(EXPIRES + 30 * DAY - 1, 2, expires_at=EXPIRES + DAY),
            tick(EXPIRES + 40 * DAY),
        ],
        [
            told(T0, "alert", "phone", 100),
            told(EXPIRES + 30 * DAY - 1, "update", "phone", 500, revision=2),
            told(EXPIRES + 31 * DAY, "resolved", "phone", 500, revision=2),
        ],
    ),
    example(
        12,
        "an automatic close that an edit made overdue happens at once, and time does not run back",
        [
            ping(T0, "phone", KM_55),
            publish(T0),
            update(T0 + HOUR, 2, expires_at=T0 - 31 * DAY),
            tick(T0 + 2 * HOUR),
        ],
        [
            told(T0, "alert", "phone", 100),
            told(T0 + HOUR, "update", "phone", 200, revision=2),
            told(T0 + HOUR, "resolved", "phone", 200, revision=2),
        ],
    ),
    # ---- rule 13
    example(
        13,
        "an exercise reaches its audience and nobody else",
        [
            ping(T0, "a", KM_55),
            ping(T0, "b", KM_55, partner="baidu"),
            publish(T0, status="exercise", audience=("baidu",)),
            ping(T0 + 1, "a2", KM_55),
            ping(T0 + 1, "b2", KM_55, partner="baidu"),
            close(T0 + 2),
        ],
        [
            told(T0, "alert", "b", 100, partner="baidu"),
            told(T0 + 1, "alert", "b2", 100, partner="baidu"),
            told(T0 + 2, "resolved", "b", 100, partner="baidu"),
            told(T0 + 2, "resolved", "b2", 100, partner="baidu"),
        ],
    ),
    example(
        13,
        "an exercise never becomes actual, and an actual alert never an exercise",
        [
            ping(T0, "a", KM_55),
            publish(T0, alert_id="drill", status="exercise", audience=("amap",)),
            publish(T0, alert_id="real"),
            update(T0 + 1, 2, alert_id="drill"),
            update(T0 + 1, 2, alert_id="real", status="exercise", audience=("amap",)),
            ping(T0 + 2, "b", KM_55, partner="baidu"),
            close(T0 + 3, alert_id="drill"),
            close(T0 + 3, alert_id="real"),
        ],
        [
            told(T0, "alert", "a", 100, alert_id="drill"),
            told(T0, "alert", "a", 100, alert_id="real"),
            told(T0 + 2, "alert", "b", 100, alert_id="real", partner="baidu"),
            told(T0 + 3, "resolved", "a", 100, alert_id="drill"),
            told(T0 + 3, "resolved", "a", 100, alert_id="real"),
            told(T0 + 3, "resolved", "b", 100, alert_id="real", partner="baidu"),
        ],
    ),
    example(
        13,
        "an exercise that names no partner is refused, new or as an edit",
        [
            ping(T0, "a", KM_55),
            publish(T0, alert_id="open to all", status="exercise"),
            publish(T0, alert_id="drill", status="exercise", audience=("amap",)),
            update(T0 + 1, 2, alert_id="drill", status="exercise"),
            update(T0 + 2, 2, alert_id="open to all", status="exercise", audience=("amap",)),
            close(T0 + 3, alert_id="drill"),
        ],
        [
            told(T0, "alert", "a", 100, alert_id="drill"),
            told(T0 + 3, "resolved", "a", 100, alert_id="drill"),
        ],
    ),
    example(
        13,
        "an audience narrows a real alert",
        [
            publish(T0, audience=("amap",)),
            ping(T0 + 1, "a", KM_55),
            ping(T0 + 1, "b", KM_55, partner="baidu"),
            ping(T0 + 2, "b", KM_99, partner="baidu"),
        ],
        [told(T0 + 1, "alert", "a", 100)],
    ),
    example(
        13,
        "an alert without audience reaches a partner that joins later, and so does one that named it before",
        [
            publish(T0, alert_id="to all"),
            publish(T0, alert_id="to meituan", audience=("meituan",)),
            publish(T0, alert_id="to amap", audience=("amap",)),
            (T0 + 1, replace(SETTINGS, partners=("amap", "baidu", "meituan"))),
            ping(T0 + 2, "m", KM_55, partner="meituan"),
        ],
        [
            told(T0 + 2, "alert", "m", 100, alert_id="to all", partner="meituan"),
            told(T0 + 2, "alert", "m", 100, alert_id="to meituan", partner="meituan"),
        ],
    ),
    # ---- rule 15
    example(
        15,
        "an edit with a known or lower revision does nothing",
        [
            ping(T0, "phone", KM_55),
            ping(T0, "north", NORTH_LAT),
            publish(T0, 4),
            update(T0 + 1, 4, lat=NORTH_LAT),
            update(T0 + 1, 3, lat=NORTH_LAT),
            publish(T0 + 1, 1, lat=NORTH_LAT),
            update(T0 + 2, 5),
        ],
        [told(T0, "alert", "phone", 100, revision=4), told(T0 + 2, "update", "phone", 100, revision=5)],
    ),
    example(
        15,
        "revisions start at 1",
        [ping(T0, "phone", KM_55), publish(T0, 0), publish(T0, -1), publish(T0 + 1, 1)],
        [told(T0 + 1, "alert", "phone", 100, revision=1)],
    ),
    example(
        15,
        "a stale edit does not stop the ring from growing as it was",
        [
            ping(T0, "phone", KM_101),
            publish(T0, 2),
            update(T0 + 1, 1, schedule=((None, 1.0),), expires_at=T0 + 2),
            tick(T0 + HOUR),
        ],
        [told(T0 + HOUR, "alert", "phone", 200, revision=2)],
    ),
    example(
        15,
        "ring_km of an update or resolved is the ring at that moment, under the new revision",
        [
            ping(T0, "phone", KM_55),
            publish(T0),
            update(T0 + HOUR, 2),
            update(T0 + 2 * HOUR, 3, schedule=((2.5, 77.0), (None, 88.0))),
            close(T0 + 150 * MINUTE),
        ],
        [
            told(T0, "alert", "phone", 100),
            told(T0 + HOUR, "update", "phone", 200, revision=2),
            told(T0 + 2 * HOUR, "update", "phone", 77, revision=3),
            told(T0 + 150 * MINUTE, "resolved", "phone", 88, revision=3),
        ],
    ),
    example(
        15,
        "ring_km goes on growing past expiry",
        [ping(T0, "phone", KM_55), publish(T0, expires_at=T0 + 1), close(T0 + 2 * HOUR)],
        [told(T0, "alert", "phone", 100), told(T0 + 2 * HOUR, "resolved", "phone", 300)],
    ),
]
