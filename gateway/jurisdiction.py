"""Who may act for which part of the country: administrative division codes (GB/T 2260) and an officer's level.

    000000   the Ministry        11 22 33
    110000   a province          ── ── ──
    130100   a prefecture         │  │  └─ county
    130102   a county             │  └──── prefecture
                                  └─────── province

A code with zeros at its end stands for all its parts. An officer of county level or above publishes, views, edits and
closes for the own division and its parts, without anybody's approval; a station (township, 12 digits) does not.
"""

from __future__ import annotations

import re

from gateway.accounts import OfficerAccount

MINISTRY = "000000"
DIVISION_PATTERN = r"^[0-9]{6}$"

_REGIONS = {"1": "12345", "2": "123", "3": "1234567", "4": "123456", "5": "01234", "6": "12345", "7": "1", "8": "12"}
PROVINCES = frozenset(region + digit for region, digits in _REGIONS.items() for digit in digits)
"""The first two digits that are given out (GB/T 2260-2007)."""

LEVELS = ("ministry", "province", "prefecture", "county")
"""Those with a desk, from the top; a "station" has none."""
_DIGITS = {"ministry": 0, "province": 2, "prefecture": 4, "county": 6}
"""How many digits of the code say which division of this level it is; the others are zeros."""
_CODE = re.compile(DIVISION_PATTERN)


def level_of(division: str) -> str:
    """The level that a division's code is of: one of LEVELS. Raises ValueError for what is no code."""
    if not _CODE.fullmatch(division):
        raise ValueError(f"division must be a code of 6 digits (GB/T 2260), got {division[:20]!r}")
    province, prefecture, county = division[:2], division[2:4], division[4:]
    if division == MINISTRY:
        return "ministry"
    if province not in PROVINCES:
        raise ValueError(f"division must begin with a province's digits (GB/T 2260), got {division!r}")
    if prefecture == "00":
        if county != "00":
            raise ValueError(f"division must name a prefecture before a county, got {division!r}")
        return "province"
    return "prefecture" if county == "00" else "county"


def prefix_of(division: str) -> str:
    """The digits that all parts of a division begin with: "13" of 130000, nothing of the Ministry's code."""
    return division[: _DIGITS[level_of(division)]]


def covers(superior: str, division: str) -> bool:
    """Whether `division` is `superior` or a part of it. Raises ValueError for what is no code."""
    return division.startswith(prefix_of(superior))


def desk_refusal(account: OfficerAccount) -> str | None:
    """Why this officer has no desk at all; None: there is one, for `account.division`."""
    if account.level not in LEVELS:
        return f"alerts are for officers of county level or above, {account.level} is below"
    try:
        own_level = level_of(account.division)
    except ValueError as error:
        return f"the account's {error}"
    if LEVELS.index(own_level) < LEVELS.index(account.level):
        # A county's officer with a province's code would act for all of the province.
        return f"the account is of {account.level} level, its division {account.division} is a {own_level}'s"
    return None


def division_refusal(account: OfficerAccount, division: str) -> str | None:
    """Why this officer may not act for a division; None: the officer may. Raises ValueError for what is no code."""
    level_of(division)
    if (refusal := desk_refusal(account)) is not None:
        return refusal
    if not covers(account.division, division):
        return f"division {division} is outside of the own jurisdiction, {account.division}"
    return None
