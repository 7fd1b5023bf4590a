"""The shard machine against results pinned by hand, and against the slow reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geoindex import shard, shares
from geoindex.entries import Alert, AlertClose, AlertRevision, Settings, Tick
from geoindex.match_kernels import BLOCK_PINGS, SCAN_ROWS
from geoindex.shard import SettingsRefused, ShardMachine
from tests.geoindex.machines import batch_of, run_machines
from tests.reference.events import Log, PingEvent
from tests.reference.generator import HORIZONS_MS, generate_log, logs
from tests.reference.matcher import by_device_and_alert, run_reference
from tests.reference.worked_examples import EXAMPLES, Example

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name.replace(" ", "_"))
@pytest.mark.parametrize("shards", [1, 3])
def test_worked_example(example: Example, shards: int) -> None:
    pushes = run_machines(example.settings, example.events, shards=shards)
    assert by_device_and_alert(pushes) == by_device_and_alert(example.expected_pushes)


@settings(max_examples=150, deadline=None)
@given(log=logs(), shards=st.integers(1, 4), cut_seed=st.integers(0, 2**32 - 1), recorded=st.booleans())
def test_any_cutting_into_batches_and_shards_gives_what_the_reference_gives(
    log: Log, shards: int, cut_seed: int, recorded: bool
) -> None:
    cuts = np.random.default_rng(cut_seed)
    pushes = run_machines(
        log.settings, log.events, shards=shards, cut=lambda: bool(cuts.random() < 0.3), recorded=recorded
    )
    assert by_device_and_alert(pushes) == by_device_and_alert(run_reference(log).pushes)


@pytest.mark.parametrize("seed", range(60))
def test_a_long_adversarial_log_gives_what_the_reference_gives(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log = generate_log(rng)
    pushes = run_machines(
        log.settings, log.events, shards=1 + seed % 5, cut=lambda: bool(rng.random() < 0.2), recorded=seed % 2 == 0
    )
    expected = run_reference(log).pushes
    assert expected, "a log that pushes nothing tests nothing"
    assert by_device_and_alert(pushes) == by_device_and_alert(expected)


def test_more_open_alerts_than_bits_in_a_word_give_what_the_reference_gives() -> None:
    log = generate_log(np.random.default_rng(5), event_count=3000, alert_count_max=300, horizon_ms=HORIZONS_MS[0])
    pushes = run_machines(log.settings, log.events, shards=2, cut=lambda: False, recorded=True)
    assert by_device_and_alert(pushes) == by_device_and_alert(run_reference(log).pushes)


def _many_devices(device_count: int) -> Log:
    """A table of several blocks, rings that appear, grow and end, phones of three partners, some of them old."""
    rng = np.random.default_rng(11)
    settings = Settings(shard_count=1, partners=("amap", "wechat", "unicom"))
    pings = [
        PingEvent(
            settings.partners[int(rng.integers(3))],
            f"phone-{number:05}",
            int(rng.normal(30_6000000, 1_5000000)),
            int(rng.normal(104_0000000, 1_5000000)),
            NOW_MS - int(rng.integers(0, 7 * HOUR_MS)),
        )
        for number in range(device_count)
    ]
    schedule = ((1.0, 100.0), (2.0, 200.0), (None, 300.0))
    wide = Alert("wide", 1, 30.6, 104.0, NOW_MS, schedule, NOW_MS + 24 * HOUR_MS)
    narrow = Alert("narrow", 1, 31.0, 104.5, NOW_MS, ((None, 60.0),), NOW_MS + 24 * HOUR_MS, audience=("wechat",))
    return Log(
        settings,
        (
            *((NOW_MS, ping) for ping in pings),
            (NOW_MS, AlertRevision("publish", wide, (2, 1))),
            (NOW_MS + 1, AlertRevision("publish", narrow, (2, 2))),
            (NOW_MS + HOUR_MS, Tick()),
            (NOW_MS + 2 * HOUR_MS, Tick()),
            (NOW_MS + 2 * HOUR_MS, AlertClose("wide", None, "found", (2, 3))),
        ),
    )


@pytest.mark.parametrize(
    "batch_pings", [1, *(BLOCK_PINGS * count + more for count in (1, 2, 3) for more in (-1, 0, 1))]
)
def test_a_batch_of_any_number_of_blocks_gives_what_the_reference_gives(batch_pings: int) -> None:
    rng = np.random.default_rng(batch_pings)
    settings = Settings(shard_count=1, partners=("amap", "wechat", "unicom"))
    here = Alert("here", 1, 30.6, 104.0, NOW_MS, ((None, 100.0),), NOW_MS + 24 * HOUR_MS)
    # Some are new within their block, many come several times in one; some are late, too old or from the future.
    late_ms = [0, 0, 0, -60_000, -7 * HOUR_MS, 10 * 60_000]
    pings = [
        PingEvent(
            settings.partners[int(rng.integers(3))],
            f"phone-{rng.integers(0, 40 + number // 3):04}",
            int(rng.normal(30_6000000, 9000000)),
            int(rng.normal(104_0000000, 9000000)),
            NOW_MS + int(rng.choice(late_ms)),
        )
        for number in range(12 * BLOCK_PINGS + 5)
    ]
    log = Log(
        settings,
        ((NOW_MS, AlertRevision("publish", here, (2, 1))), *((NOW_MS + 1, ping) for ping in pings)),
    )
    asked = iter(range(len(pings)))
    pushes = run_machines(log.settings, log.events, cut=lambda: next(asked) % batch_pings == batch_pings - 1)
    expected = run_reference(log).pushes
    assert len(expected) > BLOCK_PINGS
    assert by_device_and_alert(pushes) == by_device_and_alert(expected)


def test_a_batch_with_more_hits_than_there_is_room_for_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One ping in five is refused: what was accepted is counted part by part."""
    monkeypatch.setattr(shard, "HITS_MIN", 1)
    settings = Settings(shard_count=1, partners=("amap", "wechat"))
    alerts = [
        Alert(f"alert-{number}", 1, 30.6, 104.0, NOW_MS, ((None, 100.0),), NOW_MS + 24 * HOUR_MS)
        for number in range(100)
    ]
    pings = [
        PingEvent(
            settings.partners[number % 2],
            f"phone-{number:04}",
            30_6000000 + number,
            104_0000000,
            NOW_MS - (7 * HOUR_MS if number % 10 == 3 else 0) + (HOUR_MS if number % 10 == 7 else 0),
        )
        for number in range(600)
    ]
    published = [(NOW_MS, AlertRevision("publish", alert, (2, number))) for number, alert in enumerate(alerts)]
    log = Log(settings, (*published, *((NOW_MS + 1, ping) for ping in pings)))

    machine = ShardMachine()
    machine.apply(0, settings)
    for at_ms, event in published:
        machine.apply(at_ms, event)
    caused = machine.apply(NOW_MS + 1, batch_of(pings, settings.partners))

    assert len(caused.segments) > 2, "a batch whose hits fit tests nothing"
    assert caused.device_count == 480 * 100
    assert machine.counters.pings_accepted == machine.accepted_by_partner.sum() == 480
    assert machine.counters.pings_refused == {"from_the_future": 60, "too_old": 60}
    pushes = run_machines(settings, log.events, cut=lambda: False)
    assert by_device_and_alert(pushes) == by_device_and_alert(run_reference(log).pushes)


def test_a_table_of_several_blocks_gives_what_the_reference_gives() -> None:
    log = _many_devices(3 * SCAN_ROWS + 7)
    pushes = run_machines(log.settings, log.events, cut=lambda: False)
    expected = run_reference(log).pushes
    assert len(expected) > SCAN_ROWS, "a ring that holds few phones tests little"
    assert by_device_and_alert(pushes) == by_device_and_alert(expected)


def test_a_scan_that_cores_share_gives_the_same_pushes_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    log = _many_devices(2 * SCAN_ROWS)
    alone = run_machines(log.settings, log.events, cut=lambda: False)
    monkeypatch.setattr(shard, "SCAN_SHARE_ROWS_MIN", 300)
    monkeypatch.setattr(shares, "core_count", lambda: 3)
    assert run_machines(log.settings, log.events, cut=lambda: False) == alone


def test_a_log_must_begin_with_settings() -> None:
    with pytest.raises(SettingsRefused, match="must begin with a settings entry"):
        ShardMachine().apply(1, Tick())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"format_version": 99}, "format version must be 1 for this program, the log says 99"),
        ({"emission_version": 99}, "emission version must be 1 for this program, the log says 99"),
        ({"hash_name": "md5"}, "hash function must be 'mum128' for this program, the log says 'md5'"),
    ],
)
def test_settings_of_another_program_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsRefused, match=words):
        ShardMachine().apply(0, Settings(**changed))  # type: ignore[arg-type]


def test_what_places_devices_never_changes_within_a_log() -> None:
    machine = ShardMachine()
    machine.apply(0, Settings(shard_count=8, partners=("amap", "baidu"), hash_key=1))
    for changed in (
        Settings(shard_count=9, partners=("amap", "baidu"), hash_key=1),
        Settings(shard_count=8, partners=("amap", "baidu"), hash_key=2),
        Settings(shard_count=8, partners=("baidu", "amap"), hash_key=1),
        Settings(shard_count=8, partners=("amap",), hash_key=1),
    ):
        with pytest.raises(SettingsRefused, match="must stay as the log began with it"):
            machine.apply(1, changed)
