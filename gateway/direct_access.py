"""A partner that reads its queues from Valkey itself: an ACL user for exactly that.

    user partner-amap    keys: push:{s0}:amap, push:{s1}:amap, ... and dead:{s0}:amap, ...
                         commands: read a stream, and consumer groups

Keys are given as patterns that match the shards that there are, by their numbers, and nothing else; whatever a pattern
could mean in a partner's name is escaped. A `*` in place of a number would reach into other keys.

Reading only. A user that may append to the logs (`log:{s0}`) could not be made safe: an ACL sees keys and commands, not
what is written, and in one log stand everybody's pings, the alerts and the settings. Whoever could write there could
give another partner's phones a place, or close an alert. Pings therefore come through a gateway, which puts the
partner's own index under each of them.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any, cast

import redis

from flows.dead_letters import dead_key
from flows.log import partner_name_problem, push_key

COMMANDS = (
    "auth",
    "hello",
    "ping",
    "reset",
    "quit",
    "client|setname",
    "client|setinfo",
    "client|id",
    "xread",
    "xrange",
    "xrevrange",
    "xlen",
    "xinfo|stream",
    "xinfo|groups",
    "xinfo|consumers",
    "xgroup|create",
    "xgroup|createconsumer",
    "xgroup|delconsumer",
    "xgroup|destroy",
    "xreadgroup",
    "xack",
    "xpending",
    "xclaim",
    "xautoclaim",
)
"""Reading, consumer groups, and what client libraries say when they connect."""


@dataclass(frozen=True, slots=True)
class DirectAccess:
    """An ACL user of one partner. The password is shown once; the server keeps its SHA-256."""

    user: str
    password: str
    rules: tuple[str, ...]
    queues: tuple[str, ...]

    def line(self) -> str:
        """As in a file of ACL users (`aclfile`)."""
        return f"user {self.user} {' '.join(self.rules)}"


def direct_access(partner: str, shard_count: int) -> DirectAccess:
    """A user with a fresh password, not known to any server yet. Raises ValueError for a name that is no partner's."""
    if problem := partner_name_problem(partner):
        raise ValueError(problem)
    password = secrets.token_urlsafe(32)
    # Made by the function that makes the keys, with a mark where the number stands: {s1} cannot be in a name.
    patterns = [
        f"~{before}{{s{glob}}}{after}"
        for key in (push_key, dead_key)
        for before, _, after in [key(1, escaped(partner)).partition("{s1}")]
        for glob in number_globs(shard_count)
    ]
    rules = (
        "reset",
        "on",
        f"#{hashlib.sha256(password.encode()).hexdigest()}",
        *patterns,
        *(f"+{command}" for command in COMMANDS),
    )
    queues = tuple(push_key(shard, partner) for shard in range(shard_count))
    return DirectAccess(acl_user(partner), password, rules, queues)


def acl_user(partner: str) -> str:
    """The ACL user of a partner."""
    return f"partner-{partner}"


def escaped(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"\\{character}" if character in "*?[]\\" else character for character in name)


def number_globs(count: int) -> list[str]:
    """Patterns that together match the numbers from 0 to `count` - 1, as they are written, and nothing else.

    64 -> [0-9], [1-5][0-9], 6[0-3].
    """
    assert count > 0
    text = str(count)
    globs = ["[0-9]"] if len(text) > 1 else []
    globs += ["[1-9]" + "[0-9]" * more for more in range(1, len(text) - 1)]
    for index, digit in enumerate(text):
        low, high = int(index == 0 and len(text) > 1), int(digit) - 1
        if high >= low:
            choice = str(low) if low == high else f"[{low}-{high}]"
            globs.append(text[:index] + choice + "[0-9]" * (len(text) - index - 1))
    return globs


def apply(client: redis.Redis, access: DirectAccess) -> bool:
    """Make the user known to the server, in place of one that was there; whether it is kept over a restart.

    Raises redis.RedisError, among them NoPermissionError.
    """
    _command(client, "ACL SETUSER", access.user, *access.rules)
    _end_connections(client, access.user)
    return _saved(client)


def revoke(client: redis.Redis, partner: str) -> bool:
    """Take the partner's user away and end its connections; whether there was one. Raises redis.RedisError."""
    user = acl_user(partner)
    if not _command(client, "ACL DELUSER", user):
        return False
    _saved(client)
    return True


def _end_connections(client: redis.Redis, user: str) -> None:
    _command(client, "CLIENT KILL", "USER", user)


def _command(client: redis.Redis, *words: str) -> object:
    return cast(Any, client).execute_command(*words)


def _saved(client: redis.Redis) -> bool:
    try:
        _command(client, "ACL SAVE")
    except redis.ResponseError:
        return False  # the server has no aclfile: its owner keeps users in its configuration
    return True
