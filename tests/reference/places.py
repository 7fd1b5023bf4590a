"""Places where geometry goes wrong, and ways to get from one to another. Locations are (lat_e7, lng_e7)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import h3

from geoindex.entries import Alert
from tests.reference.events import DEGREE_E7
from tests.reference.matcher import EARTH_RADIUS_KM, great_circle_km

LocationE7 = tuple[int, int]

BEIJING = (39.9042, 116.4074)
PENTAGONS: list[tuple[float, float]] = [h3.cell_to_latlng(cell) for cell in h3.get_pentagons(7)]
"""Centres of the 12 pentagons; H3 has them at the same places at every resolution."""
PLACES: list[tuple[float, float]] = [
    BEIJING,
    (0.0, 0.0),
    (90.0, 0.0),
    (-90.0, 0.0),
    (89.95, 45.0),
    (0.0, 180.0),
    (-17.0, -179.99),
    (65.0, 179.999),
    PENTAGONS[2],  # in the Yellow Sea
    *PENTAGONS,
]

EDGE_GUARD_KM = 1e-6
"""1 mm: nearer to a ring's edge two correct formulas may disagree."""


def to_e7(lat: float, lng: float) -> LocationE7:
    return round(lat * DEGREE_E7), round(lng * DEGREE_E7)


def travel(start: tuple[float, float], bearing_degrees: float, distance_km: float) -> tuple[float, float]:
    """Where one gets from a place along a great circle; degrees, longitude within ±180.

    Ed Williams, "Aviation Formulary", section "Lat/lon given radial and distance".
    """
    lat, lng = math.radians(start[0]), math.radians(start[1])
    bearing, arc = math.radians(bearing_degrees), distance_km / EARTH_RADIUS_KM
    sine = math.sin(lat) * math.cos(arc) + math.cos(lat) * math.sin(arc) * math.cos(bearing)
    end_lat = math.asin(max(-1.0, min(1.0, sine)))
    east = math.atan2(
        math.sin(bearing) * math.sin(arc) * math.cos(lat), math.cos(arc) - math.sin(lat) * math.sin(end_lat)
    )
    end_lng = math.degrees(lng + east)
    return math.degrees(end_lat), (end_lng + 180) % 360 - 180


def edges_of(alerts: Iterable[Alert]) -> list[tuple[float, float, tuple[float, ...]]]:
    """Every circle any of the alerts can draw: (lat, lng, radii in km), each centre once."""
    radii: dict[tuple[float, float], set[float]] = {}
    for alert in alerts:
        radii.setdefault((alert.lat, alert.lng), set()).update(km for _, km in alert.schedule)
    return [(lat, lng, tuple(sorted(km))) for (lat, lng), km in radii.items()]


def is_clear_of(edges: list[tuple[float, float, tuple[float, ...]]], location: LocationE7) -> bool:
    """Whether a location is farther than the guard from every circle."""
    lat, lng = location[0] / DEGREE_E7, location[1] / DEGREE_E7
    for centre_lat, centre_lng, radii in edges:
        distance_km = great_circle_km(centre_lat, centre_lng, lat, lng)
        if any(abs(distance_km - km) <= EDGE_GUARD_KM for km in radii):
            return False
    return True


def nudged_clear_of(edges: list[tuple[float, float, tuple[float, ...]]], location: LocationE7) -> LocationE7:
    """The location, moved towards the equator and longitude 0 by centimetres until it is clear of every circle."""
    lat_e7, lng_e7 = location
    north_e7, east_e7 = (-3 if lat_e7 > 0 else 3), (-5 if lng_e7 > 0 else 5)
    while not is_clear_of(edges, (lat_e7, lng_e7)):
        lat_e7, lng_e7 = lat_e7 + north_e7, lng_e7 + east_e7
    return lat_e7, lng_e7
