"""`tuanyuan dead-letters list | replay | drop`: pushes that no consumer could deal with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import orjson
import redis
import typer

from flows.consumers import push_of
from flows.dead_letters import DeadLetter, dead_letters
from flows.dead_letters import drop as drop_letters
from flows.dead_letters import replay as replay_letters
from flows.log import format_id, push_key
from flows.wire import MalformedEntry
from tuanyuan.commands.pull import push_to_json
from tuanyuan.connection import ValkeyOption, VarOption, server, settings_of
from tuanyuan.console import EXIT_USAGE, console, fail, note

EPILOG = """
Examples:

    tuanyuan dead-letters list                        of every partner; --json: a JSON line each, with its devices

    tuanyuan dead-letters replay amap --all           once the partner's fault is mended

    tuanyuan dead-letters replay amap 3/1700000000000-0

    tuanyuan dead-letters drop amap 3/1700000000000-0

A replayed letter is given to a consumer of its group within seconds, under the stream and id that it had. When it is
acknowledged it is gone; after five more deliveries in vain it is among the dead letters again.
"""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Pushes that were delivered five times and never acknowledged, or that are no pushes: list, replay, drop.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

NamesArgument = Annotated[list[str] | None, typer.Argument(help="Letters, as `list` names them: 3/1700000000000-0.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of the partner's.")]
GroupOption = Annotated[str | None, typer.Option(help="Only those of this consumer group.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list", epilog=EPILOG)
def list_(
    partner: Annotated[str | None, typer.Argument(help="The partner's name. Default: all partners.")] = None,
    group: GroupOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each, with its devices.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Show dead letters, the oldest of each shard first."""
    with server(valkey, var) as client:
        found = _found(client, partner, group)
    if json:
        for letter in found:
            console.out(orjson.dumps(_to_json(letter)).decode(), highlight=False)
        return
    for letter in found:
        # Lines, not a table: a letter's name must stand there whole, to be copied.
        died = datetime.fromtimestamp(letter.dead_id[0] / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        console.out(f"{letter.name}  {letter.partner}, group {letter.group}, {died}", highlight=False)
        state = "; replayed, waits for a consumer" if letter.replayed else ""
        console.out(f"    {_content(letter)}: {letter.reason}{state}", highlight=False)
    note(f"{len(found):,} dead letters")


@app.command(epilog=EPILOG)
def replay(
    partner: Annotated[str, typer.Argument(help="The partner's name.")],
    letters: NamesArgument = None,
    all_: AllOption = False,
    group: GroupOption = None,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Give dead letters to the partner's consumers once more."""
    _act("replayed", replay_letters, partner, letters or [], all_, group, json, valkey, var)


@app.command(epilog=EPILOG)
def drop(
    partner: Annotated[str, typer.Argument(help="The partner's name.")],
    letters: NamesArgument = None,
    all_: AllOption = False,
    group: GroupOption = None,
    json: JsonOption = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Delete dead letters for ever: their devices never hear of what they say."""
    _act("dropped", drop_letters, partner, letters or [], all_, group, json, valkey, var)


def _act(
    done: str,
    act: Callable[[redis.Redis, Sequence[DeadLetter]], int],
    partner: str,
    names: Sequence[str],
    takes_all: bool,
    group: str | None,
    json: bool,
    valkey: str | None,
    var: Path | None,
) -> None:
    if takes_all == bool(names):
        fail("name either letters or --all, not both and not neither", EXIT_USAGE)
    with server(valkey, var) as client:
        found = _found(client, partner, group)
        if names:
            unknown = set(names) - {letter.name for letter in found}
            if unknown:
                fail(f"no such dead letter of {partner!r}: {', '.join(sorted(unknown))}", EXIT_USAGE)
            found = [letter for letter in found if letter.name in names]
        count = act(client, found)
    if json:
        console.out(orjson.dumps({done: count}).decode(), highlight=False)
    else:
        note(f"{count:,} {done}")


def _found(client: redis.Redis, partner: str | None, group: str | None) -> list[DeadLetter]:
    settings = settings_of(client)
    if partner is not None and partner not in settings.partners:
        fail(f"no such partner: {partner!r}; there are {', '.join(settings.partners) or 'none yet'}", EXIT_USAGE)
    return [
        letter
        for name in ([partner] if partner is not None else settings.partners)
        for letter in dead_letters(client, name, settings.shard_count)
        if group in (None, letter.group)
    ]


def _content(letter: DeadLetter) -> str:
    try:
        push = push_of(letter.fields)
    except MalformedEntry:
        return f"entry {format_id(letter.entry_id)}"
    return f"{push.kind} of {push.alert_id!r} to {len(push.device_ids):,} devices"


def _to_json(letter: DeadLetter) -> dict[str, object]:
    """A push as `pull` prints it, and how it died; `entry` in hex where it is no push."""
    words: dict[str, object] = {
        "letter": letter.name,
        "partner": letter.partner,
        "group": letter.group,
        "deliveries": letter.delivery_count,
        "reason": letter.reason,
        "died_at": letter.dead_id[0],
        "replayed": letter.replayed,
        "stream": push_key(letter.shard, letter.partner),
        "id": format_id(letter.entry_id),
    }
    try:
        return words | push_to_json(push_of(letter.fields))
    except MalformedEntry:
        fields = {name.decode(errors="replace"): payload.hex() for name, payload in letter.fields.items()}
        return words | {"entry": fields}
