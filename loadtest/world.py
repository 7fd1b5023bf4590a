"""A seeded world of phones: the same seed and the same calls give the same pings, on any machine.

    world = World(seed=1, phone_count=1_000_000)
    for batch in world.first_sight(now_ms, batch_size=8_192):    # each phone once
        ...
    batch = world.batch(8_192, now_ms)                           # pings go round all phones, in random order

Phones live where the people of China live (`loadtest.places`), scattered around the centre of their place. Each
belongs to one partner, stays put for most of its pings, and now and then goes on an errand of up to 5 km and back.
Nothing is stored per phone: `loadtest.world_kernels` computes everything from (seed, phone index, step), so a world
of 10^8 phones weighs what a world of 10^4 does, a few megabytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geoindex.columns import F64, I32, PARTNER_COUNT_MAX, U8, U16, U32, U64, PingBatch
from loadtest import world_kernels as kernels
from loadtest.places import Place, Places, load_places

ID_STYLES = {
    "hex16": kernels.STYLE_HEX16,
    "hex32": kernels.STYLE_HEX32,
    "uuid36": kernels.STYLE_UUID36,
    "decimal21": kernels.STYLE_DECIMAL21,
    "base32_26": kernels.STYLE_BASE32_26,
}
"""What partners' device ids look like; the number is their length in bytes ("decimal21": a `u` and 20 digits)."""

PEAK_PEOPLE_PER_KM2 = 20_000.0
"""In the centre of a city: the built-up cores of Shanghai, Beijing and Guangzhou hold 15,000 to 25,000."""
SPREAD_KM_MIN = 0.5
"""Standard deviation, north or east, of the homes of the smallest village."""
BELL_SIGMA = math.sqrt(3.0) / 6.0
"""Standard deviation of `world_kernels.bell`: four uniform draws scaled to [-1, 1]."""
PHONE_COUNT_MAX = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Partner:
    """An app partner: `share` of the phones (relative to the others' shares), `id_style` a key of `ID_STYLES`."""

    name: str
    share: float
    id_style: str


DEFAULT_PARTNERS = (
    Partner("amap", 0.30, "hex32"),
    Partner("ditu", 0.20, "uuid36"),
    Partner("chuxing", 0.16, "hex16"),
    Partner("xinwen", 0.14, "base32_26"),
    Partner("zhifu", 0.12, "decimal21"),
    Partner("dianxin", 0.08, "hex16"),
)


class World:
    """Phones and their pings. `phones` in method arguments: any integers in [0, phone_count), u32[n] is not copied."""

    def __init__(
        self,
        seed: int,
        phone_count: int,
        partners: Sequence[Partner] = DEFAULT_PARTNERS,
        moved_share: float = 0.1,
    ) -> None:
        """`moved_share`: share of the pings that come from a phone that moved 0.1 to 5 km since its last ping;
        the others stay within 50 m.

        Raises `ValueError` for what makes no world.
        """
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed: required 0 <= seed < 2^64, got {seed}")
        if not 1 <= phone_count <= PHONE_COUNT_MAX:
            raise ValueError(f"phone_count: required 1 to {PHONE_COUNT_MAX}, got {phone_count}")
        if not 0.0 <= moved_share <= 1.0:
            raise ValueError(f"moved_share: required 0 to 1, got {moved_share}")
        _check_partners(partners)
        self.seed = seed
        self.phone_count = phone_count
        self.partners = tuple(partners)
        self.moved_share = moved_share
        self.places: Places = load_places()
        self.ping_count = 0
        """Pings given out by `batch` so far."""

        self._key = np.uint64(seed)
        bits = (phone_count - 1).bit_length()
        self._mask = np.uint64((1 << bits) - 1)
        self._shift = np.uint64(max(1, (bits + 1) // 2))
        self._moved_q32 = np.uint64(round(moved_share * (1 << 32)))
        styles = [ID_STYLES[partner.id_style] for partner in partners]
        self._partner_style = np.array(styles, np.uint8)
        self._partner_id_bytes = np.array([kernels.STYLE_BYTES[style] for style in styles], np.uint32)
        self._cumulative_q32 = _cumulative_q32([partner.share for partner in partners])
        self._threshold, self._alias = alias_table(self.places.people)
        self._place_rows = place_rows(self.places)
        self._direction = directions()

    @property
    def partner_names(self) -> tuple[str, ...]:
        """In the order that the `partner` column counts: what the settings of the logs should say."""
        return tuple(partner.name for partner in self.partners)

    # ---- pings ----

    def batch(self, ping_count: int, now_ms: int) -> PingBatch:
        """The next `ping_count` pings of the world.

        Every phone pings once a round, each round in another random order, so a batch larger than the world holds
        phones more than once. `observed_at_ms` is up to 2 s before `now_ms`, for 2 % of the pings up to 2 minutes.
        """
        if ping_count < 0:
            raise ValueError(f"ping_count: required at least 0, got {ping_count}")
        # Round 0 is `first_sight`.
        batch = self._pings(self.phone_count + self.ping_count, ping_count, now_ms)
        self.ping_count += ping_count
        return batch

    def first_sight(self, now_ms: int, batch_size: int) -> Iterator[PingBatch]:
        """Each phone once, in random order, as of before the first `batch`: fills a device table. Always the same."""
        if batch_size < 1:
            raise ValueError(f"batch_size: required at least 1, got {batch_size}")
        return (
            self._pings(first_ping, min(batch_size, self.phone_count - first_ping), now_ms)
            for first_ping in range(0, self.phone_count, batch_size)
        )

    def _pings(self, first_ping: int, ping_count: int, now_ms: int) -> PingBatch:
        phone, step = self._draw_phones(first_ping, ping_count)
        partner, id_bytes, id_end = self.phone_ids(phone)
        lat_e7, lng_e7 = self._locate(phone, step)
        observed_at_ms = np.empty(ping_count, np.int64)
        kernels.draw_times(self._key, np.uint64(first_ping), now_ms, observed_at_ms)
        return PingBatch(partner, id_bytes, id_end, lat_e7, lng_e7, observed_at_ms)

    def _draw_phones(self, first_ping: int, ping_count: int) -> tuple[U32, U32]:
        """Sender and step of pings counted from the start of `first_sight`: two u32[ping_count]."""
        phone = np.empty(ping_count, np.uint32)
        step = np.empty(ping_count, np.uint32)
        kernels.draw_phones(
            self._key, np.uint64(self.phone_count), self._mask, self._shift, np.uint64(first_ping), phone, step
        )
        return phone, step

    # ---- phones ----

    def phone_ids(self, phones: npt.ArrayLike) -> tuple[U16, U8, U32]:
        """Partner and id of phones -> (`partner` u16[n], `id_bytes` u8, `id_end` u32[n]) as in `PingBatch`."""
        phone = self._phone_column(phones)
        assert len(phone) * max(kernels.STYLE_BYTES) < 1 << 32, "phone_ids: id_end is u32, ask for fewer at a time"
        partner = np.empty(len(phone), np.uint16)
        id_end = np.empty(len(phone), np.uint32)
        kernels.draw_partners(self._key, phone, self._cumulative_q32, self._partner_id_bytes, partner, id_end)
        id_bytes = np.empty(int(id_end[-1]) if len(phone) else 0, np.uint8)
        kernels.write_ids(self._key, phone, partner, self._partner_style, id_end, id_bytes)
        return partner, id_bytes, id_end

    def home_places(self, phones: npt.ArrayLike) -> U32:
        """Where phones are at home: index in `places.all`, u32[n]."""
        phone = self._phone_column(phones)
        place = np.empty(len(phone), np.uint32)
        kernels.draw_places(self._key, phone, self._threshold, self._alias, place)
        return place

    def positions(self) -> tuple[I32, I32]:
        """Where every phone was in its latest ping (`first_sight`, if it sent none) -> `lat_e7`, `lng_e7` i32[phones].

        Latest means the last one handed out; a late ping may have been observed before the one it follows.
        """
        rounds, rest = divmod(self.ping_count, self.phone_count)
        step = np.full(self.phone_count, rounds, np.uint32)
        pinged, _ = self._draw_phones((rounds + 1) * self.phone_count, rest)
        step[pinged] += np.uint32(1)
        return self._locate(np.arange(self.phone_count, dtype=np.uint32), step)

    def _locate(self, phone: U32, step: U32) -> tuple[I32, I32]:
        lat_e7 = np.empty(len(phone), np.int32)
        lng_e7 = np.empty(len(phone), np.int32)
        kernels.locate(
            self._key,
            phone,
            step,
            self._moved_q32,
            self._threshold,
            self._alias,
            self._place_rows,
            self._direction,
            lat_e7,
            lng_e7,
        )
        return lat_e7, lng_e7

    def _phone_column(self, phones: npt.ArrayLike) -> U32:
        given = np.asarray(phones)
        assert given.dtype.kind in "iu" or not given.size, f"phones: dtype must be an integer, got {given.dtype}"
        if given.size and not 0 <= int(given.min()) <= int(given.max()) < self.phone_count:
            raise ValueError(f"phones: required 0 to {self.phone_count - 1}, got {given.min()} to {given.max()}")
        return np.ascontiguousarray(given, np.uint32)

    # ---- places ----

    def place(self, name: str) -> Place:
        """As `Places.place`."""
        return self.places.place(name)

    def densest_place(self, radius_km: float = 100.0) -> Place:
        """As `Places.densest_place`."""
        return self.places.densest_place(radius_km)

    def phones_expected(self, lat: float, lng: float, radius_km: float) -> float:
        """About how many phones live within `radius_km` of a point (degrees)."""
        return self.phone_count * self.places.people_within(lat, lng, radius_km) / float(self.places.people.sum())


def _check_partners(partners: Sequence[Partner]) -> None:
    if not 1 <= len(partners) <= PARTNER_COUNT_MAX:
        raise ValueError(f"partners: required 1 to {PARTNER_COUNT_MAX}, got {len(partners)}")
    if len({partner.name for partner in partners}) < len(partners):
        raise ValueError(f"partners: names must differ, got {[partner.name for partner in partners]}")
    for partner in partners:
        if partner.id_style not in ID_STYLES:
            raise ValueError(
                f"partner {partner.name!r}: id_style must be one of {', '.join(ID_STYLES)}, got {partner.id_style!r}"
            )
        if not (partner.share > 0 and math.isfinite(partner.share)):
            raise ValueError(f"partner {partner.name!r}: share must be positive, got {partner.share}")


def _cumulative_q32(shares: Sequence[float]) -> U64:
    """Relative shares -> their running sum in 1/2^32 of the total, u64[n], the last one 2^32."""
    return np.round(np.cumsum(shares) / math.fsum(shares) * 2.0**32).astype(np.uint64)


def alias_table(weights: F64) -> tuple[U64, U32]:
    """Walker's alias table for positive weights -> (`threshold` u64[n], `alias` u32[n]), for `world_kernels.place_of`.

    Column i keeps a draw with probability `threshold[i]` / 2^64 and passes it to `alias[i]` otherwise (Vose, IEEE TSE
    17(9), 1991).
    """
    scaled = (weights * (len(weights) / math.fsum(weights.tolist()))).tolist()
    threshold = np.full(len(weights), (1 << 64) - 1, np.uint64)
    alias = np.arange(len(weights), dtype=np.uint32)
    poor = [i for i, weight in enumerate(scaled) if weight < 1.0]
    rich = [i for i, weight in enumerate(scaled) if weight >= 1.0]
    while poor and rich:
        taker, giver = poor.pop(), rich[-1]
        threshold[taker] = int(scaled[taker] * 2.0**64)
        alias[taker] = giver
        scaled[giver] -= 1.0 - scaled[taker]
        if scaled[giver] < 1.0:
            poor.append(rich.pop())
    # What is left is 1 but for rounding: it keeps every draw, as it was initialised.
    return threshold, alias


def place_rows(places: Places) -> F64:
    """What `locate` needs of each place, f64[n, 5], columns `PLACE_*`; rounded, so that libm's last bit is lost."""
    radian = np.radians(places.lat)
    spread_km = SPREAD_KM_MIN + np.sqrt(places.people / (2.0 * math.pi * PEAK_PEOPLE_PER_KM2))
    rows = np.empty((len(places), 5), np.float64)
    rows[:, kernels.PLACE_LAT] = places.lat
    rows[:, kernels.PLACE_LNG] = places.lng
    rows[:, kernels.PLACE_REACH] = spread_km * 1000.0 * kernels.DEGREES_PER_M / BELL_SIGMA
    rows[:, kernels.PLACE_SEC] = 1.0 / np.cos(radian)
    rows[:, kernels.PLACE_SEC_SLOPE] = np.tan(radian) / np.cos(radian) * (math.pi / 180.0)
    return np.round(rows, 12)


def directions() -> F64:
    """Cosine and sine of 1,024 directions, f64[1024, 2], rounded as above."""
    angle = np.arange(kernels.DIRECTION_COUNT) * (2.0 * math.pi / kernels.DIRECTION_COUNT)
    return np.round(np.stack((np.cos(angle), np.sin(angle)), axis=1), 12)
