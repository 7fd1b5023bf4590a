"""The world of the load tests: phones whose owners live, travel and gather, seen by apps that differ.

    life = Life(seed=1, phone_count=1_000_000)
    for batch in life.first_sight(now_ms):                           # a device table as of now
        ...
    for batch in life.pings(now_ms, now_ms + 1_000):                 # what arrives in that second, in order
        ...
    for batch in life.pings_at_rate(200_000, now_ms, now_ms + 1_000, share=(0, 4)):    # a quarter of 200,000
        ...
    lat_e7, lng_e7 = life.where(phones, now_ms)                      # the truth

Nothing is stored per phone and nothing is remembered between calls: `loadtest.life_kernels` (which phone pings when)
and `loadtest.journey_kernels` (where it is then) compute all from (seed, phone index, time). Any slice of time can be
made by any process in any order, and a world of 10^8 phones weighs what one of 10^4 does. Homes are those of
`loadtest.world.World` with the same seed; partners are ranges of phones here, so that each can have its own pace.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from geoindex.columns import E7, F64, I32, I64, PARTNER_COUNT_MAX, U8, U16, U32, Bool, PingBatch
from loadtest import datums, world_kernels
from loadtest import journey_kernels as journeys
from loadtest import life_kernels as kernels
from loadtest.behaviour import (
    DATUMS,
    DAY_MS,
    DEFAULT_CLOCK_FAULTS,
    DEFAULT_FESTIVAL,
    DEFAULT_LIFE_PARTNERS,
    STEADY,
    ClockFault,
    Festival,
    LifePartner,
    festival_in,
)
from loadtest.country import Country, load_country
from loadtest.life_tables import DARK, curve, dark_part, first_phones, habits, land
from loadtest.world import ID_STYLES, PHONE_COUNT_MAX

__all__ = [
    "DEFAULT_CLOCK_FAULTS",
    "DEFAULT_FESTIVAL",
    "DEFAULT_LIFE_PARTNERS",
    "ClockFault",
    "Festival",
    "Life",
    "LifePartner",
    "festival_in",
    "refusals",
]

BATCH_PINGS = 8_192
LIVE_WINDOW_MS = 6 * 3_600_000
FUTURE_TOLERANCE_MS = 5 * 60_000
"""Of the matching rules, unless a deployment's settings say otherwise."""
DARK_SHARE_MAX = 0.25


class Life:
    """Phones and their pings. `phones` in method arguments: integers in [0, phone_count); `at_ms`: one or one each."""

    def __init__(
        self,
        seed: int,
        phone_count: int,
        partners: Sequence[LifePartner] = DEFAULT_LIFE_PARTNERS,
        festival: Festival | None = DEFAULT_FESTIVAL,
        *,
        clock_faults: Sequence[ClockFault] = DEFAULT_CLOCK_FAULTS,
        dark_share: float = 0.05,
        trip_share: float = 0.15,
        wifi_share: float = 0.2,
    ) -> None:
        """`dark_share`: of the phones at any moment, half of them for minutes or hours, half for days. `trip_share`:
        chance of a phone to go on a trip in four weeks. `wifi_share`: of the phones that stay online in the air.

        Raises `ValueError` for what makes no world.
        """
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: required 0 <= seed < 2^64, got {seed}")
        if not 1 <= phone_count <= PHONE_COUNT_MAX:
            raise ValueError(f"phone_count: required 1 to {PHONE_COUNT_MAX}, got {phone_count}")
        if not 0.0 <= dark_share <= DARK_SHARE_MAX:
            raise ValueError(f"dark_share: required 0 to {DARK_SHARE_MAX}, got {dark_share}")
        for name, share in (("trip_share", trip_share), ("wifi_share", wifi_share)):
            if not 0.0 <= share <= 1.0:
                raise ValueError(f"{name}: required 0 to 1, got {share}")
        _check_partners(partners, phone_count)
        if math.fsum(fault.share for fault in clock_faults) > 1.0:
            raise ValueError(f"clock_faults: shares must sum to 1 at most, got {[f.share for f in clock_faults]}")
        self.seed = seed
        self.phone_count = phone_count
        self.partners = tuple(partners)
        self.festival = festival
        self.clock_faults = tuple(clock_faults)
        self.country: Country = load_country()
        self.first_phones = first_phones([partner.share for partner in partners], phone_count)
        """Phones of partner p: `first_phones[p]` to `first_phones[p + 1]`, i64[partners + 1]."""
        self._key = np.uint64(seed)
        self._land = land(self._key, self.country, festival, trip_share)
        self._habits = habits(self.partners, self.first_phones, self.clock_faults, dark_share, wifi_share)
        self._styles = np.array([ID_STYLES[partner.id_style] for partner in partners], np.uint8)
        self._rhythms: dict[tuple[float, bool], kernels.Rhythm] = {}

    @property
    def partner_names(self) -> tuple[str, ...]:
        """In the order that the `partner` column counts: what the settings of the logs should say."""
        return tuple(partner.name for partner in self.partners)

    @property
    def dark_share(self) -> float:
        """Of the phones that are dark at any moment (in the air without Wi-Fi, one in 2,000, not counted)."""
        short, long = (dark_part(float(share) / 2**32, *how) for share, how in zip(self._dark_q32, DARK, strict=True))
        return 1.0 - (1.0 - short) * (1.0 - long)

    @property
    def _dark_q32(self) -> tuple[np.uint64, np.uint64]:
        return self._habits.short_dark_q32, self._habits.long_dark_q32

    # ---- pings ----

    def pings(
        self,
        from_ms: int,
        until_ms: int,
        share: tuple[int, int] = (0, 1),
        rate_scale: float = 1.0,
        batch_size: int = BATCH_PINGS,
        *,
        partners: Sequence[str] | None = None,
        timed: bool = False,
    ) -> Iterator[PingBatch]:
        """Every ping that arrives in [from_ms, until_ms), in order of arrival by the millisecond, WGS-84.

        `share`: (k, n) for every n-th ping of each partner, from the k-th on: worker k of n. `rate_scale`: all phones
        ping so many times as often. `partners`: only these. `timed`: fill `at_ms` with the time of arrival (it makes a
        log entry a recording's, with a clock of its own; leave it out of what is sent). Slices and workers put together
        give each ping once, however they are cut, as long as `rate_scale` is the same. Batches are full but the last.
        """
        if not (rate_scale > 0 and math.isfinite(rate_scale)):
            raise ValueError(f"rate_scale: required more than 0, got {rate_scale}")
        rhythm = self._rhythm(rate_scale, even=False)
        return self._draw(rhythm, from_ms, until_ms, share, batch_size, partners, timed, substitute=False)

    def pings_at_rate(
        self,
        pings_per_s: float,
        from_ms: int,
        until_ms: int,
        share: tuple[int, int] = (0, 1),
        batch_size: int = BATCH_PINGS,
        *,
        partners: Sequence[str] | None = None,
        timed: bool = False,
    ) -> Iterator[PingBatch]:
        """As `pings`, at one rate day and night: what a load test asks for. `pings_per_s`: of all workers together.

        Partners share the rate by their phones and intervals (only `partners`, if given). Every second holds its pings
        to within one a partner: when it is the turn of a phone that is offline, another one of the partner sends.
        """
        if not (0 < pings_per_s <= 1e9):
            raise ValueError(f"pings_per_s: required more than 0, at most 1e9, got {pings_per_s}")
        chosen = self._chosen(partners)
        natural = float((np.diff(self.first_phones) / self._intervals_s)[chosen].sum())
        rhythm = self._rhythm(pings_per_s / natural, even=True)
        return self._draw(rhythm, from_ms, until_ms, share, batch_size, partners, timed, substitute=True)

    def first_sight(self, at_ms: int, batch_size: int = BATCH_PINGS) -> Iterator[PingBatch]:
        """Each live phone once, in random order, as last seen before a moment: fills a device table. Always the same.

        Left out are phones that were dark for the last six hours, and those whose clock the matching rules refuse.
        """
        _check_batch_size(batch_size)
        interval_ms = np.maximum(1, self._intervals_s * 1_000).astype(np.int64)
        bits = (self.phone_count - 1).bit_length()
        mask, shift = np.uint64((1 << bits) - 1), np.uint64(max(1, (bits + 1) // 2))
        position = 0
        while position < self.phone_count:
            columns = _Columns(batch_size)
            drawn, ended = kernels.draw_last_seen(
                self._habits,
                self._land,
                interval_ms,
                at_ms,
                at_ms - LIVE_WINDOW_MS,
                at_ms + FUTURE_TOLERANCE_MS,
                mask,
                shift,
                position,
                columns.partner,
                columns.phone,
                columns.seen_ms,
                columns.observed_ms,
                columns.id_end,
            )
            rows, position = int(drawn), int(ended)
            if rows:
                columns.number[:rows] = -1
                yield self._batch(columns, rows, timed=False)

    def _draw(
        self,
        rhythm: kernels.Rhythm,
        from_ms: int,
        until_ms: int,
        share: tuple[int, int],
        batch_size: int,
        partners: Sequence[str] | None,
        timed: bool,
        substitute: bool,
    ) -> Iterator[PingBatch]:
        worker, workers = share
        if not 0 <= worker < workers:
            raise ValueError(f"share: required (k, n) with 0 <= k < n, got {share}")
        if not 0 <= from_ms <= until_ms:
            raise ValueError(f"required 0 <= from_ms <= until_ms, got {from_ms} and {until_ms}")
        _check_batch_size(batch_size)
        next_number = np.zeros(len(self.partners), np.int64)
        next_ms = np.full(len(self.partners), until_ms, np.int64)
        next_ms[self._chosen(partners)] = from_ms
        kernels.start(rhythm, from_ms, until_ms, worker, workers, next_number, next_ms)
        return self._batches(rhythm, until_ms, workers, substitute, next_number, next_ms, batch_size, timed)

    def _batches(
        self,
        rhythm: kernels.Rhythm,
        until_ms: int,
        workers: int,
        substitute: bool,
        next_number: I64,
        next_ms: I64,
        batch_size: int,
        timed: bool,
    ) -> Iterator[PingBatch]:
        rows = batch_size
        while rows == batch_size:
            columns = _Columns(batch_size)
            drawn = kernels.draw_pings(
                self._habits,
                self._land,
                rhythm,
                until_ms,
                workers,
                substitute,
                next_number,
                next_ms,
                columns.partner,
                columns.phone,
                columns.number,
                columns.arrived_ms,
                columns.seen_ms,
                columns.observed_ms,
                columns.id_end,
            )
            rows = int(drawn)
            if rows:
                yield self._batch(columns, rows, timed)

    def _batch(self, columns: _Columns, rows: int, timed: bool) -> PingBatch:
        phone, partner, id_end = columns.phone[:rows], columns.partner[:rows], columns.id_end[:rows]
        id_bytes = np.empty(int(id_end[-1]), np.uint8)
        world_kernels.write_ids(self._key, phone, partner, self._styles, id_end, id_bytes)
        lat_e7, lng_e7, _ = self._locate(
            phone, columns.seen_ms[:rows], columns.number[:rows], world_kernels.JITTER_M_MAX
        )
        arrived_ms = columns.arrived_ms[:rows] if timed else None
        return PingBatch(partner, id_bytes, id_end, lat_e7, lng_e7, columns.observed_ms[:rows], arrived_ms)

    def expected_pings_per_s(self, at_ms: int) -> F64:
        """How many pings a second of `pings` to expect about a moment, f64[partners]; phones in the air counted in."""
        rhythm = self._rhythm(1.0, even=False)
        quarter = (at_ms + kernels.BEIJING_OFFSET_MS) % DAY_MS // kernels.QUARTER_MS
        pings: F64 = rhythm.before[:, quarter + 1] - rhythm.before[:, quarter]
        return pings * (1_000.0 / kernels.QUARTER_MS) * (1.0 - self.dark_share)

    # ---- phones ----

    def where(self, phones: npt.ArrayLike, at_ms: npt.ArrayLike) -> tuple[I32, I32]:
        """Where phones really are -> `lat_e7`, `lng_e7` i32[n]. A ping's own coordinates are up to 24 m off."""
        lat_e7, lng_e7, _ = self.whereabouts(phones, at_ms)
        return lat_e7, lng_e7

    def whereabouts(self, phones: npt.ArrayLike, at_ms: npt.ArrayLike) -> tuple[I32, I32, U8]:
        """As `where`, and what the phone's owner is doing: an index of `journey_kernels.MODES`, u8[n]."""
        phone, moment = self._phones(phones), self._moments(phones, at_ms)
        return self._locate(phone, moment, np.zeros(len(phone), np.int64), 0.0)

    def online(self, phones: npt.ArrayLike, at_ms: npt.ArrayLike) -> Bool:
        """Whether what is seen at that moment is sent at all: neither dark nor in the air without Wi-Fi, bool[n]."""
        return self._states(phones, at_ms)[0]

    def clock_offset_ms(self, phones: npt.ArrayLike) -> I64:
        """How far ahead of the truth the clocks of phones are, i64[n]; 0 for most."""
        return self._states(phones, 0)[1]

    def phone_ids(self, phones: npt.ArrayLike) -> tuple[U16, U8, U32]:
        """Partner and id of phones -> (`partner` u16[n], `id_bytes` u8, `id_end` u32[n]) as in `PingBatch`."""
        phone = self._phones(phones)
        assert len(phone) * max(world_kernels.STYLE_BYTES) < 1 << 32, (
            "phone_ids: id_end is u32, ask for fewer at a time"
        )
        partner = np.empty(len(phone), np.uint16)
        id_end = np.empty(len(phone), np.uint32)
        kernels.draw_partners_of(self._habits, phone, partner, id_end)
        id_bytes = np.empty(int(id_end[-1]) if len(phone) else 0, np.uint8)
        world_kernels.write_ids(self._key, phone, partner, self._styles, id_end, id_bytes)
        return partner, id_bytes, id_end

    def home_places(self, phones: npt.ArrayLike) -> U32:
        """Where phones are at home: index in `country.places.all`, u32[n]."""
        phone = self._phones(phones)
        place = np.empty(len(phone), np.uint32)
        world_kernels.draw_places(self._key, phone, self.country.threshold, self.country.alias, place)
        return place

    def in_datum(self, batch: PingBatch) -> tuple[F64, F64]:
        """Latitude and longitude of pings in degrees, each in its partner's datum: what goes into HTTP bodies."""
        lat, lng = batch.lat_e7 / float(E7), batch.lng_e7 / float(E7)
        datum = np.array([DATUMS.index(partner.datum) for partner in self.partners], np.uint8)[batch.partner]
        for name, convert in (("gcj02", datums.gcj02), ("bd09", datums.bd09)):
            rows = np.flatnonzero(datum == DATUMS.index(name))
            if len(rows):
                lat[rows], lng[rows] = convert(lat[rows], lng[rows])
        return lat, lng

    # ---- inside ----

    @property
    def _intervals_s(self) -> F64:
        return np.array([partner.ping_interval_s for partner in self.partners], np.float64)

    def _chosen(self, partners: Sequence[str] | None) -> I64:
        names = self.partner_names
        for name in partners or ():
            if name not in names:
                raise ValueError(f"partners: {name!r} is none of {', '.join(names)}")
        return np.array([i for i, name in enumerate(names) if partners is None or name in partners], np.int64)

    def _rhythm(self, rate_scale: float, even: bool) -> kernels.Rhythm:
        found = self._rhythms.get((rate_scale, even))
        if found is None:
            if len(self._rhythms) > 64:  # A shape that climbs asks for each rate once.
                self._rhythms.clear()
            daily = np.diff(self.first_phones) * (DAY_MS / 1_000.0) / self._intervals_s * rate_scale
            curves = np.stack([curve(STEADY if even else partner.rhythm) for partner in self.partners])
            before = np.rint(curves * np.rint(daily)[:, np.newaxis])
            found = self._rhythms[rate_scale, even] = kernels.Rhythm(before, before[:, -1].astype(np.int64))
        return found

    def _locate(self, phone: U32, at_ms: I64, number: I64, jitter_m: float) -> tuple[I32, I32, U8]:
        lat_e7, lng_e7 = np.empty(len(phone), np.int32), np.empty(len(phone), np.int32)
        mode = np.empty(len(phone), np.uint8)
        place = np.empty(len(phone), np.int64)
        journeys.locate(self._land, phone, at_ms, number, jitter_m, place, lat_e7, lng_e7, mode)
        return lat_e7, lng_e7, mode

    def _states(self, phones: npt.ArrayLike, at_ms: npt.ArrayLike) -> tuple[Bool, I64]:
        phone, moment = self._phones(phones), self._moments(phones, at_ms)
        online, clock_ms = np.empty(len(phone), np.bool_), np.empty(len(phone), np.int64)
        kernels.draw_states(self._habits, self._land, phone, moment, online, clock_ms)
        return online, clock_ms

    def _phones(self, phones: npt.ArrayLike) -> U32:
        given = np.atleast_1d(np.asarray(phones))
        assert given.dtype.kind in "iu" or not given.size, f"phones: dtype must be an integer, got {given.dtype}"
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < self.phone_count:
            raise ValueError(f"phones: required 0 to {self.phone_count - 1}, got {given.min()} to {given.max()}")
        return np.ascontiguousarray(given, np.uint32)

    def _moments(self, phones: npt.ArrayLike, at_ms: npt.ArrayLike) -> I64:
        return np.ascontiguousarray(np.broadcast_to(np.asarray(at_ms, np.int64), np.atleast_1d(phones).shape))


class _Columns:
    """What `draw_pings` fills, for one batch."""

    __slots__ = ("arrived_ms", "id_end", "number", "observed_ms", "partner", "phone", "seen_ms")

    def __init__(self, rows: int) -> None:
        self.partner: U16 = np.empty(rows, np.uint16)
        self.phone: U32 = np.empty(rows, np.uint32)
        self.number: I64 = np.empty(rows, np.int64)
        self.arrived_ms: I64 = np.empty(rows, np.int64)
        self.seen_ms: I64 = np.empty(rows, np.int64)
        self.observed_ms: I64 = np.empty(rows, np.int64)
        self.id_end: U32 = np.empty(rows, np.uint32)


def refusals(
    batch: PingBatch, live_window_ms: int = LIVE_WINDOW_MS, future_tolerance_ms: int = FUTURE_TOLERANCE_MS
) -> dict[str, int]:
    """How many pings of a timed batch the matching rules refuse, by reason, if each is applied when it arrives."""
    assert batch.at_ms is not None, "refusals: the batch must be timed"
    ahead_ms = batch.observed_at_ms - batch.at_ms
    return {
        "from_the_future": int(np.count_nonzero(ahead_ms > future_tolerance_ms)),
        "too_old": int(np.count_nonzero(ahead_ms < -live_window_ms)),
    }


def _check_partners(partners: Sequence[LifePartner], phone_count: int) -> None:
    if not 1 <= len(partners) <= PARTNER_COUNT_MAX:
        raise ValueError(f"partners: required 1 to {PARTNER_COUNT_MAX}, got {len(partners)}")
    if len({partner.name for partner in partners}) < len(partners):
        raise ValueError(f"partners: names must differ, got {[partner.name for partner in partners]}")
    if phone_count < len(partners):
        raise ValueError(f"phone_count: required a phone for each of {len(partners)} partners, got {phone_count}")


def _check_batch_size(batch_size: int) -> None:
    if not 1 <= batch_size <= 1 << 24:
        raise ValueError(f"batch_size: required 1 to 2^24, got {batch_size}")
