"""Rules 4, 5, 6 and 11: how large a ring is, what lies in it, and when anybody looks."""

from __future__ import annotations

import h3

from tests.reference.examples.builders import (
    FAR,
    HOME_LAT,
    HOME_LNG,
    HOUR,
    KM_55,
    KM_99,
    KM_101,
    KM_199,
    KM_201,
    KM_299,
    KM_301,
    KM_499,
    KM_501,
    MINUTE,
    SECOND,
    T0,
    WINDOW,
    Example,
    close,
    example,
    ping,
    publish,
    tick,
    told,
    update,
)

BANDS = {99: KM_99, 101: KM_101, 199: KM_199, 201: KM_201, 299: KM_299, 301: KM_301, 499: KM_499, 501: KM_501}
"""One device at each distance (km) from HOME."""


def _published_at_age(name: str, age_ms: int, ring_km: float, distances_km: list[int]) -> Example:
    """A late alert: which of the devices at BANDS are told."""
    return example(
        4,
        name,
        [*(ping(T0, f"{km} km", lat) for km, lat in BANDS.items()), publish(T0, missing_since=T0 - age_ms)],
        [told(T0, "alert", f"{km} km", ring_km) for km in distances_km],
    )


def _ring_around(
    name: str, centre: tuple[float, float], inside: list[tuple[float, float]], outside: list[tuple[float, float]]
) -> Example:
    """A 100-km ring around a place: found by pings, and by the publish of a second alert."""
    places = [(f"inside {place}", place) for place in inside] + [(f"outside {place}", place) for place in outside]
    lat, lng = centre
    return example(
        5,
        name,
        [
            publish(T0, lat=lat, lng=lng, alert_id="before"),
            *(ping(T0 + 1, device_id, *place) for device_id, place in places),
            publish(T0 + 2, lat=lat, lng=lng, alert_id="after"),
        ],
        [told(T0 + 1, "alert", f"inside {place}", 100, alert_id="before") for place in inside]
        + [told(T0 + 2, "alert", f"inside {place}", 100, alert_id="after") for place in inside],
    )


PENTAGON_LAT, PENTAGON_LNG = h3.cell_to_latlng(h3.get_pentagons(7)[2])
"""39.1 N, 122.3 E: in the Yellow Sea off Dalian, the one pentagon beside China."""

EXAMPLES = [
    # ---- rule 4
    _published_at_age("the ring is 100 km until 1 ms before the first hour", HOUR - 1, 100, [99]),
    _published_at_age("the ring is 200 km from the first hour", HOUR, 200, [99, 101, 199]),
    _published_at_age("the ring is 200 km until 1 ms before the second hour", 2 * HOUR - 1, 200, [99, 101, 199]),
    _published_at_age("the ring is 300 km from the second hour", 2 * HOUR, 300, [99, 101, 199, 201, 299]),
    _published_at_age(
        "the ring is 300 km until 1 ms before the third hour", 3 * HOUR - 1, 300, [99, 101, 199, 201, 299]
    ),
    _published_at_age("the ring is 500 km from the third hour", 3 * HOUR, 500, [99, 101, 199, 201, 299, 301, 499]),
    _published_at_age("an alert two days late starts wide", 48 * HOUR, 500, [99, 101, 199, 201, 299, 301, 499]),
    _published_at_age("a child missing only in an hour has the first ring", -HOUR, 100, [99]),
    example(
        4,
        "an alert published before its missing_since grows when that is an hour past",
        [
            publish(T0, missing_since=T0 + HOUR),
            ping(T0 + HOUR, "phone", KM_101),
            tick(T0 + 2 * HOUR - 1),
            tick(T0 + 2 * HOUR),
        ],
        [told(T0 + 2 * HOUR, "alert", "phone", 200)],
    ),
    example(
        4,
        "an alert may carry its own schedule in fractions of hours",
        [
            ping(T0, "55 km", KM_55),
            ping(T0, "99 km", KM_99),
            ping(T0, "199 km", KM_199),
            publish(T0, schedule=((0.25, 50.0), (0.5, 60.5), (None, 100.0))),
            tick(T0 + HOUR),
        ],
        [
            told(T0 + 15 * MINUTE, "alert", "55 km", 60.5),
            told(T0 + 30 * MINUTE, "alert", "99 km", 100),
        ],
    ),
    example(
        4,
        "1.1 hours are 3,960,000 ms also for a computer that counts in binary fractions",
        [
            publish(T0, schedule=((1.1, 100.0), (None, 200.0))),
            ping(T0 + 3_959_999, "phone", KM_101),
            ping(T0 + 3_960_000, "late", KM_101),
            close(T0 + 3_960_000),
        ],
        [
            told(T0 + 3_960_000, "alert", "phone", 200),
            told(T0 + 3_960_000, "alert", "late", 200),
            told(T0 + 3_960_000, "resolved", "phone", 200),
            told(T0 + 3_960_000, "resolved", "late", 200),
        ],
    ),
    example(
        4,
        "hours between two milliseconds end at the later one",  # 2/7 h = 1,028,571.43 ms
        [
            publish(T0, schedule=((2 / 7, 100.0), (None, 200.0))),
            ping(T0 + 1_028_571, "phone", KM_101),
            tick(T0 + 2_000_000),
        ],
        [told(T0 + 1_028_572, "alert", "phone", 200)],
    ),
    example(
        4,
        "a schedule of one step never grows",
        [ping(T0, "in", KM_99), ping(T0, "out", KM_101), publish(T0, schedule=((None, 100.0),)), tick(T0 + 5 * HOUR)],
        [told(T0, "alert", "in", 100)],
    ),
    # ---- rule 5
    example(
        5,
        "1e-7 degree decides at the ring's edge",  # 0.8993203 and 0.8993204 degrees: 99.99999291 and 100.00000403 km
        [publish(T0), ping(T0 + 1, "in", 30.8993203), ping(T0 + 1, "out", 30.8993204)],
        [told(T0 + 1, "alert", "in", 100)],
    ),
    example(
        5,
        "1e-7 degree decides at the ring's edge when cover meets table",
        [ping(T0, "in", 30.8993203), ping(T0, "out", 30.8993204), publish(T0 + 1)],
        [told(T0 + 1, "alert", "in", 100)],
    ),
    example(
        5,
        "a device that creeps over the ring's edge by a centimetre is found",
        [
            publish(T0),
            ping(T0 + 1, "phone", 30.8993206),
            ping(T0 + 2, "phone", 30.8993205),
            ping(T0 + 3, "phone", 30.8993204),
            ping(T0 + 4, "phone", 30.8993203),
        ],
        [told(T0 + 4, "alert", "phone", 100)],
    ),
    # At 60 N, d = 2 asin(cos 60 * sin(dlng / 2)): dlng 1.79 gives 99.52 km, dlng 1.81 gives 100.63 km.
    _ring_around("degrees of longitude are shorter in the north", (60, 20), [(60, 21.79), (60, 18.21)], [(60, 21.81)]),
    # On the equator 1 degree of longitude is 1 degree of arc; 0.89 is 98.96 km, 0.9 is 100.08 km.
    _ring_around(
        "the antimeridian is an ordinary place",
        (0, 179.9),
        [(0, 179.9), (0, 180), (0, -180), (0, -179.3), (0, -179.21), (0, 179.01)],
        [(0, -179.2), (0, 179.0), (0, -0.1)],
    ),
    _ring_around(
        "the north pole is an ordinary place",
        (89.5, 0),
        [(90, 0), (90, 77.7), (89.61, 180), (89.61, -180), (88.61, 0)],
        [(89.6, 180), (88.6, 0)],
    ),
    _ring_around(
        "a ring around the south pole holds all longitudes",
        (-90, 0),
        [(-89.11, lng) for lng in (-180, -135.5, -90, 0, 45, 90, 179.9999999)] + [(-90, -180), (-90, 123.4)],
        [(-89.1, lng) for lng in (-180, -135.5, -90, 0, 45, 90, 179.9999999)],
    ),
    _ring_around(
        "a pentagon of H3 is an ordinary place",
        (PENTAGON_LAT, PENTAGON_LNG),
        [(round(PENTAGON_LAT + north, 7), round(PENTAGON_LNG, 7)) for north in (0.0, 0.01, -0.01, 0.89, -0.89)],
        [(round(PENTAGON_LAT + north, 7), round(PENTAGON_LNG, 7)) for north in (0.9, -0.9)],
    ),
    example(
        5,
        "a ring of 1,000 km",  # 8.99 degrees: 999.64 km; 9 degrees: 1000.76 km
        [
            ping(T0, "in", HOME_LAT + 8.99),
            ping(T0, "out", HOME_LAT + 9),
            publish(T0, schedule=((None, 1000.0),)),
            ping(T0 + 1, "in too", HOME_LAT - 8.99),
            ping(T0 + 1, "out too", HOME_LAT - 9),
        ],
        [told(T0, "alert", "in", 1000), told(T0 + 1, "alert", "in too", 1000)],
    ),
    example(
        5,
        "a ring of 50 m",  # 0.00044 degrees: 48.9 m; 0.00046 degrees: 51.1 m
        [
            ping(T0, "in", HOME_LAT + 0.00044),
            ping(T0, "out", HOME_LAT + 0.00046),
            publish(T0, schedule=((None, 0.05),)),
            ping(T0 + 1, "in too", HOME_LAT - 0.00044),
            ping(T0 + 1, "out too", HOME_LAT - 0.00046),
        ],
        [told(T0, "alert", "in", 0.05), told(T0 + 1, "alert", "in too", 0.05)],
    ),
    # ---- rule 6
    example(
        6,
        "a ping is matched when it arrives, a known device when the alert is published or edited or its ring grows",
        [
            ping(T0, "at publish", KM_55),
            ping(T0, "at edit", KM_55, HOME_LNG + 2),  # 200 km away; 55.6 km after the edit
            ping(T0, "at growth", KM_101, HOME_LNG + 2),
            publish(T0 + 1),
            ping(T0 + 2, "at ping", KM_99),
            update(T0 + 3, lng=HOME_LNG + 2),
            tick(T0 + HOUR),
        ],
        [
            told(T0 + 1, "alert", "at publish", 100),
            told(T0 + 2, "alert", "at ping", 100),
            told(T0 + 3, "update", "at publish", 100, revision=2),
            told(T0 + 3, "update", "at ping", 100, revision=2),
            told(T0 + 3, "alert", "at edit", 100, revision=2),
            told(T0 + HOUR, "alert", "at growth", 200, revision=2),
        ],
    ),
    example(
        6,
        "a late ping is matched at the device's location and not at its own",
        [
            publish(T0),
            ping(T0 + 10, "phone", FAR, observed=T0 + 10),
            ping(T0 + 20, "phone", KM_55, observed=T0 + 5),
            ping(T0 + 30, "phone", KM_99, observed=T0 + 10),
        ],
        [told(T0 + 30, "alert", "phone", 100)],
    ),
    example(
        6,
        "a device that comes nearer is told when it enters",
        [publish(T0), ping(T0 + 1, "phone", KM_101), ping(T0 + 2, "phone", KM_99), ping(T0 + 3, "phone", KM_55)],
        [told(T0 + 2, "alert", "phone", 100)],
    ),
    # ---- rule 11
    example(
        11,
        "missed growth runs in time order with the clock at each hour",
        [
            publish(T0),
            *(ping(T0 + 1, f"{km} km", lat) for km, lat in BANDS.items()),
            tick(T0 + 5 * HOUR),
        ],
        [told(T0 + 1, "alert", "99 km", 100)]
        + [told(T0 + HOUR, "alert", f"{km} km", 200) for km in (101, 199)]
        + [told(T0 + 2 * HOUR, "alert", f"{km} km", 300) for km in (201, 299)]
        + [told(T0 + 3 * HOUR, "alert", f"{km} km", 500) for km in (301, 499)],
    ),
    example(
        11,
        "liveness at a missed hour is that of the hour",
        [
            ping(T0, "live at 1 h", KM_101, observed=T0 + HOUR - WINDOW),
            ping(T0, "wiped before 1 h", KM_101, observed=T0 + HOUR - WINDOW - 1),
            ping(T0, "live at 2 h", KM_299, observed=T0 + 2 * HOUR - WINDOW),
            ping(T0, "wiped before 2 h", KM_299, observed=T0 + 2 * HOUR - WINDOW - 1),
            publish(T0),
            tick(T0 + 20 * HOUR),
        ],
        [told(T0 + HOUR, "alert", "live at 1 h", 200), told(T0 + 2 * HOUR, "alert", "live at 2 h", 300)],
    ),
    example(
        11,
        "growth runs before the ping that revealed the hour, so a device that leaves at the hour is still found",
        [
            publish(T0),
            ping(T0 + 1, "leaves", KM_101),
            ping(T0 + 1, "comes", FAR),
            ping(T0 + HOUR, "leaves", FAR),
            ping(T0 + HOUR + SECOND, "comes", KM_199),
        ],
        [told(T0 + HOUR, "alert", "leaves", 200), told(T0 + HOUR + SECOND, "alert", "comes", 200)],
    ),
    example(
        11,
        "growth runs before the close that revealed it",
        [ping(T0, "phone", KM_101), publish(T0), close(T0 + 90 * MINUTE)],
        [told(T0 + HOUR, "alert", "phone", 200), told(T0 + 90 * MINUTE, "resolved", "phone", 200)],
    ),
    example(
        11,
        "growth runs before the edit that would have put it off",
        [
            ping(T0, "phone", KM_101),
            publish(T0),
            update(T0 + HOUR, missing_since=T0 + HOUR),
            tick(T0 + 2 * HOUR - 1),
        ],
        [told(T0 + HOUR, "alert", "phone", 200), told(T0 + HOUR, "update", "phone", 100, revision=2)],
    ),
    example(
        11,
        "a refused ping reveals the hour too",
        [ping(T0, "phone", KM_101), publish(T0), ping(T0 + 2 * HOUR - 1, "", KM_55)],
        [told(T0 + HOUR, "alert", "phone", 200)],
    ),
    example(
        11,
        "growth of several alerts runs in time order",
        [
            ping(T0, "phone", KM_101),
            publish(T0, alert_id="a1"),
            publish(T0, alert_id="a2", missing_since=T0 - 30 * MINUTE),
            publish(T0, alert_id="a3", missing_since=T0),
            tick(T0 + 3 * HOUR),
        ],
        [
            told(T0 + 30 * MINUTE, "alert", "phone", 200, alert_id="a2"),
            told(T0 + HOUR, "alert", "phone", 200, alert_id="a1"),
            told(T0 + HOUR, "alert", "phone", 200, alert_id="a3"),
        ],
    ),
    example(
        11,
        "a phone wiped between two missed hours is found by the first only",
        [
            ping(T0, "phone", KM_299, observed=T0 + 90 * MINUTE - WINDOW),
            publish(T0, alert_id="a1", schedule=((1.0, 100.0), (None, 300.0))),
            publish(T0, alert_id="a2", schedule=((2.0, 100.0), (None, 300.0))),
            tick(T0 + 9 * HOUR),
        ],
        [told(T0 + HOUR, "alert", "phone", 300, alert_id="a1")],
    ),
]
