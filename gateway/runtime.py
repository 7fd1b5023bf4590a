"""What a running gateway consists of: everything that an endpoint finds at `request.app.state.gateway`.

A feature is a module of this package that is named in `gateway.app.FEATURES`. It offers

    router: APIRouter                                  its endpoints
    body_limits(config) -> Mapping[str, int]           optional: bytes by path, as the router spells it, where the usual
                                                       limit does not fit; such bodies are not looked into by the edge
    start(gateway) -> Service | None                   optional: called once before the first request, in a thread;
                                                       what it returns is stopped after the last one

and finds what it started by type: `gateway_of(request).service(Intake)`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import redis
from starlette.requests import Request

from flows.clock import Clock
from flows.desk import Desk, Relay
from flows.guards import Guards
from flows.log import read_settings
from flows.metrics import Metrics
from gateway.accounts import Accounts
from gateway.audit_log import AuditLog
from gateway.config import GatewayConfig
from gateway.errors import Problem
from gateway.keys import Sealer
from gateway.limits import Buckets
from geoindex.entries import Settings

SETTINGS_FRESH_S = 1.0
"""Partners are added to the settings now and then; nothing else in them changes."""


class Service(Protocol):
    """What a feature runs beside its endpoints."""

    def stop(self) -> None:
        """End it, and wait for its end."""


_S = TypeVar("_S")


@dataclass(slots=True)
class Gateway:
    """One gateway process. `client`: short commands, thread-safe; whoever blocks opens a link or client of its own."""

    config: GatewayConfig
    client: redis.Redis
    guards: Guards
    sealer: Sealer
    accounts: Accounts
    audit: AuditLog
    desk: Desk
    relay: Relay
    buckets: Buckets
    metrics: Metrics
    clock: Clock
    services: list[Any] = field(default_factory=list)
    ready: bool = False
    """Every feature has started: its threads run, its kernels are loaded."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """No more requests are taken; whoever holds one back (a long poll) answers it now."""
    _settings: tuple[float, Settings] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def service(self, type: type[_S]) -> _S:
        """The one of this type that a feature started."""
        for service in self.services:
            if isinstance(service, type):
                return service
        raise LookupError(f"no {type.__name__} was started")

    def settings(self) -> Settings:
        """The settings that the logs run under, at most SETTINGS_FRESH_S old. Blocks.

        Raises Problem 503 if there are no logs yet; redis.RedisError.
        """
        now_s = self.clock.monotonic_s()
        with self._lock:
            known = self._settings
        if known is not None and now_s - known[0] < SETTINGS_FRESH_S:
            return known[1]
        settings = read_settings(self.client)
        if settings is None:
            raise Problem(
                503,
                "no-logs",
                "there are no logs yet: the flow has to be started once",
                headers={"Retry-After": "5"},
            )
        with self._lock:
            self._settings = now_s, settings
        return settings


Start = Callable[[Gateway], Service | None]


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request came to."""
    return cast(Gateway, request.app.state.gateway)
