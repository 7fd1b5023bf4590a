"""A real embedded Valkey for the whole session, empty at the start of every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from flows.embedded import EmbeddedServer
from flows.server import LinkOpener, connect, link_opener


@pytest.fixture(scope="session")
def session_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(tmp_path_factory.mktemp("valkey"), memory_bytes_max=512 << 20) as server:
        yield server


@pytest.fixture
def server(session_server: EmbeddedServer) -> EmbeddedServer:
    """The session's server, emptied. A test may change its settings if it changes them back."""
    client = connect(session_server.url)
    client.flushall()
    client.close()
    return session_server


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[redis.Redis]:
    client = connect(server.url)
    yield client
    client.close()


@pytest.fixture
def open_link(client: redis.Redis) -> LinkOpener:
    return link_opener(client)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server that a test may stop, kill and start again."""
    with EmbeddedServer.start(tmp_path / "own", port=None, memory_bytes_max=512 << 20) as server:
        yield server
