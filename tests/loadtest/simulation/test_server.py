"""The model of the server says what the real one says, command by command."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any, cast

import pytest
import redis

from flows.embedded import EmbeddedServer
from flows.log import parse_id
from flows.queues import RAISE_DONE
from flows.server import Link, connect, packed
from loadtest.simulation.connection import Break, Route, simulated_client
from loadtest.simulation.server import SimulatedServer, Stream

STREAMS = ("s1", "s2", "s3")
GROUPS, CONSUMERS = ("g1", "g2"), ("c1", "c2")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(tmp_path_factory.mktemp("valkey"), port=None, memory_bytes_max=256 << 20) as server:
        yield server


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    client.flushall()
    yield client
    client.close()


class Pair:
    """Two connections to the real server and two to the model; every command goes to both."""

    def __init__(self, client: redis.Redis) -> None:
        self.model = SimulatedServer(0)
        simulated = simulated_client(Route(self.model))
        self._links = [(Link(client), Link(simulated)) for _ in range(2)]
        self.said: list[str] = []

    def ask(self, link_index: int, *command: object) -> object:
        words = [word if isinstance(word, bytes) else str(word) for word in command]
        real, simulated = self._links[link_index]
        real.send([packed(*words)])
        expected = real.receive()
        if words[0] == "XADD" and "*" in words and isinstance(expected, bytes):
            self.model.now_ms = max(self.model.now_ms, parse_id(expected)[0])  # the real server's clock
        simulated.send([packed(*words)])
        found = simulated.receive()
        self.said.append(f"{link_index} {words} -> {expected!r}")
        assert comparable(found) == comparable(expected), "\n".join(self.said[-30:])
        return expected

    def close(self) -> None:
        for real, _ in self._links:
            real.close()


def comparable(reply: object) -> object:
    """Errors by class and words; of XINFO what we know of; of XPENDING not for how long an entry was idle."""
    if isinstance(reply, Exception):
        return type(reply).__name__, str(reply)
    if isinstance(reply, list) and reply and reply[0] == b"length":
        fields = dict(zip(reply[::2], reply[1::2], strict=True))
        return {
            name: fields[name]
            for name in (b"length", b"last-generated-id", b"groups", b"entries-added", b"first-entry", b"last-entry")
        }
    match reply:
        case [bytes() as entry_id, bytes() as owner, int(), int() as delivery_count] if b"-" in entry_id:
            return [entry_id, owner, delivery_count]
    return [comparable(part) for part in reply] if isinstance(reply, list) else reply


@pytest.fixture
def pair(client: redis.Redis) -> Iterator[Pair]:
    pair = Pair(client)
    yield pair
    pair.close()


def some_command(rng: random.Random, in_multi: bool) -> list[Any]:
    """A command of those that the program sends, at small ids, so that they meet."""
    stream, group, consumer = rng.choice(STREAMS), rng.choice(GROUPS), rng.choice(CONSUMERS)

    def entry_id() -> str:
        return f"{rng.randint(1, 40)}-{rng.randint(0, 3)}"

    def bound() -> str:
        return rng.choice(("-", "+", entry_id(), f"({entry_id()}", str(rng.randint(1, 40))))

    new_id = rng.choice((entry_id(), entry_id(), f"{rng.randint(1, 60)}-*", "0-0"))
    commands: list[list[Any]] = [
        *([["XADD", stream, new_id, "kind", f"payload {rng.random()}"]] * 5),
        ["XADD", stream, "NOMKSTREAM", entry_id(), "a", "b"],
        ["XADD", stream, entry_id(), "a"],
        ["XLEN", stream],
        ["XRANGE", stream, bound(), bound()],
        ["XRANGE", stream, bound(), bound(), "COUNT", rng.randint(1, 4)],
        ["XREVRANGE", stream, bound(), bound(), "COUNT", rng.randint(1, 4)],
        ["XREAD", "COUNT", rng.randint(1, 4), "STREAMS", *STREAMS, entry_id(), entry_id(), "0-0"],
        ["XTRIM", stream, "MINID", "=", entry_id()],
        ["XTRIM", stream, "MINID", entry_id()],
        ["XINFO", "STREAM", stream],
        ["XGROUP", "CREATE", stream, group, rng.choice(("0", "$", entry_id())), "MKSTREAM"],
        ["XGROUP", "CREATE", stream, group, "0"],
        ["XREADGROUP", "GROUP", group, consumer, "COUNT", rng.randint(1, 4), "STREAMS", *STREAMS, ">", ">", ">"],
        ["XREADGROUP", "GROUP", group, consumer, "COUNT", rng.randint(1, 4), "STREAMS", stream, ">"],
        ["XREADGROUP", "GROUP", group, consumer, "COUNT", rng.randint(1, 4), "STREAMS", stream, entry_id()],
        ["XREADGROUP", "GROUP", group, consumer, "STREAMS", stream, "0-0"],
        ["XACK", stream, group, entry_id(), entry_id(), entry_id()],
        ["XCLAIM", stream, group, consumer, 0, entry_id(), entry_id(), "IDLE", 1000, "JUSTID"],
        ["XCLAIM", stream, group, consumer, 0, entry_id()],
        ["XPENDING", stream, group, bound(), bound(), rng.randint(1, 4)],
        ["XPENDING", stream, group, "IDLE", 0, "-", "+", 10, consumer],
        ["XAUTOCLAIM", stream, group, consumer, 0, rng.choice(("0-0", entry_id())), "COUNT", rng.randint(1, 4)],
        ["GET", rng.choice(("v1", "v2", "done", stream))],
        ["SET", rng.choice(("v1", "v2")), entry_id()],
        ["MGET", "v1", "v2", stream, "nothing"],
        ["EXISTS", "v1", stream, "nothing"],
        ["EVAL", RAISE_DONE, 1, "done", entry_id()],
        ["ZADD", "z", rng.randint(0, 5), f"m{rng.randint(0, 5)}"],
        ["ZREVRANGE", "z", 0, rng.choice((-1, 2))],
        ["XADD", "v1", "99-1", "a", "b"],
        ["ZADD", "v1", 1, "m"],
        ["PING"],
        ["NOSUCH", "command"],
    ]
    if not in_multi:
        commands += [["XADD", stream, "*", "a", "b"], ["WATCH", rng.choice(("v1", stream))], ["UNWATCH"], ["EXEC"]]
        commands += [["MULTI"]] * 3
    else:
        commands += [["EXEC"]] * 5 + [["DISCARD"], ["MULTI"]]
    return rng.choice(commands)


@pytest.mark.parametrize("seed", range(8))
def test_the_model_answers_as_the_real_server_does(seed: int, pair: Pair) -> None:
    rng = random.Random(seed)
    in_multi = [False, False]
    for _ in range(400):
        link_index = rng.randrange(2)
        command = some_command(rng, in_multi[link_index])
        reply = pair.ask(link_index, *command)
        if command[0] == "MULTI" and reply == b"OK":
            in_multi[link_index] = True
        elif command[0] in ("EXEC", "DISCARD"):
            in_multi[link_index] = False


def test_a_full_server_refuses_as_the_real_one_does(client: redis.Redis, pair: Pair) -> None:
    pair.ask(0, "XADD", "s1", "1-1", "a", "b")
    client.config_set("maxmemory", 1)
    pair.model.refuses = lambda command: True
    try:
        for command in (
            ["SET", "v1", "1-1"],
            ["XADD", "s1", "2-1", "a", "b"],
            ["GET", "v1"],
            ["XTRIM", "s1", "MINID", "1-0"],
        ):
            pair.ask(0, *command)
        # One that is refused while it is queued takes the others with it.
        for command in (["MULTI"], ["XADD", "s1", "3-1", "a", "b"], ["XLEN", "s1"], ["EXEC"]):
            pair.ask(0, *command)
    finally:
        client.config_set("maxmemory", 256 << 20)
    pair.model.refuses = lambda command: False
    for command in (["MULTI"], ["XADD", "s1", "3-1", "a", "b"], ["EXEC"], ["XLEN", "s1"]):
        pair.ask(0, *command)


def test_a_lost_tail_takes_back_whole_writes_in_order() -> None:
    server = SimulatedServer(1_000_000)
    client = simulated_client(Route(server))
    client.set("v", "before")
    client.xadd("s", {"a": "1"}, id="1-1")
    client.xadd("s", {"a": "2"}, id="2-1")
    server.keep()
    before = dict(server.values), list(server.stream(b"s").ids)
    server.now_ms += 500
    with client.pipeline(transaction=True) as pipeline:
        pipeline.set("v", "after")
        pipeline.xadd("s", {"a": "3"}, id="3-1")
        pipeline.xtrim("s", minid="2-1", approximate=False)
        pipeline.execute()
    client.xgroup_create("s", "g", id="0")
    client.xreadgroup("g", "c", {"s": ">"})
    client.xadd("new", {"a": "1"})
    run_id = server.run_id
    assert server.restart(lost_ms=400) == 4
    assert server.run_id != run_id
    stream = server.values[b"s"]
    assert isinstance(stream, Stream)
    assert (dict(server.values), stream.ids) == before
    assert (stream.first, stream.last_id, stream.groups) == (0, (2, 1), {})
    assert server.restart() == 0


def test_ids_never_run_back_when_the_clock_does() -> None:
    server = SimulatedServer(1000)
    client = simulated_client(Route(server))
    assert client.xadd("s", {"a": "1"}) == b"1000-0"
    server.clock_ahead_ms = -500
    assert client.time() == (0, 500_000)
    assert client.xadd("s", {"a": "1"}) == b"1000-1"
    server.clock_ahead_ms = 1
    assert client.xadd("s", {"a": "1"}) == b"1001-0"


def test_a_broken_connection_is_opened_anew_by_the_client_and_never_by_a_link() -> None:
    server = SimulatedServer(1000)
    client = simulated_client(Route(server))
    link = Link(client)
    client.set("v", "1")
    server.restart()
    assert client.get("v") == b"1"
    with pytest.raises(redis.ConnectionError):
        link.ask("GET", "v")
    with pytest.raises(redis.ConnectionError):
        link.ask("GET", "v")


class FailingRoute(Route):
    """Breaks every exchange while `breaks`; counts them all."""

    breaks = False
    exchanges = 0

    def fate(self, command_count: int) -> Break | None:
        self.exchanges += 1
        return Break(command_count, 0, timeout=True) if self.breaks else None


def test_what_is_garbage_sends_nothing_so_that_a_seed_is_a_run() -> None:
    route = FailingRoute(SimulatedServer(1000))
    client = simulated_client(route)
    pipeline = client.pipeline(transaction=True)
    cast(Any, pipeline).watch("v")
    route.breaks = True
    with pytest.raises(redis.TimeoutError):
        pipeline.reset()  # UNWATCH has no answer in time; the pipeline still means to send it
    route.breaks = False
    exchanges = route.exchanges
    del pipeline
    gc.collect()
    assert route.exchanges == exchanges == 2


def test_what_a_group_is_asked_is_no_write() -> None:
    server = SimulatedServer(1000)
    client = simulated_client(Route(server))
    client.xadd("s", {"a": "1"}, id="1-1")
    client.xgroup_create("s", "g", id="$")
    server.keep()
    server.now_ms += 500
    assert client.xpending_range("s", "g", "-", "+", 10) == []
    assert client.xreadgroup("g", "c", {"s": ">"}) == []
    assert server.restart(lost_ms=400) == 0
