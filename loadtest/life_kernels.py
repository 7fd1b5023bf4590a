"""Which phone pings when: the loops of `loadtest.life`. Where it is then is `loadtest.journey_kernels`' business.

    time         --> number of a partner's ping     arrived_before    a curve over the day, the same every day
    ping number  --> round, position --> phone      sender            sixteen blocks, a permutation of each per round
    ping number  --> delay --> when it was seen     delay_ms
    phone, time  --> dark or not                    is_dark, is_offline
    phone        --> how wrong its clock is         clock_offset_ms

A partner's phones are a range of phone indexes, and its pings are numbered from 1970 on. A round is one ping of each
of its phones, so between two pings of a phone lies its partner's interval, up to a sixteenth more or less. Whatever
begins at a ping's number is the same for whoever makes it: slices and workers share one stream without a word.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from geoindex.columns import F64, I64, U16, U32, U64, Bool
from geoindex.numba_typing import inline_kernel, lean_kernel
from loadtest.journey_kernels import (
    AWAY,
    DAY_MS,
    IN_AIR,
    LIFE_DAY_OFFSET_MS,
    NO_TRIP,
    Int,
    Land,
    Truth,
    mode_of,
    trip_on,
)
from loadtest.world_kernels import GOLDEN, below, mix, permuted, phone_hash

BEIJING_OFFSET_MS = 8 * 3_600_000
QUARTER_MS = 900_000
QUARTERS = 96
"""Knots of the curve of a day: every quarter of an hour, Beijing time."""
BLOCKS = 16
SUBSTITUTES_MAX = 16
"""So many other phones are asked when the one whose turn it is is dark, before a ping is given up."""
DELAY_STEPS = 1024

SHORT_DARK_MS = 6 * 3_600_000
SHORT_DARK_MS_MIN, SHORT_DARK_MS_MAX = 5 * 60_000, 180 * 60_000
"""In every 6 hours a phone may be dark once, for 5 minutes to 3 hours: a tunnel, a lift, an empty battery."""
LONG_DARK_MS = 20 * DAY_MS
LONG_DARK_MS_MIN, LONG_DARK_MS_MAX = 1 * DAY_MS, 5 * DAY_MS
"""In every 20 days once, for 1 to 5 days: switched off, in a drawer."""
LAST_SEEN_STEP_MS = 3_600_000
LAST_SEEN_STEPS = 6

STREAM_ORDER = np.uint64(0x0D2B74407B1CE6E9)
STREAM_LIFE_DELAY = np.uint64(0x1CA2D6F0B5A3C9E1)
STREAM_DARK = np.uint64(0x2D358DCCAA6C78A5)
STREAM_LONG_DARK = np.uint64(0x3BD39E10CB0EF593)
STREAM_CLOCK = np.uint64(0x43B0D7E5CA5A9C15)
STREAM_SUBSTITUTE = np.uint64(0x589965CC75374CC3)
STREAM_WIFI = np.uint64(0x6E789E6AA1B965F4)
STREAM_LAST_SEEN = np.uint64(0x7B4A3C2D1E0F9687)

_LOW_16 = np.uint64(0xFFFF)
_PER_QUARTER = 1.0 / QUARTER_MS


class Habits(NamedTuple):
    """How partners' apps, phones and clocks behave."""

    first_phone: I64
    """Phones of partner p: `first_phone[p]` to `first_phone[p + 1]`, i64[partners + 1]."""
    block_mask: U64
    block_shift: U64
    """How `permuted` mixes a sixteenth of a partner's phones: u64[partners] each."""
    id_bytes: U32
    delay_ms: F64
    """Median delay of each partner, f64[partners]."""
    delay_curve: F64
    """Quantiles of the delay as multiples of its median, f64[1024]."""
    late_q32: U64
    late_ms_max: U64
    """Share of the pings that are late instead, and by how much at most: u64[partners] each."""
    clock_until_q32: U64
    clock_ms_min: I64
    clock_ms_span: U64
    """Clock faults: shares summed up, least offset, width of the range + 1; [faults] each, maybe none."""
    short_dark_q32: np.uint64
    long_dark_q32: np.uint64
    wifi_q32: np.uint64


class Rhythm(NamedTuple):
    """Pings of each partner: `before` f64[partners, 97] whole numbers, those of a day that arrive before each quarter
    of an hour (Beijing time); `daily` i64[partners]: in a whole day, `before[:, 96]`.
    """

    before: F64
    daily: I64


# ---- when ----


@inline_kernel
def arrived_before(rhythm: Rhythm, partner: Int, at_ms: Int) -> Int:
    """How many pings of a partner arrive before a moment, counted from 1970 in Beijing: never falls."""
    local_ms = at_ms + BEIJING_OFFSET_MS
    day = local_ms // DAY_MS
    quarter = (local_ms - day * DAY_MS) // QUARTER_MS
    since_ms = local_ms - day * DAY_MS - quarter * QUARTER_MS
    before, after = rhythm.before[partner, quarter], rhythm.before[partner, quarter + 1]
    within = min(math.floor(before + (after - before) * (np.float64(since_ms) * _PER_QUARTER)), after)
    return np.int64(day * rhythm.daily[partner] + np.int64(within))


@inline_kernel
def arrival_ms(rhythm: Rhythm, partner: Int, number: Int, from_ms: Int, until_ms: Int) -> Int:
    """When ping `number` arrives: the first ms of [from_ms, until_ms) that ends behind it, or `until_ms`."""
    at_ms = from_ms
    while at_ms < until_ms and arrived_before(rhythm, partner, at_ms + 1) <= number:
        local_ms = at_ms + BEIJING_OFFSET_MS
        day = local_ms // DAY_MS
        quarter = (local_ms - day * DAY_MS) // QUARTER_MS
        start_ms = at_ms - (local_ms - day * DAY_MS - quarter * QUARTER_MS)
        within = np.float64(number + 1 - day * rhythm.daily[partner])
        before, after = rhythm.before[partner, quarter], rhythm.before[partner, quarter + 1]
        if within > after:
            at_ms = start_ms + QUARTER_MS
            continue
        # Inside this quarter: 2 ms short of where the line crosses, for the division rounds.
        guess_ms = start_ms + np.int64((within - before) / (after - before) * QUARTER_MS) - 2
        at_ms = max(at_ms + 1, guess_ms)
    return min(at_ms, until_ms)


@inline_kernel
def delay_ms(habits: Habits, key: np.uint64, partner: Int, number: Int) -> Int:
    """How long a ping is on its way: lognormal about the partner's median, some of them late."""
    draw = mix(mix(key + STREAM_LIFE_DELAY + np.uint64(partner)) + np.uint64(number) * GOLDEN)
    if (draw >> np.uint64(32)) < habits.late_q32[partner]:
        return np.int64(below(mix(draw), habits.late_ms_max[partner] + np.uint64(1)))
    step = np.int64(draw & np.uint64(DELAY_STEPS - 1))
    return np.int64(habits.delay_ms[partner] * habits.delay_curve[step])


# ---- who ----


@inline_kernel
def sender(count: Int, mask: np.uint64, shift: np.uint64, turn_key: np.uint64, position: Int) -> Int:
    """Which of a partner's `count` phones sends at a position of a round, in [0, count)."""
    if count < BLOCKS:
        return position
    block = np.int64(np.float64(position) * (np.float64(BLOCKS) / np.float64(count)))
    # The product may round across a border.
    if block >= BLOCKS or (block * count) // BLOCKS > position:
        block -= 1
    elif ((block + 1) * count) // BLOCKS <= position:
        block += 1
    first = (block * count) // BLOCKS
    size = np.uint64(((block + 1) * count) // BLOCKS - first)
    block_key = mix(turn_key + np.uint64(block) * GOLDEN)
    return first + np.int64(permuted(np.uint64(position - first), size, mask, shift, block_key))


# ---- dark ----


@inline_kernel
def in_stretch(
    own: np.uint64, stream: np.uint64, share_q32: np.uint64, at_ms: Int, period_ms: Int, ms_min: Int, ms_max: int
) -> Truth:
    """Whether a moment lies in the stretch that a period of a phone may hold. Periods of phones are out of step."""
    # Unsigned: Python's division of signed numbers takes three times as long, and this runs twice a ping.
    shifted = np.uint64(at_ms) + below(own, np.uint64(period_ms))
    period = shifted // np.uint64(period_ms)
    draw = mix(own + stream + period * GOLDEN)
    if (draw >> np.uint64(32)) >= share_q32:
        return False
    more = mix(draw)
    length_ms = ms_min + np.int64(below(more, np.uint64(ms_max - ms_min + 1)))
    start_ms = np.int64(below(mix(more), np.uint64(period_ms - length_ms + 1)))
    since_ms = np.int64(shifted - period * np.uint64(period_ms)) - start_ms
    return 0 <= since_ms < length_ms


@inline_kernel
def is_dark(habits: Habits, own: np.uint64, at_ms: Int) -> Truth:
    """Whether a phone is dark for hours or for days."""
    if in_stretch(own, STREAM_DARK, habits.short_dark_q32, at_ms, SHORT_DARK_MS, SHORT_DARK_MS_MIN, SHORT_DARK_MS_MAX):
        return True
    return in_stretch(
        own, STREAM_LONG_DARK, habits.long_dark_q32, at_ms, LONG_DARK_MS, LONG_DARK_MS_MIN, LONG_DARK_MS_MAX
    )


@inline_kernel
def is_offline(habits: Habits, land: Land, own: np.uint64, phone: Int, at_ms: Int) -> Truth:
    """Dark, or in the air without the aircraft's Wi-Fi."""
    if is_dark(habits, own, at_ms):
        return True
    day = (at_ms + LIFE_DAY_OFFSET_MS) // DAY_MS
    kind, number = trip_on(own, land.trip_q16, day)
    if kind == NO_TRIP or kind == AWAY:
        return False
    return mode_of(land, phone, at_ms) == IN_AIR and (mix(number + STREAM_WIFI) >> np.uint64(32)) >= habits.wifi_q32


@inline_kernel
def clock_offset_ms(habits: Habits, own: np.uint64) -> Int:
    """How far ahead of the truth a phone's clock is: 0 for most, and the same for life."""
    draw = mix(own + STREAM_CLOCK)
    share = draw >> np.uint64(32)
    faults = len(habits.clock_until_q32)
    if faults == 0 or share >= habits.clock_until_q32[faults - 1]:
        return np.int64(0)
    for fault in range(faults):
        if share < habits.clock_until_q32[fault]:
            return np.int64(habits.clock_ms_min[fault] + np.int64(below(mix(draw), habits.clock_ms_span[fault])))
    return np.int64(0)


# ---- columns ----


@lean_kernel
def start(
    rhythm: Rhythm, from_ms: Int, until_ms: Int, worker: Int, workers: Int, next_number: I64, next_ms: I64
) -> None:
    """First ping of each partner in a slice that worker `worker` of `workers` makes, and when -> two i64[partners]."""
    for partner in range(len(next_number)):
        if next_ms[partner] >= until_ms:
            continue
        first = arrived_before(rhythm, partner, from_ms)
        first += (worker - first % workers) % workers
        next_number[partner] = first
        next_ms[partner] = arrival_ms(rhythm, partner, first, from_ms, until_ms)


@lean_kernel
def draw_pings(
    habits: Habits,
    land: Land,
    rhythm: Rhythm,
    until_ms: Int,
    workers: Int,
    substitute: bool,
    next_number: I64,
    next_ms: I64,
    partner: U16,
    phone: U32,
    number: I64,
    arrived_ms: I64,
    seen_ms: I64,
    observed_ms: I64,
    id_end: U32,
) -> Int:
    """The next pings that arrive before `until_ms`, at most as many as the columns hold -> how many.

    `next_number`, `next_ms` i64[partners]: where to go on, changed here. In order of arrival by the millisecond, within
    one by partner. A ping whose phone is offline when it is seen is left out, or, if `substitute`, sent by another.
    """
    row = 0
    end_bytes = np.uint32(0)
    while row < len(phone):
        chosen = 0
        for other in range(1, len(next_ms)):
            if next_ms[other] < next_ms[chosen]:
                chosen = other
        at_ms = next_ms[chosen]
        if at_ms >= until_ms:
            break
        first = habits.first_phone[chosen]
        count = habits.first_phone[chosen + 1] - first
        stop = arrived_before(rhythm, chosen, at_ms + 1)
        own_number = next_number[chosen]
        turn = own_number // count
        position = own_number - turn * count
        order_key = mix(land.key + STREAM_ORDER + np.uint64(chosen))
        turn_key = mix(order_key + np.uint64(turn) * GOLDEN)
        while own_number < stop and row < len(phone):
            seen = at_ms - delay_ms(habits, land.key, chosen, own_number)
            one = first + sender(count, habits.block_mask[chosen], habits.block_shift[chosen], turn_key, position)
            own = phone_hash(land.key, one)
            offline = is_offline(habits, land, own, one, seen)
            asked = 0
            while offline and substitute and asked < SUBSTITUTES_MAX:
                asked += 1
                draw = mix(mix(turn_key + STREAM_SUBSTITUTE + np.uint64(position)) + np.uint64(asked) * GOLDEN)
                one = first + np.int64(below(draw, np.uint64(count)))
                own = phone_hash(land.key, one)
                offline = is_offline(habits, land, own, one, seen)
            if not offline:
                partner[row] = chosen
                phone[row] = one
                number[row] = own_number
                arrived_ms[row] = at_ms
                seen_ms[row] = seen
                observed_ms[row] = max(0, seen + clock_offset_ms(habits, own))
                end_bytes += habits.id_bytes[chosen]
                id_end[row] = end_bytes
                row += 1
            own_number += workers
            position += workers
            if position >= count:
                turn = own_number // count
                position = own_number - turn * count
                turn_key = mix(order_key + np.uint64(turn) * GOLDEN)
        next_number[chosen] = own_number
        if own_number >= stop:
            next_ms[chosen] = arrival_ms(rhythm, chosen, own_number, at_ms + 1, until_ms)
    return row


@lean_kernel
def draw_last_seen(
    habits: Habits,
    land: Land,
    interval_ms: I64,
    at_ms: Int,
    oldest_ms: Int,
    newest_ms: Int,
    mask: np.uint64,
    shift: np.uint64,
    position: Int,
    partner: U16,
    phone: U32,
    seen_ms: I64,
    observed_ms: I64,
    id_end: U32,
) -> tuple[Int, Int]:
    """Phones in random order from `position` on, as last seen before `at_ms` -> how many fit, next position.

    A phone that was offline an interval ago was last seen some hours before, if it was online then. Those whose clock
    says a time outside [oldest_ms, newest_ms] are left out: nobody would have believed them.
    """
    row = 0
    total = habits.first_phone[-1]
    order_key = mix(land.key + STREAM_ORDER - np.uint64(1))
    end_bytes = np.uint32(0)
    while row < len(phone) and position < total:
        one = np.int64(permuted(np.uint64(position), np.uint64(total), mask, shift, order_key))
        position += 1
        chosen = 0
        while habits.first_phone[chosen + 1] <= one:
            chosen += 1
        own = phone_hash(land.key, one)
        seen = at_ms - np.int64(below(mix(own + STREAM_LAST_SEEN), np.uint64(interval_ms[chosen])))
        tries = 0
        while tries < LAST_SEEN_STEPS and is_offline(habits, land, own, one, seen):
            seen -= LAST_SEEN_STEP_MS
            tries += 1
        observed = seen + clock_offset_ms(habits, own)
        if tries == LAST_SEEN_STEPS or not oldest_ms <= observed <= newest_ms:
            continue
        partner[row] = chosen
        phone[row] = one
        seen_ms[row] = seen
        observed_ms[row] = observed
        end_bytes += habits.id_bytes[chosen]
        id_end[row] = end_bytes
        row += 1
    return row, position


@lean_kernel
def draw_partners_of(habits: Habits, phone: U32, partner: U16, id_end: U32) -> None:
    """Partner of each phone, and where its id will end -> `partner` u16[n], `id_end` u32[n]."""
    end_bytes = np.uint32(0)
    for row in range(len(phone)):
        chosen = 0
        while habits.first_phone[chosen + 1] <= phone[row]:
            chosen += 1
        partner[row] = chosen
        end_bytes += habits.id_bytes[chosen]
        id_end[row] = end_bytes


@lean_kernel
def draw_states(habits: Habits, land: Land, phone: U32, at_ms: I64, online: Bool, clock_ms: I64) -> None:
    """Whether each phone is online at its moment -> `online` bool[n]; its clock's lead -> `clock_ms` i64[n]."""
    for row in range(len(phone)):
        own = phone_hash(land.key, phone[row])
        online[row] = not is_offline(habits, land, own, phone[row], at_ms[row])
        clock_ms[row] = clock_offset_ms(habits, own)
