"""Rules 1, 2, 3 and 14: which pings count, where a device is, and for how long."""

from __future__ import annotations

from tests.reference.examples.builders import (
    FAR,
    HOME_LAT,
    HOUR,
    KM_55,
    KM_99,
    KM_101,
    MINUTE,
    SECOND,
    T0,
    TOLERANCE,
    WINDOW,
    Entry,
    close,
    example,
    ping,
    publish,
    tick,
    told,
)

CHINESE_63 = "团圆" * 10 + "团"
"""21 characters of 3 bytes."""

INT32_MIN_DEGREES = -(2**31) / 1e7


def _pole_ring(at_ms: int) -> Entry:
    """100 km around the north pole."""
    return publish(at_ms, lat=90.0, lng=0.0)


EXAMPLES = [
    # ---- rule 1
    example(
        1,
        "a late ping does not move a device back",
        [
            ping(T0, "left", FAR, observed=T0),
            ping(T0 + SECOND, "left", KM_55, observed=T0 - SECOND),
            ping(T0 + SECOND, "came", KM_55, observed=T0),
            ping(T0 + 2 * SECOND, "came", FAR, observed=T0 - 1),
            publish(T0 + 3 * SECOND),
        ],
        [told(T0 + 3 * SECOND, "alert", "came", 100)],
    ),
    example(
        1,
        "of two pings observed at the same time the later in the log is the location",
        [
            ping(T0, "left", KM_55, observed=T0),
            ping(T0, "came", FAR, observed=T0),
            ping(T0 + 1, "left", FAR, observed=T0),
            ping(T0 + 1, "came", KM_55, observed=T0),
            publish(T0 + 2),
        ],
        [told(T0 + 2, "alert", "came", 100)],
    ),
    example(
        1,
        "a device that left before the alert is not told",
        [ping(T0, "phone", KM_55), ping(T0 + SECOND, "phone", FAR), publish(T0 + MINUTE)],
        [],
    ),
    # ---- rule 2
    example(
        2,
        "a ping exactly 5 min ahead of the clock is accepted and 1 ms more is refused",
        [
            publish(T0),
            ping(T0, "ahead", KM_55, observed=T0 + TOLERANCE),
            ping(T0, "too-far-ahead", KM_55, observed=T0 + TOLERANCE + 1),
        ],
        [told(T0, "alert", "ahead", 100)],
    ),
    example(
        2,
        "a ping exactly as old as the live window is accepted and 1 ms older is refused",
        [
            publish(T0),
            ping(T0 + MINUTE, "old", KM_55, observed=T0 + MINUTE - WINDOW),
            ping(T0 + MINUTE, "too-old", KM_55, observed=T0 + MINUTE - WINDOW - 1),
        ],
        [told(T0 + MINUTE, "alert", "old", 100)],
    ),
    example(
        2,
        "a refused ping from the future does not freeze the phone",
        [
            publish(T0),
            ping(T0 + 1, "phone", FAR, observed=T0 + 10 * HOUR),
            ping(T0 + 2, "phone", KM_55),
        ],
        [told(T0 + 2, "alert", "phone", 100)],
    ),
    example(
        2,
        "an accepted ping from the near future holds back pings observed before it",
        [
            ping(T0, "phone", FAR, observed=T0 + TOLERANCE),
            ping(T0 + MINUTE, "phone", KM_55),
            publish(T0 + 2 * MINUTE),
            ping(T0 + 5 * MINUTE, "phone", KM_55),
        ],
        [told(T0 + 5 * MINUTE, "alert", "phone", 100)],
    ),
    example(
        2,
        "an id has 1 to 64 bytes of UTF-8 and characters do not count",
        [
            publish(T0),
            ping(T0 + 1, "", KM_55),
            ping(T0 + 1, "a", KM_55),
            ping(T0 + 1, "x" * 64, KM_55),
            ping(T0 + 1, "x" * 65, KM_55),
            ping(T0 + 1, CHINESE_63 + "a", KM_55),
            ping(T0 + 1, CHINESE_63 + "ab", KM_55),
            ping(T0 + 1, CHINESE_63 + "圆", KM_55),
        ],
        [
            told(T0 + 1, "alert", "a", 100),
            told(T0 + 1, "alert", "x" * 64, 100),
            told(T0 + 1, "alert", CHINESE_63 + "a", 100),
        ],
    ),
    example(
        2,
        "ids that differ only in their last byte or in a trailing zero byte are different devices",
        [
            publish(T0),
            *(ping(T0 + 1, device_id, KM_55) for device_id in ("x" * 63 + "a", "x" * 63 + "b", "x", "x\0", "x\0\0")),
        ],
        [
            told(T0 + 1, "alert", "x" * 63 + "a", 100),
            told(T0 + 1, "alert", "x" * 63 + "b", 100),
            told(T0 + 1, "alert", "x", 100),
            told(T0 + 1, "alert", "x\0", 100),
            told(T0 + 1, "alert", "x\0\0", 100),
        ],
    ),
    example(
        2,
        "latitude 90 and longitude 180 are accepted and 1e-7 degree more is refused",
        [
            _pole_ring(T0),
            ping(T0 + 1, "pole", 90.0, 0.0),
            ping(T0 + 1, "beyond", 90.0000001, 0.0),
            ping(T0 + 1, "at-180", 89.9, 180.0),
            ping(T0 + 1, "at-minus-180", 89.9, -180.0),
            ping(T0 + 1, "beyond-180", 89.9, 180.0000001),
            ping(T0 + 1, "beyond-minus-180", 89.9, -180.0000001),
            ping(T0 + 1, "smallest-int32", 89.9, INT32_MIN_DEGREES),
        ],
        [
            told(T0 + 1, "alert", "pole", 100),
            told(T0 + 1, "alert", "at-180", 100),
            told(T0 + 1, "alert", "at-minus-180", 100),
        ],
    ),
    example(
        2,
        "a refused ping moves nobody and stops nobody",
        [
            ping(T0, "phone", KM_55),
            ping(T0 + 1, "phone", 90.1),
            ping(T0 + 1, "phone", HOME_LAT, 180.1),
            publish(T0 + 2),
            ping(T0 + 3, "phone", -90.1),
            ping(T0 + 3, "other", KM_55),
        ],
        [told(T0 + 2, "alert", "phone", 100), told(T0 + 3, "alert", "other", 100)],
    ),
    # ---- rule 3
    example(
        3,
        "a location exactly as old as the live window is live and 1 ms older is not",
        [
            ping(T0, "gone", KM_55, observed=T0),
            ping(T0 + 1, "live", KM_55, observed=T0 + 1),
            publish(T0 + WINDOW + 1, missing_since=T0 + WINDOW + 1),
        ],
        [told(T0 + WINDOW + 1, "alert", "live", 100)],
    ),
    example(
        3,
        "liveness is by when the phone was there and not by when the ping arrived",
        [
            ping(T0, "phone", KM_55, observed=T0 - 5 * HOUR),
            publish(T0 + 2 * HOUR, missing_since=T0 + 2 * HOUR),
        ],
        [],
    ),
    example(
        3,
        "a late ping does not keep a device live",
        [
            ping(T0, "phone", KM_55),
            ping(T0 + 5 * HOUR, "phone", KM_55, observed=T0 - HOUR),
            publish(T0 + WINDOW + 1, missing_since=T0 + WINDOW),
        ],
        [],
    ),
    # ---- rule 14
    example(
        14,
        "a device that was told is told the end long after its location was wiped",
        [
            ping(T0, "phone", KM_55),
            publish(T0 + 1),
            tick(T0 + 10 * HOUR),
            tick(T0 + 20 * HOUR),
            close(T0 + 30 * HOUR),
        ],
        [told(T0 + 1, "alert", "phone", 100), told(T0 + 30 * HOUR, "resolved", "phone", 500)],
    ),
    example(
        14,
        "a device that was told, wiped and heard again is not told twice",
        [
            ping(T0, "phone", KM_55),
            publish(T0 + 1),
            tick(T0 + 10 * HOUR),
            ping(T0 + 20 * HOUR, "phone", KM_55),
            close(T0 + 21 * HOUR),
        ],
        [told(T0 + 1, "alert", "phone", 100), told(T0 + 21 * HOUR, "resolved", "phone", 500)],
    ),
    example(
        14,
        "a wiped device is unknown until its next ping",
        [
            ping(T0, "phone", KM_99),
            tick(T0 + 7 * HOUR),
            publish(T0 + 8 * HOUR, missing_since=T0 + 8 * HOUR),
            ping(T0 + 8 * HOUR + 1, "phone", KM_101, observed=T0 + 3 * HOUR),
            ping(T0 + 8 * HOUR + 2, "phone", KM_99, observed=T0 + 3 * HOUR),
        ],
        [told(T0 + 8 * HOUR + 2, "alert", "phone", 100)],
    ),
]
