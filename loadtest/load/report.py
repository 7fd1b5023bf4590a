"""A run's report: `report.json` for machines, `report.html` in one file for people, PNG plots; and the exit code."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import orjson

from loadtest.load.compare import compared, read_report, shown, table
from loadtest.load.plots import PICTURES, draw

PASSED, MISSED = 0, 1
REQUESTS_SHOWN = (("p50_ms", "p50"), ("p90_ms", "p90"), ("p99_ms", "p99"), ("p99_9_ms", "p99.9"), ("max_ms", "max"))

_STYLE = """
:root { --ink: #1c2b3a; --soft: #5b6b7b; --line: #d9e0e6; --good: #0b7a75; --bad: #b3382c; --paper: #ffffff; }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", sans-serif; color: var(--ink);
  background: #f5f7f9; margin: 0 }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; background: var(--paper) }
h1 { font-size: 26px; margin: 0 0 4px } h2 { font-size: 18px; margin: 36px 0 10px }
p { margin: 6px 0 } .soft { color: var(--soft) }
.verdict { border-left: 6px solid; padding: 12px 16px; margin: 18px 0; background: #f8fafb }
.verdict strong { font-size: 18px } .good { border-color: var(--good) } .bad { border-color: var(--bad) }
.good strong { color: var(--good) } .bad strong { color: var(--bad) }
.warn { border-color: #d39f2a } .warn strong { color: #8a6410 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(165px, 1fr)); gap: 10px; margin: 18px 0 }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px }
.tile b { display: block; font-size: 21px; font-variant-numeric: tabular-nums }
.tile span { color: var(--soft); font-size: 13px }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums }
th { text-align: left; color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line);
  padding: 4px 10px 4px 0 }
td { border-bottom: 1px solid var(--line); padding: 4px 10px 4px 0; vertical-align: top }
.n { text-align: right; white-space: nowrap } .met { color: var(--good) }
.missed { color: var(--bad); font-weight: 700 }
.scroll { overflow-x: auto }
img { width: 100%; height: auto; margin: 10px 0 } code { font-size: 13px }
"""


def write_report(found: dict[str, Any], out: Path, compare: Path | None, say: Callable[[str], None]) -> int:
    """All files of a run; the exit code. Raises OSError."""
    out.mkdir(parents=True, exist_ok=True)
    comparison = None
    if compare is not None:
        try:
            comparison = compared(found, read_report(compare))
        except ValueError as problem:
            say(f"nothing to compare with: {problem}")
    (out / "report.json").write_bytes(orjson.dumps(found, option=orjson.OPT_INDENT_2))
    for name in PICTURES:
        (out / f"{name}.png").unlink(missing_ok=True)
    drawn = draw(found, out)
    (out / "report.html").write_text(html_of(found, drawn, comparison), encoding="utf-8")
    say(words_of(found))
    if comparison is not None:
        say(table(comparison))
    say(f"report: {out / 'report.html'} and report.json, {len(drawn)} plots")
    return PASSED if found["passed"] else MISSED


def words_of(found: dict[str, Any]) -> str:
    """The end of a run, for a terminal."""
    values = found["values"]
    lines = [""]
    for name, label in _HEADLINES:
        if values.get(name) is not None:
            lines.append(f"  {label:46} {_valued(name, values[name]):>14}")
    if found["limit"] is not None:
        lines += ["", *(f"  {line}" for line in limit_words(found["limit"]))]
    for reason in found["generator_saturated"]:
        lines.append(f"  THE GENERATOR WAS THE LIMIT: {reason}; latencies are upper bounds of the system's")
    lines += ["", *threshold_lines(found)]
    lines.append(f"  audit: {found['audit']['line']}")
    lines += [f"    {example}" for example in found["audit"]["examples"][:5]]
    if found["problem"]:
        lines.append(f"  FAILED: {found['problem']}")
    lines.append(f"  {'passed' if found['passed'] else 'NOT PASSED'}: {found['scenario']}")
    return "\n".join(lines)


def threshold_lines(found: dict[str, Any]) -> list[str]:
    """Those that were missed with their reasons; the others as a number."""
    by = {"met": 0, "missed": 0, "not measured": 0}
    lines = []
    for verdict in found["thresholds"]:
        by[verdict["verdict"]] += 1
        if verdict["verdict"] == "missed":
            lines.append(f"  MISSED {verdict['name']}: {shown(verdict['value'])}, wanted {verdict['wanted']}")
            lines.append(f"         {verdict['reason']}")
    unmeasured = f", {by['not measured']} not measured" if by["not measured"] else ""
    return [*lines, f"  thresholds: {by['met']} met, {by['missed']} missed{unmeasured}"]


def limit_words(limit: dict[str, Any]) -> list[str]:
    """What a stepping run found."""
    held = "no step" if limit["held_per_s"] is None else f"{limit['held_per_s']:,.0f} pings/s"
    lines = [f"limit: {held} held"]
    if limit["broken_per_s"] is not None:
        lines.append(f"at {limit['broken_per_s']:,.0f} pings/s gave way first: {limit['gave_way']}")
        if limit["busiest"]:
            lines.append(limit["busiest"])
    else:
        lines.append("nothing gave way: step further up (--step-from, --steps-max)")
    return lines


_HEADLINES = (
    ("pings_per_s", "pings accepted a second"),
    ("ping_request_p99_ms", "request with pings, p99 (from due)"),
    ("ping_to_push_p50_ms", "ping to push, p50"),
    ("ping_to_push_p99_ms", "ping to push, p99"),
    ("publish_p99_ms", "publish answered, p99"),
    ("alert_first_push_p99_ms", "publish to first push, p99"),
    ("alert_last_push_p99_ms", "publish to last push, p99"),
    ("hour_to_push_p99_ms", "the hour to push, p99"),
    ("recovery_max_s", "caught up after a crash"),
    ("lag_p99_ms", "lag, p99"),
    ("devices_told", "devices told"),
    ("server_memory_mb", "memory of Valkey, most"),
    ("flow_rss_mb", "memory of the flow, most"),
    ("flow_cores", "cores: flow"),
    ("valkey_cores", "cores: Valkey"),
    ("gateway_cores", "cores: gateway"),
    ("generator_cores", "cores: generator"),
    ("feeder_cores", "cores: generator's feeder"),
    ("generator_late_p99_ms", "generator late, p99"),
)


def _valued(name: str, value: float) -> str:
    for suffix, unit in (("_ms", "ms"), ("_mb", "MB"), ("_s", "s")):
        if name.endswith(suffix) and not name.endswith("_per_s"):
            return f"{shown(round(value, 1) if value < 1000 else value)} {unit}"
    return f"{value:.2f}" if name.endswith("_cores") else shown(value)


# ---- HTML


def html_of(found: dict[str, Any], plots: list[Path], comparison: dict[str, Any] | None) -> str:
    """One file that needs nothing else: pictures are inside."""
    length = found["values"]["load_s"]
    spec = found["spec"]
    title = f"Load test: {found['scenario']}"
    at = datetime.fromisoformat(found["at"]).strftime("%Y-%m-%d %H:%M UTC")
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(found["about"])}</p>',
        f'<p class="soft">{escape(at)} · {length:,.0f} s of load · {spec["phones"]:,} phones · {_rate_words(found)} · '
        f"{found['workers']} worker{'s' if found['workers'] > 1 else ''} · {escape(str(found.get('machine', '')))}</p>",
        _verdict_box(found),
        _audit_box(found),
        _limit_box(found),
        _saturation_box(found),
        _tiles(found),
        "<h2>Thresholds</h2>",
        _thresholds_table(found),
        "<h2>Over time</h2>",
        *(_picture(path) for path in plots),
        "<h2>Requests and end-to-end times</h2>",
        '<p class="soft">Milliseconds from the moment each was due, behind the warm-up.</p>',
        _requests_table(found),
        _alerts_section(found),
        _steps_section(found),
        _comparison_section(comparison),
        "<h2>All values</h2>",
        _values_table(found),
        f'<p class="soft">Python {escape(str(found.get("python", "")))}. The same values stand in report.json.</p>',
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>'
        f"<body><main>{''.join(sections)}</main></body></html>\n"
    )


def _rate_words(found: dict[str, Any]) -> str:
    if found["spec"]["stepping"] is not None:
        return f"stepping up from {found['spec']['stepping']['from_per_s']:,.0f} pings/s"
    if found["spec"]["pings_file"] is not None:
        return f"recorded pings, {found['spec']['warp']:g} times as fast"
    return f"{found['spec']['pings_per_s']:,.0f} pings/s"


def _box(kind: str, head: str, *lines: str) -> str:
    paragraphs = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<div class="verdict {kind}"><strong>{escape(head)}</strong>{paragraphs}</div>'


def _verdict_box(found: dict[str, Any]) -> str:
    missed = [verdict for verdict in found["thresholds"] if verdict["verdict"] == "missed"]
    lines = [found["problem"]] if found["problem"] else []
    lines += [
        f"{verdict['name']}: {shown(verdict['value'])}, wanted {verdict['wanted']}. {verdict['reason']}"
        for verdict in missed
    ]
    if found["passed"]:
        return _box("good", "Passed", f"{len(found['thresholds'])} thresholds, none missed.")
    return _box("bad", "Not passed", *lines)


def _audit_box(found: dict[str, Any]) -> str:
    audit = found["audit"]
    head = "Audit: nobody missed, nobody told twice" if audit["clean"] else "Audit: not clean"
    if audit["skipped"] is not None:
        head = "No audit"
    return _box("good" if audit["clean"] else "bad", head, audit["line"], *audit["examples"][:10])


def _limit_box(found: dict[str, Any]) -> str:
    if found["limit"] is None:
        return ""
    head, *lines = limit_words(found["limit"])
    return _box("warn", head[0].upper() + head[1:], *lines)


def _saturation_box(found: dict[str, Any]) -> str:
    if not found["generator_saturated"]:
        return ""
    return _box(
        "warn",
        "The generator was the limit",
        *found["generator_saturated"],
        "Latencies in this report are upper bounds of the system's: give the generator cores, or more workers.",
    )


def _tiles(found: dict[str, Any]) -> str:
    tiles = [
        f'<div class="tile"><b>{escape(_valued(name, found["values"][name]))}</b><span>{escape(label)}</span></div>'
        for name, label in _HEADLINES
        if found["values"].get(name) is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(head: list[str], rows: list[list[str]], numbers_from: int = 1) -> str:
    """Cells are HTML already."""

    def cells(tag: str, row: list[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if index >= numbers_from else ''}>{cell}</{tag}>" for index, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head)}</tr>{body}</table></div>'


def _thresholds_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"<code>{escape(verdict['name'])}</code>",
            escape(shown(verdict["value"])),
            escape(verdict["wanted"]),
            f'<span class="{verdict["verdict"].split()[0]}">{escape(verdict["verdict"])}</span>',
            escape(verdict["reason"]),
        ]
        for verdict in found["thresholds"]
    ]
    return _table(["", "value", "wanted", "", "why"], rows, numbers_from=9)


def _picture(path: Path) -> str:
    title = PICTURES[path.stem][0]
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(title)}" src="data:image/png;base64,{encoded}">'


def _requests_table(found: dict[str, Any]) -> str:
    rows = []
    for request in found["requests"]:
        reasons = ", ".join(f"{reason} × {count:,}" for reason, count in request["reasons"].items())
        failures = f"{request['failures']:,}" + (f'<br><span class="soft">{escape(reasons)}</span>' if reasons else "")
        rows.append(
            [
                escape(request["name"]),
                f"{request['count']:,}",
                failures,
                *(f"{request[key]:,.1f}" if key in request else "–" for key, _ in REQUESTS_SHOWN),
            ]
        )
    return _table(["", "count", "refused", *(label for _, label in REQUESTS_SHOWN)], rows)


def _alerts_section(found: dict[str, Any]) -> str:
    if not found["alerts"]:
        return ""
    rows = [
        [
            f"<code>{escape(alert['alert_id'])}</code>" + (" (probes)" if alert["is_watch"] else ""),
            f"{alert['answered_ms']:,.0f}",
            "–" if alert["first_push_ms"] is None else f"{alert['first_push_ms']:,.0f}",
            "–" if alert["last_push_ms"] is None else f"{alert['last_push_ms']:,.0f}",
            f"{alert['devices']:,}",
        ]
        for alert in found["alerts"][:100]
    ]
    more = "" if len(found["alerts"]) <= 100 else f'<p class="soft">and {len(found["alerts"]) - 100} more</p>'
    head = ["alert", "answered, ms", "first push, ms", "last push, ms", "devices told at once"]
    note = '<p class="soft">From the moment at which the publish was due; pushes as partners took them.</p>'
    return f"<h2>Alerts</h2>{note}{_table(head, rows)}{more}"


def _steps_section(found: dict[str, Any]) -> str:
    if found["limit"] is None:
        return ""
    names = sorted({name for step in found["limit"]["steps"] for name in step["figures"]})
    roles = sorted({role for step in found["limit"]["steps"] for role in step["cores"]})
    rows = [
        [
            f"{step['pings_per_s']:,.0f}",
            *(shown(step["figures"].get(name)) for name in names),
            *(shown(step["cores"].get(role)) for role in roles),
            '<span class="met">held</span>'
            if step["held"]
            else f'<span class="missed">{escape(", ".join(step["broke"]))}</span>',
        ]
        for step in found["limit"]["steps"]
    ]
    return f"<h2>Steps</h2>{_table(['pings/s', *names, *(f'cores: {role}' for role in roles), ''], rows)}"


def _comparison_section(comparison: dict[str, Any] | None) -> str:
    if comparison is None:
        return ""
    rows = [
        [
            f"<code>{escape(row['name'])}</code>",
            shown(row["old"]),
            shown(row["new"]),
            "" if row["change"] is None else f"{row['change']:+.1%}",
            f'<span class="{"missed" if row["mark"] == "worse" else "met"}">{row["mark"]}</span>',
        ]
        for row in comparison["rows"]
    ]
    differs = "".join(f"<p>Not the same: {escape(words)}</p>" for words in comparison["differs"])
    head = ["", str(comparison["old_at"]), str(comparison["new_at"]), "change", ""]
    return f"<h2>Compared with an earlier run</h2>{differs}{_table(head, rows)}"


def _values_table(found: dict[str, Any]) -> str:
    rows = [[f"<code>{escape(name)}</code>", shown(value)] for name, value in sorted(found["values"].items())]
    half = (len(rows) + 1) // 2
    columns = [
        [*left, *(rows[half + index] if half + index < len(rows) else ["", ""])]
        for index, left in enumerate(rows[:half])
    ]
    return _table(["", "", "", ""], columns)
