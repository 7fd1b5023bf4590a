"""Who may act for which part of the country."""

from __future__ import annotations

import pytest

from gateway.accounts import Level, OfficerAccount
from gateway.jurisdiction import covers, desk_refusal, division_refusal, level_of


def officer(division: str, level: Level) -> OfficerAccount:
    return OfficerAccount(name="值班", division=division, level=level)


@pytest.mark.parametrize(
    ("division", "level"),
    [
        ("000000", "ministry"),
        ("330000", "province"),
        ("330100", "prefecture"),
        ("330106", "county"),
        ("110101", "county"),
        ("469001", "county"),
        ("810000", "province"),
    ],
)
def test_code_says_its_level(division: str, level: str) -> None:
    assert level_of(division) == level


@pytest.mark.parametrize(
    "division", ["", "33010", "3301061", "33010x", "000001", "100000", "990000", "330001", "3301０6"]
)
def test_what_is_no_code_is_refused(division: str) -> None:
    with pytest.raises(ValueError, match="division must"):
        level_of(division)


@pytest.mark.parametrize(
    ("superior", "division", "is_covered"),
    [
        ("000000", "330106", True),
        ("000000", "000000", True),
        ("330000", "330106", True),
        ("330000", "330000", True),
        ("330000", "340100", False),
        ("330100", "330106", True),
        ("330100", "330206", False),
        ("330100", "330000", False),
        ("330106", "330106", True),
        ("330106", "330100", False),
        ("330106", "330108", False),
        ("330000", "000000", False),
    ],
)
def test_superior_covers_its_parts_and_nothing_else(superior: str, division: str, is_covered: bool) -> None:
    assert covers(superior, division) == is_covered


@pytest.mark.parametrize(
    ("account", "division", "refusal"),
    [
        (officer("000000", "ministry"), "330106", None),
        (officer("330106", "county"), "330106", None),
        (officer("330106", "station"), "330106", "station is below"),
        (officer("330106002000", "station"), "330106", "station is below"),
        (officer("330106002000", "county"), "330106", "must be a code of 6 digits"),
        (officer("330106", "county"), "330108", "outside of the own jurisdiction"),
        (officer("330000", "county"), "330106", "is a province's"),
        (officer("000000", "province"), "330106", "is a ministry's"),
        (officer("330106", "prefecture"), "330106", None),
    ],
)
def test_officer_of_county_level_or_above_acts_for_the_own_division(
    account: OfficerAccount, division: str, refusal: str | None
) -> None:
    found = division_refusal(account, division)
    assert (found is None) if refusal is None else (found is not None and refusal in found)


def test_station_has_no_desk() -> None:
    assert desk_refusal(officer("330106", "station")) == (
        "alerts are for officers of county level or above, station is below"
    )
