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
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from geoindex.columns import E7, F64, I32, I64, PARTNER_COUNT_MAX, U8, U16, U32, Bool, PingBatch
from loadtest import datums, world_kernels
from loadtest import journey_kernels as journeys
from loadtest import life_kernels as kernels
from loadtest.country import PLACE_FESTIVAL, Country, load_country
from loadtest.places import Place, distance_km
from loadtest.world import ID_STYLES, PHONE_COUNT_MAX, directions

BATCH_PINGS = 8_192
DATUMS = ("wgs84", "gcj02", "bd09")
DELAY_SIGMA = 0.6
"""Of the logarithm of a delay: the slowest hundredth takes four times the median."""
LIVE_WINDOW_MS = 6 * 3_600_000
FUTURE_TOLERANCE_MS = 5 * 60_000
"""Of the matching rules, unless a deployment's settings say otherwise."""
DARK_SHARE_MAX = 0.25
MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
YEAR_MS = 365 * DAY_MS

STEADY = (1.0,) * 24
WAKING = (0.4, 0.3, 0.25, 0.25, 0.3, 0.5, 0.8, 1.1, 1.2, 1.1, 1.1, 1.2, 1.3, 1.2, 1.1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.5, 1.2, 0.8)
COMMUTING = (0.3, 0.2, 0.15, 0.15, 0.2, 0.5, 1.2, 2.2, 2.2, 1.3, 1.0, 1.1, 1.2, 1.1, 1.0, 1.0, 1.2, 1.9, 2.1, 1.4, 1.1, 1.0, 0.8, 0.5)
EVENING = (0.6, 0.35, 0.2, 0.15, 0.15, 0.3, 0.8, 1.3, 1.2, 0.9, 0.8, 1.0, 1.4, 1.1, 0.8, 0.8, 0.9, 1.2, 1.4, 1.7, 2.0, 2.1, 1.8, 1.1)
"""How often an app pings by hour of the day, Beijing time, beside its mean: the hour's own value at its middle."""


@dataclass(frozen=True, slots=True)
class LifePartner:
    """An app partner, and how its app behaves.

    `share` of the phones, relative to the others' shares. `id_style`: a key of `world.ID_STYLES`. `ping_interval_s`: mean
    over the day between two pings of a phone; `rhythm`: how often it pings by hour, beside that mean (24 numbers, their
    scale does not matter). `datum`: of the coordinates in its HTTP bodies. `delay_ms_median`: from the phone to the
    gateway, lognormal; a share `late_share` of its pings is up to `late_ms_max` late instead (evenly).
    """

    name: str
    share: float
    id_style: str
    ping_interval_s: float
    datum: str = "wgs84"
    delay_ms_median: float = 800.0
    late_share: float = 0.01
    late_ms_max: int = 10 * MINUTE_MS
    rhythm: tuple[float, ...] = WAKING

    def __post_init__(self) -> None:
        def require(good: bool, what: str, got: object) -> None:
            if not good:
                raise ValueError(f"partner {self.name!r}: {what}, got {got!r}")

        require(bool(self.name), "name must not be empty", self.name)
        require(self.id_style in ID_STYLES, f"id_style must be one of {', '.join(ID_STYLES)}", self.id_style)
        require(self.datum in DATUMS, f"datum must be one of {', '.join(DATUMS)}", self.datum)
        require(self.share > 0 and math.isfinite(self.share), "share must be positive", self.share)
        require(0.1 <= self.ping_interval_s <= 86_400, "ping_interval_s must be 0.1 to 86400", self.ping_interval_s)
        require(0 <= self.delay_ms_median <= HOUR_MS, f"delay_ms_median must be 0 to {HOUR_MS}", self.delay_ms_median)
        require(0 <= self.late_share <= 1, "late_share must be 0 to 1", self.late_share)
        require(0 <= self.late_ms_max <= DAY_MS, f"late_ms_max must be 0 to {DAY_MS}", self.late_ms_max)
        good = len(self.rhythm) == 24 and all(value >= 0 and math.isfinite(value) for value in self.rhythm)
        require(good and sum(self.rhythm) > 0, "rhythm must be 24 numbers, none negative, not all 0", self.rhythm)


DEFAULT_LIFE_PARTNERS = (
    LifePartner("amap", 0.30, "hex32", 60.0, "gcj02", 500.0, 0.005, 5 * MINUTE_MS, COMMUTING),
    LifePartner("ditu", 0.20, "uuid36", 90.0, "bd09", 700.0, 0.01, 10 * MINUTE_MS, WAKING),
    LifePartner("chuxing", 0.16, "hex16", 30.0, "gcj02", 300.0, 0.002, 2 * MINUTE_MS, COMMUTING),
    LifePartner("xinwen", 0.14, "base32_26", 600.0, "gcj02", 1_500.0, 0.03, 30 * MINUTE_MS, EVENING),
    LifePartner("zhifu", 0.12, "decimal21", 300.0, "gcj02", 900.0, 0.01, 10 * MINUTE_MS, WAKING),
    LifePartner("dianxin", 0.08, "hex16", 120.0, "wgs84", 2_500.0, 0.05, 60 * MINUTE_MS, STEADY),
)
"""Six kinds: navigation, maps, ride hailing, news, payment, and a carrier that sees phones day and night."""


@dataclass(frozen=True, slots=True)
class ClockFault:
    """A share of all phones whose clock is off by something in [`ahead_ms_min`, `ahead_ms_max`]; below 0: behind."""

    name: str
    share: float
    ahead_ms_min: int
    ahead_ms_max: int

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"clock fault {self.name!r}: share must be 0 to 1, got {self.share}")
        if not -40 * YEAR_MS <= self.ahead_ms_min <= self.ahead_ms_max <= 40 * YEAR_MS:
            raise ValueError(
                f"clock fault {self.name!r}: ahead_ms_min must be at most ahead_ms_max, both within 40 years, "
                f"got {self.ahead_ms_min} and {self.ahead_ms_max}"
            )


DEFAULT_CLOCK_FAULTS = (
    ClockFault("minutes ahead", 0.003, 1 * MINUTE_MS, 20 * MINUTE_MS),
    ClockFault("minutes behind", 0.003, -40 * MINUTE_MS, -1 * MINUTE_MS),
    ClockFault("local time taken for UTC", 0.002, 8 * HOUR_MS, 8 * HOUR_MS),
    ClockFault("days behind", 0.001, -30 * DAY_MS, -1 * DAY_MS),
    ClockFault("days ahead", 0.0005, 1 * DAY_MS, 30 * DAY_MS),
    ClockFault("years behind", 0.0003, -20 * YEAR_MS, -1 * YEAR_MS),
    ClockFault("years ahead", 0.0002, 1 * YEAR_MS, 10 * YEAR_MS),
)
"""One phone in a hundred: late, refused as from the future, or refused as too old."""


@dataclass(frozen=True, slots=True)
class Festival:
    """A crowd in one place at one time, every so many days.

    `attendance`: share of the people who live within `catchment_km` of it that come, but for those on a trip. `from_ms`,
    `until_ms`: its first time; people arrive in the 45 minutes before and leave in the 40 after. `every_days`: 0 for once.
    `radius_m`: of the crowd.
    """

    lat: float
    lng: float
    from_ms: int
    until_ms: int
    every_days: int = 0
    attendance: float = 0.3
    catchment_km: float = 30.0
    radius_m: float = 400.0

    def __post_init__(self) -> None:
        def require(good: bool, what: str, got: object) -> None:
            if not good:
                raise ValueError(f"festival: {what}, got {got!r}")

        require(abs(self.lat) <= 70 and abs(self.lng) < 179, "lat, lng must be degrees", (self.lat, self.lng))
        require(self.every_days >= 0, "every_days must be at least 0", self.every_days)
        require(0 <= self.attendance <= 1, "attendance must be 0 to 1", self.attendance)
        require(0 < self.catchment_km <= 200, "catchment_km must be above 0, at most 200", self.catchment_km)
        require(0 < self.radius_m <= 5_000, "radius_m must be above 0, at most 5000", self.radius_m)
        require(self.from_ms < self.until_ms, "until_ms must be behind from_ms", (self.from_ms, self.until_ms))
        day, since_ms = divmod(self.from_ms + journeys.LIFE_DAY_OFFSET_MS, DAY_MS)
        last_ms = self.until_ms + journeys.LIFE_DAY_OFFSET_MS - day * DAY_MS
        require(
            since_ms >= 2 * HOUR_MS and last_ms <= 22 * HOUR_MS,
            "must begin at 6:00 or later and end by 2:00 of the next day, Beijing time",
            (self.from_ms, self.until_ms),
        )


# Saturday 2024-01-06, 19:30 in Beijing.
_FIRST_SATURDAY_MS = 1_704_540_600_000
DEFAULT_FESTIVAL = Festival(30.6598, 104.0633, _FIRST_SATURDAY_MS, _FIRST_SATURDAY_MS + 150 * MINUTE_MS, every_days=7)
"""Tianfu Square in Chengdu, Saturdays from 19:30 to 22:00: a seventh of all evenings, so that no test waits long."""


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
        self.first_phones = _first_phones([partner.share for partner in partners], phone_count)
        """Phones of partner p: `first_phones[p]` to `first_phones[p + 1]`, i64[partners + 1]."""
        self._key = np.uint64(seed)
        self._land = _land(self._key, self.country, festival, trip_share)
        self._habits = _habits(self.partners, self.first_phones, self.clock_faults, dark_share, wifi_share)
        self._styles = np.array([ID_STYLES[partner.id_style] for partner in partners], np.uint8)
        self._rhythms: dict[tuple[float, bool], kernels.Rhythm] = {}

    @property
    def partner_names(self) -> tuple[str, ...]:
        """In the order that the `partner` column counts: what the settings of the logs should say."""
        return tuple(partner.name for partner in self.partners)

    @property
    def dark_share(self) -> float:
        """Of the phones that are dark at any moment (in the air without Wi-Fi, one in 2,000, not counted)."""
        short, long = (_dark_part(float(share) / 2**32, *how) for share, how in zip(self._dark_q32, _DARK, strict=True))
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

        Partners share the rate by their phones and intervals (only `partners`, if given). Every second holds its pings to
        within one a partner: when it is the turn of a phone that is offline, another one of the partner sends.
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
            rows, position = kernels.draw_last_seen(
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
            rows = kernels.draw_pings(
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
            if rows:
                yield self._batch(columns, rows, timed)

    def _batch(self, columns: _Columns, rows: int, timed: bool) -> PingBatch:
        phone, partner, id_end = columns.phone[:rows], columns.partner[:rows], columns.id_end[:rows]
        id_bytes = np.empty(int(id_end[-1]), np.uint8)
        world_kernels.write_ids(self._key, phone, partner, self._styles, id_end, id_bytes)
        lat_e7, lng_e7, _ = self._locate(phone, columns.seen_ms[:rows], columns.number[:rows], journeys.JITTER_M_MAX)
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
        """Whether a ping seen at that moment would be sent at all: neither dark nor in the air without Wi-Fi, bool[n]."""
        return self._states(phones, at_ms)[0]

    def clock_offset_ms(self, phones: npt.ArrayLike) -> I64:
        """How far ahead of the truth the clocks of phones are, i64[n]; 0 for most."""
        return self._states(phones, 0)[1]

    def phone_ids(self, phones: npt.ArrayLike) -> tuple[U16, U8, U32]:
        """Partner and id of phones -> (`partner` u16[n], `id_bytes` u8, `id_end` u32[n]) as in `PingBatch`."""
        phone = self._phones(phones)
        assert len(phone) * max(world_kernels.STYLE_BYTES) < 1 << 32, "phone_ids: id_end is u32, ask for fewer at a time"
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
            curves = np.stack([_curve(STEADY if even else partner.rhythm) for partner in self.partners])
            before = np.rint(curves * np.rint(daily)[:, np.newaxis])
            found = self._rhythms[rate_scale, even] = kernels.Rhythm(before, before[:, -1].astype(np.int64))
        return found

    def _locate(self, phone: U32, at_ms: I64, number: I64, jitter_m: float) -> tuple[I32, I32, U8]:
        lat_e7, lng_e7 = np.empty(len(phone), np.int32), np.empty(len(phone), np.int32)
        mode = np.empty(len(phone), np.uint8)
        journeys.locate(self._land, phone, at_ms, number, jitter_m, lat_e7, lng_e7, mode)
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


# ---- tables ----


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


def _first_phones(shares: Sequence[float], phone_count: int) -> I64:
    """Where each partner's range of phones begins, by shares, each with one phone at least: i64[partners + 1]."""
    cumulative = np.rint(np.cumsum(shares) / math.fsum(shares) * (phone_count - len(shares))).astype(np.int64)
    return np.concatenate(([0], cumulative + np.arange(1, len(shares) + 1))).astype(np.int64)


def _curve(rhythm: tuple[float, ...]) -> F64:
    """24 hourly values -> which share of a day's pings comes before each quarter of an hour, f64[97], from 0 to 1.

    The value of an hour holds at its middle; between middles a straight line.
    """
    middle = np.arange(kernels.QUARTERS) / 4 + 0.125
    values = np.interp(middle, np.arange(-1, 25) + 0.5, (rhythm[-1], *rhythm, rhythm[0]))
    curve = np.concatenate(([0.0], np.cumsum(values)))
    return np.round(curve / curve[-1], 12)


_DARK = (
    (kernels.SHORT_DARK_MS, kernels.SHORT_DARK_MS_MIN, kernels.SHORT_DARK_MS_MAX),
    (kernels.LONG_DARK_MS, kernels.LONG_DARK_MS_MIN, kernels.LONG_DARK_MS_MAX),
)


def _dark_part(chance: float, period_ms: int, ms_min: int, ms_max: int) -> float:
    """Share of all time that stretches of `ms_min` to `ms_max` take if a period holds one with a chance."""
    return chance * (ms_min + ms_max) / 2 / period_ms


def _habits(
    partners: tuple[LifePartner, ...],
    first_phones: I64,
    faults: tuple[ClockFault, ...],
    dark_share: float,
    wifi_share: float,
) -> kernels.Habits:
    sizes = -(-np.diff(first_phones) // kernels.BLOCKS)
    bits = [(int(size) - 1).bit_length() for size in sizes]
    normal = NormalDist()
    quantiles = [(step + 0.5) / kernels.DELAY_STEPS for step in range(kernels.DELAY_STEPS)]
    short, long = (_q32(dark_share / 2 / _dark_part(1.0, *how)) for how in _DARK)
    return kernels.Habits(
        first_phone=first_phones,
        block_mask=np.array([(1 << count) - 1 for count in bits], np.uint64),
        block_shift=np.array([max(1, (count + 1) // 2) for count in bits], np.uint64),
        id_bytes=np.array([world_kernels.STYLE_BYTES[ID_STYLES[partner.id_style]] for partner in partners], np.uint32),
        delay_ms=np.array([partner.delay_ms_median for partner in partners], np.float64),
        delay_curve=np.round([math.exp(DELAY_SIGMA * normal.inv_cdf(quantile)) for quantile in quantiles], 9),
        late_q32=np.array([_q32(partner.late_share) for partner in partners], np.uint64),
        late_ms_max=np.array([partner.late_ms_max for partner in partners], np.uint64),
        clock_until_q32=np.array(
            [_q32(min(1.0, math.fsum(f.share for f in faults[: i + 1]))) for i in range(len(faults))], np.uint64
        ),
        clock_ms_min=np.array([fault.ahead_ms_min for fault in faults], np.int64),
        clock_ms_span=np.array([fault.ahead_ms_max - fault.ahead_ms_min + 1 for fault in faults], np.uint64),
        short_dark_q32=short,
        long_dark_q32=long,
        wifi_q32=_q32(wifi_share),
    )


def _q32(share: float) -> np.uint64:
    return np.uint64(round(share * (1 << 32)))


def _land(key: np.uint64, country: Country, festival: Festival | None, trip_share: float) -> journeys.Land:
    rows = country.rows
    columns = np.zeros(8, np.float64)
    columns[journeys.FESTIVAL_FIRST_DAY] = -1.0
    if festival is not None:
        day, since_ms = divmod(festival.from_ms + journeys.LIFE_DAY_OFFSET_MS, DAY_MS)
        columns[:] = (
            day,
            festival.every_days,
            since_ms / 1_000,
            (since_ms + festival.until_ms - festival.from_ms) / 1_000,
            festival.lat,
            festival.lng,
            round(1.0 / math.cos(math.radians(festival.lat)), 12),
            festival.radius_m,
        )
        near = distance_km(festival.lat, festival.lng, country.places.lat, country.places.lng) <= festival.catchment_km
        rows = rows.copy()
        rows[near, PLACE_FESTIVAL] = festival.attendance
    return journeys.Land(
        key=key,
        threshold=country.threshold,
        alias=country.alias,
        rows=rows,
        work=country.work,
        hubs=country.hubs,
        trip_keep=country.trip_keep,
        trip_other=country.trip_other,
        direction=directions(),
        trip_q16=np.uint64(round(trip_share * (1 << 16))),
        festival=columns,
    )


def festival_in(place: Place, from_ms: int, until_ms: int, every_days: int = 0, attendance: float = 0.3) -> Festival:
    """A festival in the middle of a place."""
    return Festival(place.lat, place.lng, from_ms, until_ms, every_days, attendance)
