"""How `tuanyuan top` looks: lines of text for any size of terminal, the most important first.

A function of what was seen, the time and the size: nothing here asks anybody. Where not everything fits, the end says
how much is not shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from tuanyuan.top_look import Look

COLUMN_GAP = "  "
ALARMS_MAX = 4
QUIET = "·"
"""Where nothing is known."""


def screen(look: Look, now_s: float, width: int, height: int) -> list[Text]:
    """At most `height` lines of at most `width` columns. `now_s`: as `Look.seen_s`."""
    figures: Mapping[str, float] = {} if look.figures is None else look.figures.figures
    lines = [_title(look, figures)]
    if look.is_stale(now_s):
        lines.append(_stale(look, now_s))
    lines += _alarms(look)
    lines += _totals(figures, width)
    left = height - len(lines)
    partners = _partner_rows(figures)
    # By the server's clock, whatever this machine's says.
    now_ms = 0 if look.figures is None else look.figures.at_ms + round(1000 * (now_s - look.seen_s))
    alerts = _alert_rows(look, now_ms)
    # Each table gets what it needs; where that is too much, the alerts half of it at least.
    shown_alerts = _fitted(alerts, max(left // 2, left - len(partners)), "alerts")
    lines += _fitted(partners, left - len(shown_alerts), "partners")
    lines += shown_alerts
    fitted = lines[:height]
    for line in fitted:
        line.truncate(width, overflow="ellipsis")
    return fitted


def _title(look: Look, figures: Mapping[str, float]) -> Text:
    line = Text()
    line.append("tuanyuan top", style="bold")
    if look.figures is not None:
        flows, gateways = int(figures.get("flow_processes", 0)), int(figures.get("gateway_processes", 0))
        line.append(f"{COLUMN_GAP}flows ")
        line.append(str(flows), style="" if flows else "bold red")
        line.append(f"{COLUMN_GAP}gateways {gateways}")
        live = figures.get("devices_live")
        line.append(f"{COLUMN_GAP}phones {'<20' if live is None else count(live)}")
        line.append(f"{COLUMN_GAP}alerts {len(look.alerts)}")
    line.append(f"{COLUMN_GAP}q quits", style="dim")
    return line


def _stale(look: Look, now_s: float) -> Text:
    if look.figures is None:
        words = "nothing was seen yet"
    else:
        words = f"STALE: this is {look.age_s(now_s):.0f} s old"
    return Text(f"{words}{f': {look.problem}' if look.problem else ''}", style="bold white on red")


def _alarms(look: Look) -> list[Text]:
    alarms = () if look.figures is None else look.figures.alarms
    lines = [
        Text(f"alarm {alarm.kind}{f' ({alarm.source})' if alarm.source else ''}: {alarm.words}", style="bold red")
        for alarm in alarms[:ALARMS_MAX]
    ]
    if len(alarms) > ALARMS_MAX:
        lines.append(Text(f"and {len(alarms) - ALARMS_MAX} more alarms: tuanyuan health", style="bold red"))
    return lines


def _totals(figures: Mapping[str, float], width: int) -> list[Text]:
    lines = [
        _pairs(
            ("pings/s", rate(figures.get("pings_per_s"))),
            ("matches/s", rate(figures.get("matches_per_s"))),
            ("refused/s", rate(figures.get("pings_refused_per_s"))),
            ("turned away/s", rate(figures.get("pings_turned_away_per_s"))),
        ),
        _pairs(
            ("publish to queue p50", duration(figures.get("publish_to_queue_p50_ms"))),
            ("p99", duration(figures.get("publish_to_queue_p99_ms"))),
            ("ping to queue p50", duration(figures.get("ping_to_queue_p50_ms"))),
            ("p99", duration(figures.get("ping_to_queue_p99_ms"))),
        ),
        _by_shard(figures, width),
        _pairs(
            ("checkpoint", duration(figures.get("checkpoint_age_ms"))),
            ("server", f"{size(figures.get('server_memory_bytes'))} of {size(figures.get('server_memory_max_bytes'))}"),
            ("flow", size(figures.get("flow_memory_bytes"))),
            ("gateway", size(figures.get("gateway_memory_bytes"))),
            ("disk free", size(figures.get("disk_free_bytes"))),
        ),
    ]
    refused = [
        (f"{name.partition(':')[2]}", rate(value))
        for name, value in figures.items()
        if name.startswith(("pings_refused_per_s:", "pings_turned_away_per_s:")) and value > 0
    ]
    if refused:
        lines.append(_pairs(("refused by reason", ""), *refused))
    return lines


def _by_shard(figures: Mapping[str, float], width: int) -> Text:
    line = _pairs(("lag", duration(figures.get("lag_ms"))))
    shards = sorted(
        (int(name.partition(":")[2]), value) for name, value in figures.items() if name.startswith("lag_ms:")
    )
    if shards:
        line.append(f"{COLUMN_GAP}by shard", style="dim")
    for shown, (shard, lag_ms) in enumerate(shards):
        words = f" {shard}:{duration(lag_ms).replace(' ', '')}"
        if line.cell_len + len(words) > width - len(" +99"):
            line.append(f" +{len(shards) - shown}", style="dim")
            break
        line.append(words, style="yellow" if lag_ms > 5_000 else "")
    return line


def _partner_rows(figures: Mapping[str, float]) -> list[Text]:
    names = sorted({name.partition(":")[2] for name in figures if name.startswith(("pings_per_s:", "queue_entries:"))})
    heads = ("partner", "pings/s", "queued", "pending", "oldest", "dead letters")
    rows = [
        (
            name,
            rate(figures.get(f"pings_per_s:{name}")),
            count(figures.get(f"queue_entries:{name}")),
            count(figures.get(f"queue_pending:{name}")),
            duration(figures.get(f"queue_oldest_ms:{name}")),
            count(figures.get(f"dead_letters:{name}", 0)),
        )
        for name in names
    ]
    return _table(heads, rows)


def _alert_rows(look: Look, now_ms: int) -> list[Text]:
    heads = ("alert", "ring", "grows in", "to", "told", "delivered", "acknowledged")
    rows = []
    for alert in look.alerts:
        growth_ms, next_km = alert["next_growth_ms"], alert["next_ring_km"]
        mark = "" if alert["status"] == "actual" else " (exercise)"
        state = "" if alert["state"] == "open" else " (expired)"
        rows.append(
            (
                f"{alert['id']}{mark}{state}",
                f"{alert['ring_km']:g} km",
                "" if growth_ms is None else countdown(growth_ms - now_ms),
                "" if next_km is None else f"{next_km:g} km",
                *(_shown(alert[name]) for name in ("told", "delivered", "acknowledged")),
            )
        )
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[Text]:
    """A line of heads and one a row: the first column to the left, numbers to the right."""
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return COLUMN_GAP.join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))])

    return [Text(line(heads), style="dim"), *(Text(line(row)) for row in rows)]


def _fitted(lines: list[Text], room: int, what: str) -> list[Text]:
    """As many lines of a table as there is room for; the last one then says how many are missing."""
    if len(lines) <= room:
        return lines
    if room < 2:
        return []
    missing = len(lines) - room + 1
    return [*lines[: room - 1], Text(f"and {missing} more {what}", style="dim")]


def _pairs(*pairs: tuple[str, str]) -> Text:
    line = Text()
    for index, (name, value) in enumerate(pairs):
        line.append(f"{COLUMN_GAP if index else ''}{name} ", style="dim")
        line.append(value)
    return line


# --- numbers as people read them --------------------------------------------------------------------------------------


def count(value: float | None) -> str:
    """`980`, `12.3k`, `1.20M`."""
    if value is None:
        return QUIET
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * factor if unit == "k" else value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def rate(value: float | None) -> str:
    """As `count`, with a digit behind the point where it is small."""
    if value is not None and 0 < value < 10:
        return f"{value:.1f}"
    return count(value)


def duration(value_ms: float | None) -> str:
    """`0.5 ms`, `120 ms`, `3.2 s`, `5 min`, `2.1 h`."""
    if value_ms is None:
        return QUIET
    if value_ms < 1_000:
        return f"{value_ms:.3g} ms"
    if value_ms < 100_000:
        return f"{value_ms / 1_000:.3g} s"
    if value_ms < 6_000_000:
        return f"{value_ms / 60_000:.0f} min"
    return f"{value_ms / 3_600_000:.1f} h"


def size(value: float | None) -> str:
    """`1.2 GB`; powers of ten."""
    if value is None:
        return QUIET
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B"


def countdown(value_ms: float) -> str:
    """`0:59`, `12:05`, `1:02:03`; `now` when it is due."""
    if value_ms <= 0:
        return "now"
    minutes, seconds = divmod(int(value_ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _shown(value: Any) -> str:
    return "<20" if value is None else count(value)
