"""The gateway as an ASGI application: its parts, their order, their start and end.

    Edge ─> Authenticate ─> BodyLimits ─> routers of FEATURES, /healthz, /readyz, /openapi.json

A feature is a module of this package (`gateway.runtime` says what it offers); its name here is all that the gateway
needs to know.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import anyio.to_thread
import redis
from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse, Response

from flows.clock import CLOCK, Clock
from flows.desk import Desk, Relay
from flows.guards import Guards
from flows.metrics import GATEWAY, METRICS, Metrics, StatsPublisher
from gateway import errors
from gateway.accounts import Accounts
from gateway.audit_log import AuditLog, HeadFile
from gateway.config import GatewayConfig
from gateway.edge import BodyLimits, Edge
from gateway.identity import Authenticate
from gateway.keys import Sealer
from gateway.limits import Buckets
from gateway.runtime import Gateway, Service, gateway_of

logger = logging.getLogger(__name__)

FEATURES = (
    "pings",
    "pushes",
    "webhooks",
    "alerts",
    "preview",
    "statistics",
    "public",
    "cap",
    "feeds",
    "view",
    "page",
)
"""Modules of this package, in the order in which they are started; they are stopped in the opposite one."""

DESCRIPTION = """
Finds every phone near a missing child, and never tells one twice.

* **Partners** send pings and take pushes. `Authorization: Bearer ty_…`, or a signature (RFC 9421).
* **Officers** publish, edit and close alerts. Every action and every refusal stands in the audit log.
* **Anybody** reads the pages and feeds of alerts.

Errors are problem details (RFC 9457). Every answer has an `X-Request-Id`.
"""

VERSION = "1"


def features() -> dict[str, ModuleType]:
    """The modules of FEATURES, by name."""
    return {name: import_module(f"gateway.{name}") for name in FEATURES}


def create_app(config: GatewayConfig, client: redis.Redis, metrics: Metrics = METRICS, clock: Clock = CLOCK) -> FastAPI:
    """The application; its lifespan starts guards and features, and stops them. `client` is closed by the caller.

    Raises ValueError for a key file or head file that holds something else; OSError.
    """
    sealer = Sealer.read(config.secret_path)
    gateway = Gateway(
        config=config,
        client=client,
        guards=Guards(client, config.unsafe_server, metrics, clock),
        sealer=sealer,
        accounts=Accounts(client, sealer),
        audit=AuditLog(client, sealer, HeadFile(config.audit_head_path), metrics, clock),
        desk=Desk(client),
        relay=Relay(client, metrics),
        buckets=Buckets(clock),
        metrics=metrics,
        clock=clock,
    )
    modules = features()
    app = FastAPI(
        title="Tuanyuan gateway",
        version=VERSION,
        description=DESCRIPTION,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
        responses=errors.responses(422, 429, 500, 503),
        separate_input_output_schemas=False,
    )
    app.state.gateway = gateway
    app.state.features = modules
    errors.install(app)
    app.include_router(router)
    limits: dict[str, int] = {}
    for module in modules.values():
        app.include_router(module.router)
        if hasattr(module, "body_limits"):
            limits.update(module.body_limits(config))
    # The last one added is the first one passed.
    app.add_middleware(BodyLimits, bytes_max=config.body_bytes_max, by_path=limits)
    app.add_middleware(Authenticate, gateway=gateway)
    app.add_middleware(Edge, gateway=gateway)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    gateway: Gateway = app.state.gateway
    publisher = StatsPublisher(gateway.client, gateway.metrics, role=GATEWAY)
    await anyio.to_thread.run_sync(gateway.guards.start)
    publisher.start()
    try:
        for module in app.state.features.values():
            if hasattr(module, "start"):
                service: Service | None = await anyio.to_thread.run_sync(module.start, gateway)
                if service is not None:
                    gateway.services.append(service)
        gateway.ready = True
        yield
    finally:
        gateway.ready = False
        gateway.stopping.set()
        for service in reversed(gateway.services):
            try:
                await anyio.to_thread.run_sync(service.stop)
            except Exception:
                # The others have to be stopped all the same: what they hold is not yet durable, say.
                logger.exception("%s did not end cleanly", type(service).__name__)
        gateway.services.clear()
        await anyio.to_thread.run_sync(gateway.guards.stop)
        await anyio.to_thread.run_sync(publisher.stop)


_PROBLEM_SCHEMA = {"$ref": "#/components/schemas/ProblemBody"}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description; problem details have their own media type."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            separate_input_output_schemas=False,
        )
        for path in schema["paths"].values():
            for operation in path.values():
                for answer in operation.get("responses", {}).values():
                    content = answer.get("content", {})
                    if content.get("application/json", {}).get("schema") == _PROBLEM_SCHEMA:
                        content[errors.PROBLEM_JSON] = content.pop("application/json")
        app.openapi_schema = schema
    return app.openapi_schema


# --- is it alive, is it ready -----------------------------------------------------------------------------------------

router = APIRouter(tags=["operation"])


class Health(BaseModel):
    """Whether a process answers."""

    model_config = ConfigDict(extra="forbid")

    status: str = Field(examples=["alive"])


class Readiness(BaseModel):
    """Whether a gateway can do its work, and what is in the way."""

    model_config = ConfigDict(extra="forbid")

    status: str = Field(examples=["ready"])
    reasons: list[str] = Field(description="Empty if it is ready.", examples=[[]])


@router.get("/healthz", summary="Is this process alive?")
async def healthz() -> Health:
    """Answers as long as the process does; looks at nothing else."""
    return Health(status="alive")


@router.get(
    "/readyz",
    summary="Can this gateway do its work?",
    response_model=Readiness,
    responses={503: {"description": "Not now.", "model": Readiness}},
)
async def readyz(request: Request) -> Response:
    """Ready: started, kernels loaded, the server answers and keeps what it acknowledges, its clock is ours."""
    gateway = gateway_of(request)
    reasons = [] if gateway.ready else ["starting or stopping"]
    if (refusal := gateway.guards.appends_refused()) is not None:
        reasons.append(refusal)
    status = "not ready" if reasons else "ready"
    return JSONResponse({"status": status, "reasons": reasons}, 503 if reasons else 200)
