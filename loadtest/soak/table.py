"""The fault table: every line once, with what shows it.

A line is shown by a scenario (`tuanyuan soak NAME`, small in the tests), or by tests alone, where nothing but a shard
machine or a decoder is at work and milliseconds say all there is to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loadtest.soak import scenarios
from loadtest.soak.offline import partner_offline
from loadtest.soak.scenarios import Size
from loadtest.soak.stage import Setting, Stage

ONCE = Size()
PLAIN = Setting()
TRIMS = Setting(trims=True)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table. Either `play` with its two sizes, or `tests`."""

    name: str
    fault: str
    """As the table says it."""
    play: Callable[[Stage, Size], None] | None = None
    small: Size = ONCE
    full: Size = ONCE
    setting: Setting = PLAIN
    tests: tuple[str, ...] = ()
    """Tests that show it, as pytest names them."""

    @property
    def command(self) -> str:
        """What plays it at full size."""
        if self.play is not None:
            return f"tuanyuan soak {self.name}"
        return f"pytest {' '.join(self.tests)}"


def _example(name: str) -> str:
    return f"tests/geoindex/test_shard.py::test_worked_example[1-{name.replace(' ', '_')}]"


LINES: tuple[Line, ...] = (
    Line("kill-flow", "kill -9 of the flow at random points", scenarios.kill_flow, Size(6), Size(200), TRIMS),
    Line(
        "kill-before-checkpoint",
        "kill between push and checkpoint",
        scenarios.kill_before_checkpoint,
        Size(2),
        Size(40),
    ),
    Line("kill-in-checkpoint", "kill during a checkpoint", scenarios.kill_in_checkpoint, Size(5), Size(100), TRIMS),
    Line("flipped-byte", "a flipped byte in a checkpoint", scenarios.flipped_byte, Size(1), Size(50), TRIMS),
    Line("deleted-folder", "a deleted checkpoint folder", scenarios.deleted_folder, Size(1), Size(10), TRIMS),
    Line("process-counts", "1 -> 2 -> 4 -> 1 processes", scenarios.other_process_counts, Size(1), Size(10)),
    Line(
        "two-workers",
        "two workers running the same shard",
        scenarios.two_workers,
        Size(seconds=1.5),
        Size(seconds=30),
        TRIMS,
    ),
    Line("kill-valkey", "kill -9 of Valkey", scenarios.kill_valkey, Size(3), Size(50), TRIMS),
    Line(
        "truncated-tail",
        "truncated AOF tail",
        scenarios.truncated_tail,
        Size(2),
        Size(50),
        Setting(keeps_acknowledged=False),
    ),
    Line("lost-replies", "replies of XADD lost", scenarios.lost_replies, Size(seconds=1.5), Size(seconds=60), TRIMS),
    Line("partition", "partition (network namespace)", scenarios.partition, Size(1, 1.5), Size(2, 60)),
    Line("maxmemory", "Valkey at maxmemory", scenarios.out_of_memory, Size(1, 0.5), Size(20, 2)),
    Line("disk-full", "disk full", scenarios.full_disk, Size(1), Size(20), Setting(disk_mb=256)),
    Line(
        "partner-offline",
        "a partner offline for hours while others flow (their p99 unchanged within 10 %)",
        partner_offline,
        Size(1, 0.5, hours=0.005),
        Size(50, 0.6, hours=2.0),
        Setting(checkpoint_interval_s=30.0),
    ),
    Line("consumer-dies", "consumer dies before ack", scenarios.consumer_dies, Size(3), Size(100)),
    Line("burst", "10x burst of pings (memory bounded)", scenarios.burst, Size(seconds=0.7), Size(seconds=15)),
    Line("duplicate-pings", "50 % duplicate pings", scenarios.duplicate_pings, Size(seconds=1), Size(seconds=30)),
    Line("shuffled-pings", "pings shuffled by 10 min", scenarios.shuffled_pings, Size(seconds=1), Size(seconds=30)),
    Line(
        "pings-of-other-days",
        "pings 24 h in the future or the past",
        scenarios.pings_of_other_days,
        Size(seconds=1),
        Size(seconds=30),
    ),
    Line("flow-clock", "system clock +-2 h: the flow's", scenarios.flow_clock, Size(1, 0.4), Size(10, 2)),
    Line("server-clock", "system clock +-2 h: the server's", scenarios.server_clock, Size(1, 0.5), Size(2, 15)),
    Line(
        "outage-across-growth",
        "2 h outage across a growth step",
        scenarios.outage_across_growth,
        setting=Setting(begins_logs=False),
        tests=(
            "tests/flows/test_recovery.py::test_a_ring_that_grew_while_no_flow_ran_tells_whom_it_reached_then",
            _example("missed growth runs in time order with the clock at each hour"),
        ),
    ),
    Line("ping-races-alert", "ping races alert in both orders", scenarios.ping_races_alert, Size(6), Size(100)),
    Line("overlapping-alerts", "two overlapping alerts", tests=(_example("two alerts tell a device twice"),)),
    Line("close-races-match", "close races match", scenarios.close_races_match, Size(6), Size(100)),
    Line(
        "kill-in-closing",
        "kill in the middle of a closing fan-out",
        scenarios.kill_in_closing,
        Size(4),
        Size(20),
    ),
    Line(
        "found-after-expiry",
        "found after a told phone's location expired",
        tests=(
            _example("the end is told to those who left the ring or fell silent"),
            _example("a device that was told is told the end long after its location was wiped"),
        ),
    ),
    Line(
        "edited-to-another-city",
        "an alert edited to another city",
        tests=(
            _example("those told stay told when the ring moves away"),
            _example("an edit updates those told and alerts those newly inside"),
        ),
    ),
    Line(
        "malformed",
        "NaN, lat 91, 65-byte ids, truncated msgpack, length headers of 4 GB, nesting bombs",
        tests=(
            "tests/flows/test_wire.py::test_bombs_are_refused_in_10_ms_and_1_mb",
            "tests/flows/test_wire.py::test_malformed_entry_is_refused_with_its_reason",
            "tests/flows/test_wire.py::test_bad_row_is_set_aside_and_counted",
            "tests/flows/test_wire.py::test_id_of_a_wrong_length_is_set_aside",
            "tests/flows/test_wire.py::test_damaged_entries_are_entries_or_malformed",
            "tests/flows/test_live.py::test_malformed_entries_are_counted_and_passed_over_and_nothing_else_is_lost",
        ),
    ),
)
BY_NAME = {line.name: line for line in LINES}

assert len(BY_NAME) == len(LINES), "names are unique"
assert all(line.play is not None or line.tests for line in LINES), "every line is shown by something"
