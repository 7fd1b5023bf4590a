"""Commands written by the kernel against those written one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flows.push_commands import PushCommands, log_id_of, push_id
from flows.wire import decode_push
from geoindex.columns import Push, PushColumns, Pushes, pack_ids

PARTNERS = ("amap", "didi", "新闻")
ALERTS = (("a17", 1, 100.0), None, ("京-2", 300, 187.5), ("a" * 40, 70_000, 1e3))

one_push = st.tuples(
    st.sampled_from([0, 2, 3]),
    st.integers(0, len(PARTNERS) - 1),
    st.sampled_from([0, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 1_700_000_000_000]),
    st.lists(st.text("x9京", min_size=1, max_size=21), min_size=1, max_size=18),
)


def columns(pushes: list[tuple[int, int, int, list[str]]]) -> PushColumns:
    return PushColumns(
        ALERTS,
        np.array([alert for alert, *_ in pushes], np.uint32),
        np.array([partner for _, partner, _, _ in pushes], np.uint16),
        np.array([at_ms for _, _, at_ms, _ in pushes], np.int64),
        np.cumsum([len(ids) for *_, ids in pushes]).astype(np.uint32),
        *pack_ids([device_id for *_, ids in pushes for device_id in ids]),
    )


def written(log_id: tuple[int, int], segments: list[Push | PushColumns]) -> tuple[bytes, dict[str, int]]:
    commands = PushCommands(3)
    commands.add(log_id, segments, PARTNERS, np.zeros(len(PARTNERS), np.int64))
    devices: dict[str, int] = {}
    for tally in commands.tallies:
        for partner, count in tally.devices_by_partner([True] * len(tally)).items():
            devices[partner] = devices.get(partner, 0) + count
    return b"".join(commands.parts), devices


@given(st.lists(one_push, min_size=1, max_size=30), st.integers(0, 2**40 - 1), st.integers(0, 2**45))
def test_pushes_in_columns_are_written_as_pushes_one_by_one(
    pushes: list[tuple[int, int, int, list[str]]], seq: int, ms: int
) -> None:
    batch = columns(pushes)
    singles = list(batch)
    assert [push.device_ids() for push in singles] == [ids for *_, ids in pushes]
    assert len(Pushes([batch, singles[0]])) == len(pushes) + 1
    assert written((ms, seq), [batch]) == written((ms, seq), [*singles])
    # Numbers go on over segments of both kinds.
    assert written((ms, seq), [singles[0], batch, singles[0]]) == written((ms, seq), [singles[0], *singles, singles[0]])


def test_a_push_in_columns_is_the_command_that_was_worked_out_by_hand() -> None:
    commands, devices = written((1_700_000_000_000, 5), [columns([(0, 1, 1_700_000_000_000, ["phone", "京"])])])
    payload = (
        b"\x86\xa8alert_id\xa3a17\xa8revision\x01\xa4kind\xa5alert\xa7ring_km\xcb\x40\x59\x00\x00\x00\x00\x00\x00"
        b"\xa2at\xcf\x00\x00\x01\x8b\xcf\xe5\x68\x00\xaadevice_ids\x92\xa5phone\xa3\xe4\xba\xac"
    )
    assert commands == (
        b"*5\r\n$4\r\nXADD\r\n$14\r\npush:{s3}:didi\r\n$22\r\n1700000000000-83886081\r\n$5\r\nalert\r\n"
        b"$%d\r\n" % len(payload) + payload + b"\r\n"
    )
    assert decode_push(payload).device_ids == ("phone", "京")
    assert log_id_of((1_700_000_000_000, 83_886_081)) == (1_700_000_000_000, 5)
    assert push_id((1_700_000_000_000, 5), 1) == (1_700_000_000_000, 83_886_081)
    assert devices == {"didi": 2}


def test_only_devices_of_new_entries_are_counted() -> None:
    commands = PushCommands(3)
    commands.add(
        (7, 0),
        [columns([(0, 0, 7, ["a", "b"]), (2, 0, 7, ["c"]), (2, 1, 7, ["d"])])],
        PARTNERS,
        np.zeros(len(PARTNERS), np.int64),
    )
    (tally,) = commands.tallies
    assert tally.devices_by_partner([False, True, True]) == {"amap": 1, "didi": 1}
    assert tally.devices_by_partner([False, False, False]) == {}
