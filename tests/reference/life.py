"""`loadtest.life` once more, slowly: a phone's day as a list of pieces, pings one by one, in Python's integers."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from loadtest import journey_kernels as journeys
from loadtest import life_kernels as kernels
from loadtest import world_kernels
from loadtest.life import ClockFault, Life

U64 = 1 << 64
DAY_MS = 86_400_000
METRE = 180.0 / (math.pi * 6_371_008.8)
HOUR = 3_600.0
Point = tuple[float, float]


def mixed(number: int) -> int:
    number %= U64
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 % U64
    number = (number ^ number >> 27) * 0x94D049BB133111EB % U64
    return number ^ number >> 31


def drawn(base: int, stream: object, count: int = 0) -> int:
    return mixed(base + int(stream) + count * 0x9E3779B97F4A7C15)  # type: ignore[call-overload]


def fraction(number: int, first_bit: int) -> float:
    return (number >> first_bit & 0xFFFF) / 65_536


def bell(number: int) -> float:
    return (sum(number >> 16 * i & 0xFFFF for i in range(4)) - 131_070.0) * (1.0 / 131_070.0)


# ---- where ----


@dataclass(frozen=True)
class Piece:
    """From one moment of the day on, until the next piece: at `start` or on the way from it to `end`."""

    from_s: float
    mode: int
    start: Point
    end: Point
    until_s: float = math.inf
    vectors: tuple[list[float], list[float]] | None = None

    def at(self, now_s: float) -> Point:
        if self.start == self.end:
            return self.start
        share = (now_s - self.from_s) / (self.until_s - self.from_s)
        if self.vectors is None:
            lat, lng = self.start
            return lat + share * (self.end[0] - lat), lng + share * (self.end[1] - lng)
        x, y, z = (a + share * (b - a) for a, b in zip(*self.vectors, strict=True))
        return math.degrees(math.atan2(z, math.hypot(x, y))), math.degrees(math.atan2(y, x))


@dataclass(frozen=True)
class Person:
    """What stays the same for life."""

    own: int
    place: int
    home: Point
    sec: float
    trait: int
    quick: float


def person(life: Life, phone: int) -> Person:
    own = mixed(life.seed + phone * 0x9E3779B97F4A7C15)
    country = life.country
    spot = (drawn(life.seed, world_kernels.STREAM_PLACE) + phone * 0x9E3779B97F4A7C15) % U64 * len(country.places)
    column, rest = divmod(spot, U64)
    place = column if rest < int(country.threshold[column]) else int(country.alias[column])
    lat, lng, reach, sec, sec_slope = country.rows[place, :5].tolist()
    north = bell(drawn(own, world_kernels.STREAM_NORTH)) * reach
    sec += sec_slope * north
    home = (lat + north, lng + bell(drawn(own, world_kernels.STREAM_EAST)) * reach * sec)
    trait = drawn(own, journeys.STREAM_TRAIT)
    return Person(own, place, home, sec, trait, 0.85 + 0.3 * fraction(trait, 0))


def way(start: Point, end: Point, sec: float, quick: float) -> tuple[float, int]:
    """Seconds and mode of a way."""
    length_m = math.hypot((end[0] - start[0]) / METRE, (end[1] - start[1]) / METRE / sec)
    if length_m <= 1_500:
        return length_m / (1.25 * quick), journeys.WALKING
    if length_m <= 6_000:
        return length_m / (4.5 * quick), journeys.RIDING
    return length_m / (min(9 + length_m / 5_000, 20) * quick), journeys.DRIVING


def moved(start: Point, way_m: float, heading: int, sec: float, life: Life) -> Point:
    cos, sin = life._land.direction[heading].tolist()
    return start[0] + way_m * METRE * cos, start[1] + way_m * METRE * sin * sec


def there_and_back(
    depart_s: float, start: Point, end: Point, way_s: float, mode: int, stay_s: float, stay: int
) -> list[Piece]:
    arrive_s = depart_s + way_s
    leave_s = arrive_s + stay_s
    return [
        Piece(depart_s, mode, start, end, arrive_s),
        Piece(arrive_s, stay, end, end),
        Piece(leave_s, mode, end, start, leave_s + way_s),
    ]


def errand(
    life: Life, who: Person, base: Point, sec: float, day: int, slot: int, from_s: float, span_s: float
) -> list[Piece]:
    number = drawn(who.own, journeys.STREAM_OUTING, 4 * day + slot)
    if number & 0xFFFF >= (36_000, 32_700, 26_200)[slot]:
        return []
    depart_s = from_s + span_s * fraction(number, 16)
    if depart_s > 20 * HOUR:
        return []
    more = mixed(number)
    length_m = 150.0 + 8_000.0 * fraction(number, 32) ** 3
    # The length itself, not that of the rounded points, decides on the mode.
    mode = journeys.WALKING if length_m <= 1_500 else journeys.RIDING if length_m <= 6_000 else journeys.DRIVING
    pace = 1.25 if length_m <= 1_500 else 4.5 if length_m <= 6_000 else min(9 + length_m * 0.0002, 20.0)
    way_s = length_m / (pace * who.quick)
    end = moved(base, length_m, more >> 16 & 1023, sec, life)
    return there_and_back(depart_s, base, end, way_s, mode, 600.0 + 6_000.0 * fraction(more, 0) ** 2, journeys.OUT)


def day_off(life: Life, who: Person, base: Point, sec: float, stay: int, day: int) -> list[Piece]:
    pieces = []
    for slot, (from_s, span_s) in enumerate(((4.0, 2.5), (9.5, 2.25), (14.5, 1.5))):
        outing = errand(life, who, base, sec, day, slot, from_s * HOUR, span_s * HOUR)
        pieces += outing
        if outing:
            pieces.append(Piece(outing[-1].until_s, stay, base, base))
    return [Piece(0.0, stay, base, base), *pieces]


def working_day(life: Life, who: Person, day: int) -> list[Piece] | None:
    """None if that is no working day."""
    if who.trait >> 16 & 0xFFFF >= 36_700:
        return None
    today = drawn(who.own, journeys.STREAM_TODAY, day)
    if today & 0xFFFF >= (61_600 if (day + 3) % 7 < 5 else 13_100):
        return None
    shift = who.trait >> 32 & 0xFFFF < 7_900
    if shift:
        depart_s, stay_s = (1.0 + 12.5 * fraction(who.trait, 48)) * HOUR, 8 * HOUR
    else:
        hours = mixed(who.trait)
        depart_s = (3.75 + 1.6 * bell(hours)) * HOUR + 900.0 * (fraction(today, 16) - 0.5)
        stay_s = (8.75 + 1.2 * bell(mixed(hours))) * HOUR + 900.0 * (fraction(today, 32) - 0.5)

    number = drawn(who.own, journeys.STREAM_WORK)
    keep, first, other = life.country.work[who.place, number & 15].tolist()
    lat, lng, reach, sec, sec_slope = life.country.rows[first if number >> 32 < keep else other, :5].tolist()
    spot = mixed(number)
    north = bell(spot) * 0.7 * reach
    work = (lat + north, lng + bell(mixed(spot)) * 0.7 * reach * (sec + sec_slope * north))
    way_s, mode = way(who.home, work, who.sec, who.quick)
    if math.hypot((work[0] - who.home[0]) / METRE, (work[1] - who.home[1]) / METRE / who.sec) > 70_000:
        return None
    pieces = [Piece(0.0, journeys.AT_HOME, who.home, who.home)]
    commute = there_and_back(depart_s, who.home, work, way_s, mode, stay_s, journeys.AT_WORK)
    pieces += commute[:2]
    number = drawn(who.own, journeys.STREAM_LUNCH, day)
    if not shift and number & 0xFFFF < 26_200:
        length_m = 100.0 + 600.0 * fraction(number, 16)
        end = moved(work, length_m, number >> 48 & 1023, who.sec, life)
        leave_s = 8 * HOUR + 1_200.0 * fraction(number, 32)
        lunch = there_and_back(
            leave_s, work, end, length_m / (1.25 * who.quick), journeys.WALKING, 1_500.0, journeys.OUT
        )
        pieces += [*lunch, Piece(lunch[-1].until_s, journeys.AT_WORK, work, work)]
    free_s = commute[2].until_s
    pieces += [commute[2], Piece(free_s, journeys.AT_HOME, who.home, who.home)]
    outing = errand(life, who, who.home, who.sec, day, 2, max(free_s, 14.5 * HOUR), 1.5 * HOUR)
    if outing:
        pieces += [*outing, Piece(outing[-1].until_s, journeys.AT_HOME, who.home, who.home)]
    return pieces


def festival_day(life: Life, who: Person, day: int) -> list[Piece] | None:
    """None if the phone's owner does not go."""
    festival, chance = life.festival, float(life._land.rows[who.place, 6])
    if festival is None:
        return None
    first, since_ms = divmod(festival.from_ms + 4 * 3_600_000, DAY_MS)
    held = day == first if not festival.every_days else day >= first and (day - first) % festival.every_days == 0
    number = drawn(who.own, journeys.STREAM_FESTIVAL, day)
    if not held or fraction(number, 0) >= chance:
        return None
    spot = mixed(number)
    sec = round(1 / math.cos(math.radians(festival.lat)), 12)
    away_m = math.sqrt(fraction(spot, 0)) * festival.radius_m
    end = moved((festival.lat, festival.lng), away_m, spot >> 16 & 1023, sec, life)
    if math.hypot((end[0] - who.home[0]) / METRE, (end[1] - who.home[1]) / METRE / who.sec) > 60_000:
        return None
    way_s, mode = way(who.home, end, who.sec, who.quick)
    arrive_s = since_ms / 1_000 - 2_700 * fraction(number, 16)
    leave_s = (since_ms + festival.until_ms - festival.from_ms) / 1_000 + 2_400 * fraction(number, 32)
    there = there_and_back(arrive_s - way_s, who.home, end, way_s, mode, leave_s - arrive_s, journeys.AT_FESTIVAL)
    home = Piece(0.0, journeys.AT_HOME, who.home, who.home)
    return [home, *there, Piece(there[-1].until_s, journeys.AT_HOME, who.home, who.home)]


def trip_day(life: Life, who: Person, day: int) -> list[Piece] | None:
    """None if no trip is on."""
    period, since = divmod(day + (who.own >> 40) * 28 // 2**24, 28)
    number = drawn(who.own, journeys.STREAM_TRIP, period)
    if number & 0xFFFF >= int(life._land.trip_q16):
        return None
    nights = 1 + int(fraction(number, 16) * 6)
    since -= int(fraction(number, 32) * 21)
    if not 0 <= since <= nights:
        return None
    hubs = life.country.hubs
    hub = int(life.country.rows[who.place, 5])
    more = mixed(number)
    slot = (more & 0xFFFFFFFF) * len(hubs) >> 32
    other = slot if more >> 32 < int(life.country.trip_keep[hub, slot]) else int(life.country.trip_other[hub, slot])
    spot = mixed(more)
    lat, lng, hotel_sec, reach = hubs[other, :4].tolist()
    hotel = (lat + 0.5 * bell(spot) * reach, lng + 0.5 * bell(mixed(spot)) * reach * hotel_sec)
    if 0 < since < nights:
        return day_off(life, who, hotel, hotel_sec, journeys.AT_HOTEL, day)

    def apart_m(column: int) -> float:
        return (
            2
            * 6_371_008.8
            * math.asin(math.dist(hubs[hub, column + 2 : column + 5], hubs[other, column + 2 : column + 5]) / 2)
        )

    flies = apart_m(4) / 1_000 > 300 + 1_200 * fraction(number, 48)
    column, mode, wait_s, pace = (9, journeys.IN_AIR, 4_500, 217) if flies else (4, journeys.IN_TRAIN, 1_500, 62)
    ride_s = apart_m(column) / pace
    gates = [(hubs[i, column], hubs[i, column + 1]) for i in (hub, other)]
    vectors = [hubs[i, column + 2 : column + 5].tolist() for i in (hub, other)]
    doors, secs = [who.home, hotel], [who.sec, hotel_sec]
    stays = [journeys.AT_HOME, journeys.AT_HOTEL]
    if since == nights:
        gates, vectors, doors, secs, stays = (both[::-1] for both in (gates, vectors, doors, secs, stays))  # type: ignore[assignment]
    leaving = mixed(spot + (1 if since == 0 else 3))
    leave_s = (2 + 6 * fraction(leaving, 0)) * HOUR
    to_gate_s, to_gate = way(doors[0], gates[0], secs[0], who.quick)
    to_door_s, to_door = way(doors[1], gates[1], secs[1], who.quick)
    at_gate_s = leave_s + to_gate_s
    boards_s = at_gate_s + wait_s
    lands_s = boards_s + ride_s
    home_s = lands_s + to_door_s
    return [
        Piece(0.0, stays[0], doors[0], doors[0]),
        Piece(leave_s, to_gate, doors[0], gates[0], at_gate_s),
        Piece(at_gate_s, journeys.WAITING, gates[0], gates[0]),
        Piece(boards_s, mode, gates[0], gates[1], lands_s, (vectors[0], vectors[1])),
        Piece(lands_s, to_door, gates[1], doors[1], home_s),
        Piece(home_s, stays[1], doors[1], doors[1]),
    ]


def day_of(life: Life, who: Person, day: int) -> list[Piece]:
    """Everything a phone's owner does from 4:00 to 4:00."""
    return (
        trip_day(life, who, day)
        or festival_day(life, who, day)
        or working_day(life, who, day)
        or day_off(life, who, who.home, who.sec, journeys.AT_HOME, day)
    )


def whereabouts(life: Life, phone: int, at_ms: int) -> tuple[float, float, int]:
    """Degrees and mode."""
    day, since_ms = divmod(at_ms + 4 * 3_600_000, DAY_MS)
    now_s = since_ms / 1_000
    pieces = day_of(life, person(life, phone), day)
    assert all(one.from_s <= other.from_s for one, other in itertools.pairwise(pieces))
    piece = [piece for piece in pieces if piece.from_s < now_s or piece.from_s == 0][-1]
    return *piece.at(now_s), piece.mode


# ---- which phone pings when ----


def arrived_before(life: Life, partner: int, at_ms: int, rate_scale: float) -> int:
    rhythm = life._rhythm(rate_scale, even=False)
    day, since_ms = divmod(at_ms + 8 * 3_600_000, DAY_MS)
    quarter, rest_ms = divmod(since_ms, 900_000)
    before, after = rhythm.before[partner, quarter : quarter + 2].tolist()
    return day * int(rhythm.daily[partner]) + min(
        int(before + (after - before) * (rest_ms * (1 / 900_000))), int(after)
    )


def sender(life: Life, partner: int, number: int) -> int:
    first, stop = life.first_phones[partner : partner + 2].tolist()
    count = stop - first
    turn, position = divmod(number, count)
    if count < 16:
        return int(first + position)
    turn_key = drawn(mixed(life.seed + int(kernels.STREAM_ORDER) + partner), 0, turn)
    borders = [block * count // 16 for block in range(17)]
    block = max(i for i in range(16) if borders[i] <= position)
    size = borders[block + 1] - borders[block]
    bits = (-(-count // 16) - 1).bit_length()
    mask, shift = (1 << bits) - 1, max(1, (bits + 1) // 2)
    key = drawn(turn_key, 0, block)
    inner = position - borders[block]
    while True:
        for part, factor in ((key, 0xD1342543DE82EF95), (key >> 32, 0xAF251AF3B0F025B5), (0, 0xBF58476D1CE4E5B9)):
            inner = (inner ^ part) * factor & mask
            inner ^= inner >> shift
        if inner < size:
            return int(first + borders[block] + inner)


def in_stretch(own: int, stream: object, share_q32: int, at_ms: int, period_ms: int, ms_min: int, ms_max: int) -> bool:
    period, since_ms = divmod(at_ms + (own * period_ms >> 64), period_ms)
    draw = drawn(own, stream, period)
    more = mixed(draw)
    length_ms = ms_min + (more * (ms_max - ms_min + 1) >> 64)
    start_ms = mixed(more) * (period_ms - length_ms + 1) >> 64
    return draw >> 32 < share_q32 and start_ms <= since_ms < start_ms + length_ms


def is_online(life: Life, phone: int, at_ms: int) -> bool:
    who = person(life, phone)
    habits = life._habits
    minute, hour = 60_000, 3_600_000
    if in_stretch(who.own, kernels.STREAM_DARK, int(habits.short_dark_q32), at_ms, 6 * hour, 5 * minute, 180 * minute):
        return False
    if in_stretch(who.own, kernels.STREAM_LONG_DARK, int(habits.long_dark_q32), at_ms, 20 * DAY_MS, DAY_MS, 5 * DAY_MS):
        return False
    day = (at_ms + 4 * hour) // DAY_MS
    trip = drawn(who.own, journeys.STREAM_TRIP, (day + (who.own >> 40) * 28 // 2**24) // 28)
    flying = whereabouts(life, phone, at_ms)[2] == journeys.IN_AIR
    return not flying or drawn(trip, kernels.STREAM_WIFI) >> 32 < int(habits.wifi_q32)


def clock_offset_ms(faults: tuple[ClockFault, ...], own: int) -> int:
    draw = drawn(own, kernels.STREAM_CLOCK)
    until = 0.0
    for fault in faults:
        until += fault.share
        if (draw >> 32) < round(until * 2**32):
            return fault.ahead_ms_min + (mixed(draw) * (fault.ahead_ms_max - fault.ahead_ms_min + 1) >> 64)
    return 0


@dataclass(frozen=True)
class ReferencePing:
    partner: int
    device_id: str
    lat_e7: int
    lng_e7: int
    observed_at_ms: int
    at_ms: int


def device_id(style: str, head: int) -> str:
    tail = drawn(head, world_kernels.STREAM_ID_TAIL)
    if style == "hex16":
        return f"{head:016x}"
    if style == "hex32":
        return f"{head:016x}{tail:016x}"
    if style == "decimal21":
        return f"u{head:020d}"
    if style == "uuid36":
        text = f"{head & ~0xF000 | 0x4000:016x}{tail & 0x3FFFFFFFFFFFFFF0 | 1 << 63 | head >> 12 & 15:016x}"
        return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUV"
    return "".join(digits[word >> 5 * (12 - i) & 31] for word in (head, tail) for i in range(13))


def pings(life: Life, from_ms: int, until_ms: int, rate_scale: float) -> list[ReferencePing]:
    """Every ping of a slice, millisecond by millisecond."""
    found = []
    id_base = drawn(life.seed, world_kernels.STREAM_ID)
    for at_ms in range(from_ms, until_ms):
        for partner, behaviour in enumerate(life.partners):
            numbers = range(
                arrived_before(life, partner, at_ms, rate_scale), arrived_before(life, partner, at_ms + 1, rate_scale)
            )
            for number in numbers:
                phone = sender(life, partner, number)
                draw = drawn(mixed(life.seed + int(kernels.STREAM_LIFE_DELAY) + partner), 0, number)
                if draw >> 32 < round(behaviour.late_share * 2**32):
                    delay_ms = mixed(draw) * (behaviour.late_ms_max + 1) >> 64
                else:
                    delay_ms = int(behaviour.delay_ms_median * float(life._habits.delay_curve[draw & 1023]))
                seen_ms = at_ms - delay_ms
                if not is_online(life, phone, seen_ms):
                    continue
                who = person(life, phone)
                lat, lng, _mode = whereabouts(life, phone, seen_ms)
                noise = drawn(who.own, world_kernels.STREAM_JITTER, number)
                on_trip = trip_day(life, who, (seen_ms + 4 * 3_600_000) // DAY_MS) is not None
                sec = 1 / math.cos(math.radians(lat)) if on_trip else who.sec
                cos, sin = life._land.direction[noise & 1023].tolist()
                drift = 24.0 * (noise >> 32) / 2**32 * METRE
                found.append(
                    ReferencePing(
                        partner,
                        device_id(behaviour.id_style, mixed(id_base + phone)),
                        math.floor((lat + drift * cos) * 1e7 + 0.5),
                        math.floor((lng + drift * sin * sec) * 1e7 + 0.5),
                        max(0, seen_ms + clock_offset_ms(life.clock_faults, who.own)),
                        at_ms,
                    )
                )
    return found
