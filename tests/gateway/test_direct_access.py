"""A partner's own Valkey user, on a real server: it reads its queues and dead letters, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, cast
from urllib.parse import quote

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.exceptions import NoPermissionError

from flows.dead_letters import dead_key
from flows.embedded import EmbeddedServer
from flows.log import done_key, log_key, push_key, settings_key, trimmed_key
from flows.server import connect
from gateway.direct_access import DirectAccess, apply, direct_access, escaped, number_globs, revoke

SHARDS = 12
PARTNERS = ("amap", "amap2", "a*", "a?ap", "[a]map", "a\\*", "^a-z]", "地图", "a*\\[")


@pytest.fixture
def streams(client: redis.Redis) -> list[str]:
    """An entry in every queue of every partner, and in their dead letters."""
    keys = [key(shard, name) for key in (push_key, dead_key) for shard in range(SHARDS) for name in PARTNERS]
    with client.pipeline(transaction=False) as pipeline:
        for key in keys:
            pipeline.xadd(key, {"alert": "x"}, id="1-1")
        pipeline.execute()
    return keys


@pytest.fixture(params=PARTNERS)
def partner(request: pytest.FixtureRequest) -> str:
    return cast(str, request.param)


@pytest.fixture
def own(server: EmbeddedServer, client: redis.Redis, partner: str) -> Iterator[redis.Redis]:
    """The partner's connection."""
    access = direct_access(partner, SHARDS)
    apply(client, access)
    user = as_user(server, access)
    yield user
    user.close()
    revoke(client, partner)


def as_user(server: EmbeddedServer, access: DirectAccess) -> redis.Redis:
    path = server.url.removeprefix("unix://")
    return connect(f"unix://{quote(access.user, safe='')}:{access.password}@{path}")


def may(client: redis.Redis, *words: str) -> bool:
    """Whether the server lets this user do it."""
    try:
        cast(Any, client).execute_command(*words)
    except NoPermissionError:
        return False
    except redis.ResponseError:
        return True  # let through, and wrong for another reason
    return True


def test_a_partner_reads_its_own_queues_and_no_others(own: redis.Redis, partner: str, streams: list[str]) -> None:
    readable = {key for key in streams if may(own, "XRANGE", key, "-", "+")}
    assert readable == {key for key in streams if key.endswith(f"}}:{partner}")}
    assert len(readable) == 2 * SHARDS


def test_a_partner_may_do_what_a_consumer_group_needs_and_nothing_else(
    server: EmbeddedServer, client: redis.Redis, streams: list[str]
) -> None:
    access = direct_access("amap", SHARDS)
    apply(client, access)
    own = as_user(server, access)
    queue, dead = push_key(11, "amap"), dead_key(0, "amap")
    own.xgroup_create(queue, "g", "0")
    ((_, entries),) = cast(Any, own.xreadgroup("g", "c", {queue: ">"}))
    assert entries == [(b"1-1", {b"alert": b"x"})]
    assert cast(Any, own.xpending(queue, "g"))["pending"] == 1
    assert cast(Any, own.xautoclaim(queue, "g", "d", 0))[1] == entries
    assert own.xack(queue, "g", "1-1") == 1
    assert own.xlen(dead) == 1
    client.set("x", "y")
    refused = [
        ("XADD", queue, "*", "a", "b"),
        ("XDEL", queue, "1-1"),
        ("XTRIM", queue, "MAXLEN", "0"),
        ("XSETID", queue, "9-9"),
        ("XGROUP", "SETID", queue, "g", "0"),
        ("DEL", queue),
        ("RENAME", queue, "x"),
        ("XADD", dead, "*", "a", "b"),
        *(("XADD", key(0), "*", "pings", "b") for key in (log_key,)),
        *(("XRANGE", key(0), "-", "+") for key in (log_key, settings_key, done_key, trimmed_key)),
        ("XADD", "desk", "*", "publish", "x"),
        ("XREADGROUP", "GROUP", "g", "c", "STREAMS", push_key(0, "amap2"), ">"),
        ("XREAD", "STREAMS", queue, push_key(0, "amap2"), "0", "0"),
        ("XRANGE", push_key(SHARDS, "amap"), "-", "+"),  # a shard that there is not
        ("XRANGE", "push:{s0}:x:{s1}:amap", "-", "+"),
        ("XRANGE", "push:{s00}:amap", "-", "+"),
        ("GET", "keys:{desk}"),
        ("HGETALL", "partners:{desk}"),
        ("GET", "x"),
        ("KEYS", "*"),
        ("SCAN", "0"),
        ("SELECT", "1"),
        ("CONFIG", "GET", "*"),
        ("ACL", "LIST"),
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "ID", "1"),
        ("INFO",),
        ("EVAL", "return 1", "0"),
        ("PUBLISH", "c", "m"),
        ("SUBSCRIBE", "c"),
        ("FLUSHALL",),
        ("SHUTDOWN",),
        ("MONITOR",),
    ]
    assert [words for words in refused if may(own, *words)] == []
    own.close()


def test_a_revoked_user_is_thrown_out(server: EmbeddedServer, client: redis.Redis) -> None:
    access = direct_access("amap", SHARDS)
    apply(client, access)
    own = as_user(server, access)
    own.ping()
    assert revoke(client, "amap")
    with pytest.raises((redis.ConnectionError, redis.AuthenticationError)):
        own.ping()
    assert not revoke(client, "amap")
    own.close()


def test_a_second_user_of_the_partner_replaces_the_first(server: EmbeddedServer, client: redis.Redis) -> None:
    first, second = direct_access("amap", SHARDS), direct_access("amap", SHARDS)
    apply(client, first)
    apply(client, second)
    for access, works in ((first, False), (second, True)):
        own = as_user(server, access)
        if works:
            own.ping()
        else:
            with pytest.raises(redis.AuthenticationError):
                own.ping()
        own.close()
    revoke(client, "amap")


def test_only_the_digest_of_the_password_stands_in_the_line() -> None:
    access = direct_access("amap", SHARDS)
    assert access.password not in access.line()
    assert access.line().startswith("user partner-amap reset on #")


def test_a_name_that_is_no_partners_gets_no_user() -> None:
    with pytest.raises(ValueError, match="a partner's name must have"):
        direct_access("a b", SHARDS)


def test_number_patterns_are_few() -> None:
    assert number_globs(8) == ["[0-7]"]
    assert number_globs(64) == ["[0-9]", "[1-5][0-9]", "6[0-3]"]
    assert number_globs(1) == ["0"]


@given(st.integers(1, 4096))
def test_number_patterns_match_the_numbers_below_and_no_others(count: int) -> None:
    globs = number_globs(count)
    for number in {0, 1, 9, 10, count - 2, count - 1, count, count + 1, 10 * count, *range(0, 5000, 37)}:
        if number >= 0:
            assert any(fnmatchcase(str(number), glob) for glob in globs) == (number < count), number
    assert not any(fnmatchcase(text, glob) for glob in globs for text in ("", "00", "01", "0}", "1x"))


def test_an_escaped_name_has_no_pattern_left_in_it() -> None:
    assert escaped("a*[b]?\\c") == "a\\*\\[b\\]\\?\\\\c"
