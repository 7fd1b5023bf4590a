"""Every loop of the world: all that is known about a phone is computed from (key, phone index, step).

    ping number --> round, position --> phone          draw_phones     a permutation per round
    phone       --> partner, id                        draw_partners, write_ids
    phone       --> place --> home                     draw_places
    phone, step --> home or errand --> jitter          locate
    ping number --> delay                              draw_times

Random numbers are counter-based (Salmon et al., SC'11): `mix(number + stream)` is a fresh u64 per stream, so any phone
can be computed alone, in any order, by any process. `mix` is the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA
2014), a bijection of u64: ids made from it cannot collide.

Uniform draws and distances are IEEE additions and multiplications of tables rounded to 12 digits, without fused
operations: the same bits on every machine.
"""

from __future__ import annotations

import math

import numpy as np

from geoindex.columns import E7, F64, I32, I64, U8, U16, U32, U64
from geoindex.numba_typing import inline_kernel, kernel, mulhi_lo

# ---- units and limits ----

DEGREES_PER_M = 180.0 / (math.pi * 6_371_008.8)
"""Along a meridian of the sphere of the matching rules."""
JITTER_M_MAX = 24.0
"""Two pings from one spot are at most 48 m apart (plus rounding to 1.1 cm): "within 50 m"."""
ERRAND_M_MIN = 150.0
ERRAND_M_MAX = 4_940.0
"""Home to errand and back; with the jitter of both ends a move is 0.1 to 5 km."""
DELAY_MS_MAX = 2_000
LATE_MS_MAX = 120_000
LATE_SHARE_Q16 = 1_311
"""2 % of the pings are late (in 1/65536)."""

# Columns of a place row (f64).
PLACE_LAT, PLACE_LNG, PLACE_REACH, PLACE_SEC, PLACE_SEC_SLOPE = 0, 1, 2, 3, 4
"""Degrees, degrees, reach of homes each way (degrees of latitude), 1/cos(lat), its change per degree of latitude."""

DIRECTION_COUNT = 1024

# Id styles: what `write_ids` branches on, and how long each id is.
STYLE_HEX16, STYLE_HEX32, STYLE_UUID36, STYLE_DECIMAL21, STYLE_BASE32_26 = 0, 1, 2, 3, 4
STYLE_BYTES = (16, 32, 36, 21, 26)

# ---- random numbers ----

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)
ODD_1 = np.uint64(0xD1342543DE82EF95)
ODD_2 = np.uint64(0xAF251AF3B0F025B5)

# One stream per thing drawn: any distinct constants.
STREAM_PARTNER = np.uint64(0x1B873593CC9E2D51)
STREAM_PLACE = np.uint64(0x2545F4914F6CDD1D)
STREAM_NORTH = np.uint64(0x38495AB5E6546B64)
STREAM_EAST = np.uint64(0x4CF5AD432745937F)
STREAM_PHASE = np.uint64(0x52DCE729DA3E39CB)
STREAM_MOMENT = np.uint64(0x633BCF1D7C5A2E97)
STREAM_ERRAND = np.uint64(0x7F4A7C159E3779B9)
STREAM_JITTER = np.uint64(0x85EBCA6BC2B2AE35)
STREAM_DELAY = np.uint64(0x9FB21C651E98DF25)
STREAM_ROUND = np.uint64(0xA0761D6478BD642F)
STREAM_ID = np.uint64(0xBB67AE8584CAA73B)
STREAM_ID_TAIL = np.uint64(0xC2B2AE3D27D4EB4F)

_LOW_32 = np.uint64(0xFFFFFFFF)
_LOW_16 = np.uint64(0xFFFF)
_PER_2_16 = 1.0 / (1 << 16)
_PER_2_32 = 1.0 / (1 << 32)


@inline_kernel
def mix(number: np.uint64) -> np.uint64:
    """SplitMix64's finalizer: a bijection of u64 in which every input bit flips half of the output."""
    number = (number ^ (number >> np.uint64(30))) * MIX_1
    number = (number ^ (number >> np.uint64(27))) * MIX_2
    return number ^ (number >> np.uint64(31))


@inline_kernel
def phone_hash(key: np.uint64, phone: np.int64 | int) -> np.uint64:
    """The number from which everything about a phone is drawn."""
    return mix(key + np.uint64(phone) * GOLDEN)


@inline_kernel
def below(number: np.uint64, size: np.uint64) -> np.uint64:
    """A random u64 -> [0, size) without a division (Lemire, ACM TOMACS 2019, doi:10.1145/3230636)."""
    high, _ = mulhi_lo(number, size)
    return high


# ---- which phone pings ----


@inline_kernel
def permuted(
    position: np.uint64, phone_count: np.uint64, mask: np.uint64, shift: np.uint64, key: np.uint64
) -> np.uint64:
    """Image of `position` under the permutation of [0, phone_count) named by `key`.

    Odd multiplications and xor-shifts permute [0, mask]; walking the cycle until it is back below `phone_count`
    (fewer than two turns on average) permutes [0, phone_count).
    """
    number = position
    while True:
        number = ((number ^ key) * ODD_1) & mask
        number ^= number >> shift
        number = ((number ^ (key >> np.uint64(32))) * ODD_2) & mask
        number ^= number >> shift
        number = (number * MIX_1) & mask
        number ^= number >> shift
        if number < phone_count:
            return number


@kernel
def draw_phones(
    key: np.uint64,
    phone_count: np.uint64,
    mask: np.uint64,
    shift: np.uint64,
    first_ping: np.uint64,
    phone: U32,
    step: U32,
) -> None:
    """Pings `first_ping`, + 1, ... -> their senders (`phone` u32[n]) and how many each sent before (`step` u32[n]).

    `mask`: the least 2^b - 1 not below `phone_count` - 1; `shift`: b / 2 rounded up, at least 1.
    Each round of `phone_count` pings is one permutation of all phones; the step is the round.
    """
    turn = first_ping // phone_count
    position = first_ping % phone_count
    turn_key = mix(mix(key + STREAM_ROUND) + turn * GOLDEN)
    for row in range(len(phone)):
        phone[row] = permuted(position, phone_count, mask, shift, turn_key)
        step[row] = turn
        position += np.uint64(1)
        if position == phone_count:
            position = np.uint64(0)
            turn += np.uint64(1)
            turn_key = mix(mix(key + STREAM_ROUND) + turn * GOLDEN)


@kernel
def draw_times(key: np.uint64, first_ping: np.uint64, now_ms: int, observed_at_ms: I64) -> None:
    """When each ping was observed: up to 2 s before `now_ms`, 2 % of them up to 2 minutes before."""
    base = mix(key + STREAM_DELAY)
    for row in range(len(observed_at_ms)):
        number = mix(base + (first_ping + np.uint64(row)) * GOLDEN)
        delay_ms_max = LATE_MS_MAX if (number & _LOW_16) < np.uint64(LATE_SHARE_Q16) else DELAY_MS_MAX
        observed_at_ms[row] = now_ms - np.int64(below(number, np.uint64(delay_ms_max + 1)))


# ---- who a phone is ----


@kernel
def draw_partners(
    key: np.uint64, phone: U32, cumulative_q32: U64, partner_id_bytes: U32, partner: U16, id_end: U32
) -> None:
    """Partner of each phone -> `partner` u16[n], and where its id will end -> `id_end` u32[n].

    `cumulative_q32`: shares summed up, in 1/2^32, the last one 2^32. `partner_id_bytes`: length of a partner's ids.
    """
    end = np.uint32(0)
    for row in range(len(phone)):
        number = mix(phone_hash(key, phone[row]) + STREAM_PARTNER) >> np.uint64(32)
        chosen = np.int64(0)
        for other in range(len(cumulative_q32) - 1):
            chosen += np.int64(number >= cumulative_q32[other])
        partner[row] = chosen
        end += partner_id_bytes[chosen]
        id_end[row] = end


@inline_kernel
def write_hex(word: np.uint64, id_bytes: U8, start: np.int64 | int) -> None:
    """16 lower-case hex digits of `word`, most significant first. Half a word spreads over 8 bytes in three steps."""
    for half in range(2):
        digits = (word >> np.uint64(32)) if half == 0 else (word & _LOW_32)
        digits = (digits | (digits << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
        digits = (digits | (digits << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        digits = (digits | (digits << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
        letters = ((digits + np.uint64(0x0606060606060606)) >> np.uint64(4)) & np.uint64(0x0101010101010101)
        digits += np.uint64(0x3030303030303030) + letters * np.uint64(39)
        for position in range(8):
            id_bytes[start + 8 * half + position] = digits >> np.uint64(56 - 8 * position)


@inline_kernel
def write_decimal(number: np.uint64, id_bytes: U8, start: np.int64 | int) -> None:
    """Ten decimal digits of a number below 10^10, most significant first."""
    high = number // np.uint64(100_000)
    low = number - high * np.uint64(100_000)
    for position in range(4, -1, -1):
        tenth_high = high // np.uint64(10)
        tenth_low = low // np.uint64(10)
        id_bytes[start + position] = high - tenth_high * np.uint64(10) + np.uint64(48)
        id_bytes[start + 5 + position] = low - tenth_low * np.uint64(10) + np.uint64(48)
        high = tenth_high
        low = tenth_low


@inline_kernel
def write_base32(word: np.uint64, count: int, id_bytes: U8, start: np.int64 | int) -> None:
    """The lowest `count` groups of five bits, highest first: digits, then A to V (RFC 4648, "base32hex")."""
    for position in range(count):
        digit = (word >> np.uint64(5 * (count - 1 - position))) & np.uint64(31)
        id_bytes[start + position] = digit + np.uint64(48) + (np.uint64(7) if digit > np.uint64(9) else np.uint64(0))


@kernel
def write_ids(key: np.uint64, phone: U32, partner: U16, partner_style: U8, id_end: U32, id_bytes: U8) -> None:
    """Id of each phone -> `id_bytes` u8[id_end[-1]], in the style of its partner.

    Every style holds all 64 bits of a bijection of the phone's index, so ids of one style never collide.
    """
    base = mix(key + STREAM_ID)
    start = np.int64(0)
    for row in range(len(phone)):
        head = mix(base + np.uint64(phone[row]))
        style = partner_style[partner[row]]
        if style == STYLE_HEX16:
            write_hex(head, id_bytes, start)
        elif style == STYLE_HEX32:
            write_hex(head, id_bytes, start)
            write_hex(mix(head + STREAM_ID_TAIL), id_bytes, start + 16)
        elif style == STYLE_UUID36:
            # RFC 9562, version 4. The version displaces four bits of `head`, which move to the end of the tail.
            tail = mix(head + STREAM_ID_TAIL)
            version = (head & ~np.uint64(0xF000)) | np.uint64(0x4000)
            tail = (tail & np.uint64(0x3FFFFFFFFFFFFFF0)) | (np.uint64(1) << np.uint64(63))
            tail |= (head >> np.uint64(12)) & np.uint64(15)
            # Each write puts its last group into place; what came before it moves left to make room for dashes.
            write_hex(tail, id_bytes, start + 20)
            for position in range(4):
                id_bytes[start + 19 + position] = id_bytes[start + 20 + position]
            id_bytes[start + 23] = 45
            write_hex(version, id_bytes, start + 2)
            for position in range(8):
                id_bytes[start + position] = id_bytes[start + 2 + position]
            id_bytes[start + 8] = 45
            for position in range(4):
                id_bytes[start + 9 + position] = id_bytes[start + 10 + position]
            id_bytes[start + 13] = 45
            id_bytes[start + 18] = 45
        elif style == STYLE_DECIMAL21:
            id_bytes[start] = 117
            high = head // np.uint64(10_000_000_000)
            write_decimal(high, id_bytes, start + 1)
            write_decimal(head - high * np.uint64(10_000_000_000), id_bytes, start + 11)
        else:
            tail = mix(head + STREAM_ID_TAIL)
            write_base32(head, 13, id_bytes, start)
            write_base32(tail, 13, id_bytes, start + 13)
        start = np.int64(id_end[row])


# ---- where a phone is ----


@inline_kernel
def place_of(key: np.uint64, phone: np.int64 | int, threshold: U64, alias: U32) -> np.int64:
    """Index of the place where a phone is at home, by the place's share of the people.

    Walker's alias method (Vose, IEEE TSE 17(9), 1991), fed with multiples of the golden ratio instead of random
    numbers: they fill [0, 1) so evenly that 10^6 phones give every province its share to better than 1 %, where a
    province of 1,000 phones would be off by 3 % in a random draw.
    """
    number = mix(key + STREAM_PLACE) + np.uint64(phone) * GOLDEN
    column, fraction = mulhi_lo(number, np.uint64(len(threshold)))
    return np.int64(column) if fraction < threshold[np.int64(column)] else np.int64(alias[np.int64(column)])


@kernel
def draw_places(key: np.uint64, phone: U32, threshold: U64, alias: U32, place: U32) -> None:
    """Index of the place where each phone is at home -> `place` u32[n]."""
    for row in range(len(phone)):
        place[row] = place_of(key, phone[row], threshold, alias)


@inline_kernel
def bell(number: np.uint64) -> float:
    """Four 16-bit draws summed up and scaled to [-1, 1]: nearly a Gaussian of sigma 0.289, cut at 3.46 sigma."""
    total = (
        (number & _LOW_16)
        + ((number >> np.uint64(16)) & _LOW_16)
        + ((number >> np.uint64(32)) & _LOW_16)
        + (number >> np.uint64(48))
    )
    return (np.float64(total) - 131_070.0) * (1.0 / 131_070.0)


@inline_kernel
def moves_made(own: np.uint64, step: np.uint64, moved_q32: np.uint64) -> np.uint64:
    """How often a phone has moved when it sends ping `step`.

    Its inner clock starts anywhere in [0, 1) and advances by `moved_q32` / 2^32 a ping; move m happens at a random
    moment of [m, m + 1 - moved_q32 / 2^32]. So each ping moves with exactly that probability, at most one move lies
    between two pings, and stays are of random length.
    """
    inner = step * moved_q32 + (mix(own + STREAM_PHASE) >> np.uint64(32))
    whole = inner >> np.uint64(32)
    slack = (np.uint64(1) << np.uint64(32)) - moved_q32 + np.uint64(1)
    moment = below(mix(own + STREAM_MOMENT + whole * GOLDEN), slack)
    return whole + np.uint64((inner & _LOW_32) >= moment)


@kernel
def locate(
    key: np.uint64,
    phone: U32,
    step: U32,
    moved_q32: np.uint64,
    threshold: U64,
    alias: U32,
    place_rows: F64,
    direction: F64,
    lat_e7: I32,
    lng_e7: I32,
) -> None:
    """Where each phone is at ping `step` of its life -> `lat_e7`, `lng_e7` i32[n].

    After an even number of moves it is at home, after an odd number on an errand 0.15 to 4.94 km from home; every
    ping is off by up to 24 m. `place_rows` f64[places, 5]; `direction` f64[1024, 2]: cosine and sine.
    `moved_q32`: share of the pings that come from a phone that moved, in 1/2^32.
    """
    for row in range(len(phone)):
        own = phone_hash(key, phone[row])
        place = place_of(key, phone[row], threshold, alias)

        north = bell(mix(own + STREAM_NORTH)) * place_rows[place, PLACE_REACH]
        sec = place_rows[place, PLACE_SEC] + place_rows[place, PLACE_SEC_SLOPE] * north
        east = bell(mix(own + STREAM_EAST)) * place_rows[place, PLACE_REACH]

        moves = moves_made(own, np.uint64(step[row]), moved_q32)
        errand = mix(own + STREAM_ERRAND + moves * GOLDEN)
        away = np.float64(moves & np.uint64(1))
        span_m = ERRAND_M_MIN + (ERRAND_M_MAX - ERRAND_M_MIN) * (np.float64(errand >> np.uint64(32)) * _PER_2_32)
        span = away * span_m * DEGREES_PER_M
        heading = np.int64(errand & np.uint64(DIRECTION_COUNT - 1))

        jitter = mix(own + STREAM_JITTER + np.uint64(step[row]) * GOLDEN)
        drift = JITTER_M_MAX * (np.float64(jitter >> np.uint64(32)) * _PER_2_32) * DEGREES_PER_M
        turn = np.int64(jitter & np.uint64(DIRECTION_COUNT - 1))

        north += span * direction[heading, 0] + drift * direction[turn, 0]
        east += span * direction[heading, 1] + drift * direction[turn, 1]
        lat_e7[row] = np.int32(math.floor((place_rows[place, PLACE_LAT] + north) * E7 + 0.5))
        lng_e7[row] = np.int32(math.floor((place_rows[place, PLACE_LNG] + east * sec) * E7 + 0.5))
