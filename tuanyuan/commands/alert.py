"""`tuanyuan alert publish | update | close | list | show`: the alert desk from a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
import redis
import typer
from rich.table import Table

from flows.alert_json import AlertRefused, alert_to_json, parse_alert, parse_changes, parse_content
from flows.desk import Desk, DeskAlert, DeskAnswer, Relay, RevisionConflict
from flows.guards import refused_now
from flows.log import SettingsMismatch
from flows.log_lines import say_unsafe
from flows.server import Link, ServerRefused
from geoindex.entries import OUTCOMES
from geoindex.rings import growth_times_ms, radius_km
from tuanyuan.connection import ValkeyOption, VarOption, read_config, server, settings_of
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, console, fail, note

COPY_TIMEOUT_S = 10.0

EPILOG = """
Example:

    tuanyuan alert publish a17 --lat 30.66 --lng 104.06 --missing-since 2026-05-01T14:30+08:00

    tuanyuan alert close a17 --outcome found
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Publish, edit, close and look at alerts.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

AlertId = Annotated[str, typer.Argument(help="The alert's id, 1 to 64 characters.")]
LatOption = Annotated[float | None, typer.Option(help="Latitude, degrees, WGS-84.")]
LngOption = Annotated[float | None, typer.Option(help="Longitude.")]
SinceOption = Annotated[str | None, typer.Option(help="When the child went missing: ISO 8601, epoch ms, or now.")]
ScheduleOption = Annotated[
    str | None, typer.Option(help="Ring radius in km until so many hours: 1:100,2:200,3:300,500 (the default).")
]
AudienceOption = Annotated[list[str] | None, typer.Option(help="Only this partner; may be repeated.")]
ExpiresOption = Annotated[str | None, typer.Option(help="Default: 72 h after the child went missing.")]
FileOption = Annotated[Path | None, typer.Option("--file", help="The alert as a JSON object, instead of options.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
UnsafeOption = Annotated[
    bool | None, typer.Option("--unsafe-server", help="Go on with a server that may lose what it acknowledged.")
]
RevisionOption = Annotated[
    int | None, typer.Option(help="The revision you saw: refused if somebody edited the alert since.")
]


@app.command(epilog=EPILOG)
def publish(
    alert_id: Annotated[str | None, typer.Argument(help="The alert's id; with --file it may stand there.")] = None,
    lat: LatOption = None,
    lng: LngOption = None,
    missing_since: SinceOption = None,
    schedule: ScheduleOption = None,
    audience: AudienceOption = None,
    expires_at: ExpiresOption = None,
    exercise: Annotated[bool, typer.Option("--exercise", help="An exercise, for the --audience alone.")] = False,
    file: FileOption = None,
    json: JsonOption = False,
    unsafe_server: UnsafeOption = None,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Publish an alert: every live phone in its ring is told, now and as the ring grows."""
    words = _words(alert_id, lat, lng, missing_since, schedule, audience, expires_at, file)
    if exercise:
        words["status"] = "exercise"
    with _safe_desk(valkey, var, unsafe_server) as (client, desk):
        alert = parse_alert(words, "publish", settings_of(client).default_schedule)
        content = parse_content(words)
        _answer(client, desk, alert.alert_id, lambda: desk.publish(alert, content), json)


@app.command(epilog="Example:\n\n    tuanyuan alert update a17 --lat 29.56 --lng 106.55")
def update(
    alert_id: AlertId,
    lat: LatOption = None,
    lng: LngOption = None,
    missing_since: SinceOption = None,
    schedule: ScheduleOption = None,
    audience: AudienceOption = None,
    expires_at: ExpiresOption = None,
    file: FileOption = None,
    revision: RevisionOption = None,
    json: JsonOption = False,
    unsafe_server: UnsafeOption = None,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Edit an open alert: what is not named stays as it is. Everyone told hears of it."""
    words = _words(alert_id, lat, lng, missing_since, schedule, audience, expires_at, file)
    with _safe_desk(valkey, var, unsafe_server) as (client, desk):
        _, _, changes = parse_changes(words, "update")
        content = parse_content(words)
        if not changes and not content:
            fail("update: nothing to change was named", EXIT_USAGE)
        _answer(client, desk, alert_id, lambda: desk.update(alert_id, changes, revision, content), json)


@app.command(epilog="Example:\n\n    tuanyuan alert close a17 --outcome found")
def close(
    alert_id: AlertId,
    outcome: Annotated[str, typer.Option(help=f"One of {', '.join(OUTCOMES)}.")],
    revision: RevisionOption = None,
    json: JsonOption = False,
    unsafe_server: UnsafeOption = None,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """End an alert: everyone told hears that the search has ended."""
    with _safe_desk(valkey, var, unsafe_server) as (client, desk):
        _answer(client, desk, alert_id, lambda: desk.close(alert_id, outcome, revision), json)


@app.command("list", epilog="Example:\n\n    tuanyuan alert list --open --json")
def list_alerts(
    only_open: Annotated[bool, typer.Option("--open", help="Open ones alone.")] = False,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """List alerts, the last published first."""
    with _desk(valkey, var) as (_, desk):
        alerts, now_ms = desk.list(only_open), desk.now_ms()
    if json:
        _print_json([_view(alert, now_ms) for alert in alerts])
        return
    table = Table("alert", "state", "rev", "place", "ring", "grows", box=None)
    for alert in alerts:
        view = _view(alert, now_ms)
        grows = (
            "" if view["next_growth"] is None else f"to {view['next_ring_km']:g} km at {_clock(view['next_growth'])}"
        )
        place = f"{alert.alert.lat:.4f}, {alert.alert.lng:.4f}"
        table.add_row(
            alert.alert.alert_id, view["state"], str(alert.alert.revision), place, f"{view['ring_km']:g} km", grows
        )
    console.print(table if alerts else "no alerts")


@app.command(epilog="Example:\n\n    tuanyuan alert show a17")
def show(alert_id: AlertId, json: JsonOption = False, valkey: ValkeyOption = None, var: VarOption = None) -> None:
    """Show one alert."""
    with _desk(valkey, var) as (_, desk):
        alert, now_ms = desk.show(alert_id), desk.now_ms()
    if alert is None:
        fail(f"alert {alert_id!r}: was never published", EXIT_REFUSED)
    view = _view(alert, now_ms)
    if json:
        _print_json(view)
        return
    for name, value in view.items():
        console.print(f"{name:>14}: {value}", highlight=False, markup=False)


@contextmanager
def _desk(valkey: str | None, var: Path | None) -> Iterator[tuple[redis.Redis, Desk]]:
    with server(valkey, var) as client:
        try:
            yield client, Desk(client)
        except (AlertRefused, RevisionConflict, SettingsMismatch) as refusal:
            fail(str(refusal), EXIT_REFUSED)


@contextmanager
def _safe_desk(valkey: str | None, var: Path | None, unsafe_server: bool | None) -> Iterator[tuple[redis.Redis, Desk]]:
    """A desk on a server that keeps what it acknowledges: an officer's answer must survive a crash."""
    config = read_config(valkey=valkey, var=var, unsafe_server=unsafe_server)
    with _desk(valkey, var) as (client, desk):
        try:
            link = Link(client, config.unsafe_server)
        except ServerRefused as refusal:
            fail(str(refusal), EXIT_REFUSED)
        link.close()
        say_unsafe(bool(link.faults))
        yield client, desk


def _words(
    alert_id: str | None,
    lat: float | None,
    lng: float | None,
    missing_since: str | None,
    schedule: str | None,
    audience: list[str] | None,
    expires_at: str | None,
    file: Path | None,
) -> dict[str, Any]:
    """Options (and a file below them) as the JSON object that they stand for."""
    words: dict[str, Any] = {}
    if file is not None:
        try:
            words = orjson.loads(file.read_bytes())
        except (OSError, ValueError) as problem:
            fail(f"--file {file}: {problem}", EXIT_USAGE)
        if not isinstance(words, dict):
            fail(f"--file {file}: must hold one JSON object", EXIT_USAGE)
    if alert_id is not None:
        words["alert_id"] = alert_id
    if (lat is None) != (lng is None):
        fail("--lat and --lng go together", EXIT_USAGE)
    if lat is not None:
        words["location"] = {"lat": lat, "lng": lng}
    if missing_since is not None:
        words["missing_since"] = round(time.time() * 1000) if missing_since == "now" else missing_since
    if schedule is not None:
        words["schedule"] = _schedule(schedule)
    if audience:
        words["audience"] = audience
    if expires_at is not None:
        words["expires_at"] = expires_at
    return words


def _schedule(text: str) -> list[list[float | None]]:
    """`1:100,2:200,500` -> [[1, 100], [2, 200], [None, 500]]."""
    steps: list[list[float | None]] = []
    try:
        for part in text.split(","):
            hours, colon, km = part.rpartition(":")
            steps.append([float(hours) if colon else None, float(km)])
    except ValueError:
        fail(f"--schedule must be hours:km steps and a last km, as 1:100,2:200,3:300,500, got {text!r}", EXIT_USAGE)
    return steps


def _answer(client: redis.Redis, desk: Desk, alert_id: str, change: Callable[[], DeskAnswer], json: bool) -> None:
    """Make the event durable, copy it to every log, and say so."""
    started_s = time.monotonic()
    answer = change()
    if (reason := refused_now(client)) is not None:
        fail(
            f"alert {alert_id!r}: revision {answer.revision} is durable, but reaches nobody yet: {reason}. "
            "A flow copies it to the logs as soon as that is over"
        )
    Relay(client).copy_pending()
    if not desk.wait_copied(answer.desk_id, COPY_TIMEOUT_S):
        fail(f"alert {alert_id!r}: revision {answer.revision} is durable, but not yet in every log; it will be copied")
    took_ms = (time.monotonic() - started_s) * 1000
    desk_id = f"{answer.desk_id[0]}-{answer.desk_id[1]}"
    if json:
        _print_json(
            {"alert_id": alert_id, "revision": answer.revision, "desk_id": desk_id, "took_ms": round(took_ms, 1)}
        )
    else:
        note(f"alert {alert_id!r}: revision {answer.revision}, in every log after {took_ms:.0f} ms (desk id {desk_id})")


def _view(alert: DeskAlert, now_ms: int) -> dict[str, Any]:
    """An alert as a reader sees it now."""
    known = alert.alert
    growth = next(
        ((at_ms, km) for at_ms, km in growth_times_ms(known.schedule, known.missing_since_ms) if at_ms > now_ms), None
    )
    is_open = alert.is_open(now_ms)
    matching = is_open and now_ms <= known.expires_at_ms
    state = "matching" if matching else "expired" if is_open else alert.outcome or "cancelled"
    return alert_to_json(known) | {
        "state": state,
        "ring_km": radius_km(known.schedule, now_ms - known.missing_since_ms),
        "next_growth": growth[0] if growth and matching else None,
        "next_ring_km": growth[1] if growth and matching else None,
        "published_at": alert.published_at_ms,
        **alert.content,
    }


def _clock(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).astimezone().strftime("%H:%M:%S")


def _print_json(value: object) -> None:
    console.out(orjson.dumps(value).decode(), highlight=False)
