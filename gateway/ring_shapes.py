"""A ring as map apps draw it: a polygon of the circle on the sphere, in longitude and latitude (RFC 7946).

The circle is the one of matching rule 5: great-circle distance on H3's sphere. The corners lie on it, evenly by
bearing. A plane map is cut at longitude 180, so a ring there comes in two parts that meet at the cut (RFC 7946, 3.1.9),
and a ring around a pole runs along the whole width of the map and is closed over the pole's edge.
"""

from __future__ import annotations

import math

from geoindex.cell_kernels import EARTH_RADIUS_M

CORNERS = 180
"""The polygon stays within 1.6e-4 of the radius inside the circle: 80 m of 500 km."""
_DIGITS = 6
"""Of a degree: 11 cm."""

Position = tuple[float, float]
"""Longitude, latitude in degrees."""


def ring_geometry(lat: float, lng: float, radius_km: float) -> dict[str, object]:
    """A GeoJSON Polygon, or a MultiPolygon where the ring crosses longitude 180. Exterior rings run anticlockwise."""
    border = _unwrapped_border(lat, lng, radius_km)
    turn = border[-1][0] - border[0][0]
    if abs(turn) > 180.0:
        parts = [_around_pole(border, turn)]
    else:
        parts = [part for shift in (-360.0, 0.0, 360.0) if (part := _between_cuts(border[:-1], shift))]
    rings = [[_closed(part)] for part in parts]
    if len(rings) == 1:
        return {"type": "Polygon", "coordinates": rings[0]}
    return {"type": "MultiPolygon", "coordinates": rings}


def _unwrapped_border(lat: float, lng: float, radius_km: float) -> list[Position]:
    """Corners from bearing 0 against the clock round to bearing 0 again; longitudes run on past 180 without a jump."""
    distance = radius_km * 1000.0 / EARTH_RADIUS_M
    sin_lat, cos_lat = math.sin(math.radians(lat)), math.cos(math.radians(lat))
    sin_lng, cos_lng = math.sin(math.radians(lng)), math.cos(math.radians(lng))
    centre = (cos_lat * cos_lng, cos_lat * sin_lng, sin_lat)
    north = (-sin_lat * cos_lng, -sin_lat * sin_lng, cos_lat)
    east = (-sin_lng, cos_lng, 0.0)
    border: list[Position] = []
    before = lng
    for corner in range(CORNERS + 1):
        bearing = -2.0 * math.pi * (corner % CORNERS) / CORNERS
        along, northward = math.cos(distance), math.sin(distance) * math.cos(bearing)
        eastward = math.sin(distance) * math.sin(bearing)
        x, y, z = (along * c + northward * n + eastward * e for c, n, e in zip(centre, north, east, strict=True))
        here = before + (math.degrees(math.atan2(y, x)) - before + 180.0) % 360.0 - 180.0
        border.append((here, math.degrees(math.atan2(z, math.hypot(x, y)))))
        before = here
    return border


def _around_pole(border: list[Position], turn: float) -> list[Position]:
    """A border that runs once around the world: from one edge of the map to the other, and back over the pole."""
    # Against the clock, as seen from above, is eastward around the north pole and westward around the south pole.
    pole = 90.0 if turn > 0 else -90.0
    edge = math.copysign(180.0, turn)
    corners = sorted(((lng + 180.0) % 360.0 - 180.0, lat) for lng, lat in border[:-1])
    first, last = corners[0], corners[-1]
    share = (180.0 - last[0]) / (first[0] + 360.0 - last[0])
    at_edge = last[1] + share * (first[1] - last[1])
    if turn < 0:
        corners.reverse()
    return [(-edge, at_edge), *corners, (edge, at_edge), (edge, pole), (-edge, pole)]


def _between_cuts(corners: list[Position], shift: float) -> list[Position]:
    """The part of a border, shifted by whole turns, that lies between longitude -180 and 180."""
    part = [(lng + shift, lat) for lng, lat in corners]
    for cut, side in ((-180.0, 1.0), (180.0, -1.0)):
        kept: list[Position] = []
        for start, end in zip(part, part[1:] + part[:1], strict=True):
            start_inside, end_inside = (start[0] - cut) * side > 0.0, (end[0] - cut) * side > 0.0
            if start_inside != end_inside:
                share = (cut - start[0]) / (end[0] - start[0])
                kept.append((cut, start[1] + share * (end[1] - start[1])))
            if end_inside:
                kept.append(end)
        part = kept
    return part


def _closed(corners: list[Position]) -> list[list[float]]:
    rounded = [[round(lng, _DIGITS), round(lat, _DIGITS)] for lng, lat in corners]
    ring = [here for before, here in zip([None, *rounded], rounded, strict=False) if here != before]
    return [*ring, ring[0]] if ring[0] != ring[-1] else ring
