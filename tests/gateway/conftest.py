"""A real server with logs of two shards and two partners, a gateway in front of it, and keys of everybody.

`app` is asked in its own process (`http`), with its lifespan running: no socket, no other thread than its own loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI

from flows.clock import Clock
from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.metrics import Metrics
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.runtime import Gateway
from geoindex.entries import Settings
from tests.flows.conftest import client as client
from tests.flows.conftest import open_link as open_link
from tests.flows.conftest import own_server as own_server
from tests.flows.conftest import server as server
from tests.flows.conftest import session_server as session_server

SETTINGS = Settings(shard_count=2, partners=("amap", "baidu"))
HANGZHOU, XIHU = "330100", "330106"
"""A prefecture and one of its counties."""


class TurnableClock(Clock):
    """This machine's clocks, and what a test has turned them ahead."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self._stands_at_s: float | None = None

    def stand(self) -> None:
        """From now on `monotonic_s` moves only as it is turned: how fast the machine is does not matter then."""
        self._stands_at_s = super().monotonic_s()

    def monotonic_s(self) -> float:
        return (super().monotonic_s() if self._stands_at_s is None else self._stands_at_s) + self.ahead_s

    def now_ms(self) -> float:
        return super().now_ms() + 1000 * self.ahead_s


class Http:
    """Asks an app in this process, and waits for the answer. `Http(...).get("/healthz").json()`"""

    def __init__(self, portal: BlockingPortal, client: httpx.AsyncClient) -> None:
        self._portal = portal
        self._client = client

    def request(self, method: str, url: str, *, key: str | None = None, **options: Any) -> httpx.Response:
        """`key`: sent as the bearer. Everything else is httpx's."""
        headers = httpx.Headers(options.pop("headers", None))
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"

        async def ask() -> httpx.Response:
            return await self._client.request(method, url, headers=headers, **options)

        return self._portal.call(ask)

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.request("POST", url, **options)

    def put(self, url: str, **options: Any) -> httpx.Response:
        return self.request("PUT", url, **options)

    def patch(self, url: str, **options: Any) -> httpx.Response:
        return self.request("PATCH", url, **options)

    def delete(self, url: str, **options: Any) -> httpx.Response:
        return self.request("DELETE", url, **options)


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of a partner, another partner, officers by level (all but `province` of Hangzhou or Xihu), an operator."""

    amap: str
    baidu: str
    ministry: str
    province: str
    prefecture: str
    county: str
    station: str
    operator: str


@pytest.fixture
def settings(client: redis.Redis) -> Settings:
    return ensure_settings(client, SETTINGS)


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    """A test that needs another one overrides this fixture."""
    return GatewayConfig(valkey=server.url, var=tmp_path / "var", public_url="https://alerts.example.org")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def clock() -> TurnableClock:
    """The gateway's; not the server's."""
    return TurnableClock()


@pytest.fixture
def app(
    config: GatewayConfig, client: redis.Redis, settings: Settings, metrics: Metrics, clock: TurnableClock
) -> FastAPI:
    return create_app(config, client, metrics, clock)


@pytest.fixture
def gateway(app: FastAPI) -> Gateway:
    found = app.state.gateway
    assert isinstance(found, Gateway)
    return found


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """An event loop of the session's own."""
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture
def http(app: FastAPI, portal: BlockingPortal) -> Iterator[Http]:
    """The running gateway."""
    exits = AsyncExitStack()

    async def open_app() -> httpx.AsyncClient:
        await exits.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app)
        return await exits.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://gateway.test"))

    try:
        yield Http(portal, portal.call(open_app))
    finally:
        portal.call(exits.aclose)


@pytest.fixture
def keys(gateway: Gateway) -> Keys:
    accounts = gateway.accounts
    return Keys(
        amap=accounts.add_partner("amap").text,
        baidu=accounts.add_partner("baidu", datum="bd09").text,
        ministry=accounts.add_officer("部 值班", "000000", "ministry").text,
        province=accounts.add_officer("浙江 值班", "330000", "province").text,
        prefecture=accounts.add_officer("杭州 值班", HANGZHOU, "prefecture").text,
        county=accounts.add_officer("西湖 值班", XIHU, "county").text,
        station=accounts.add_officer("西湖 派出所", XIHU, "station").text,
        operator=accounts.add_operator("operator").text,
    )
