"""What every request passes first, as plain ASGI: bodies are handed on as they come, never copied.

Edge            request id, client's address, its token bucket, security headers, one log line, an answer to whatever
was raised below
Authenticate    whose key (`gateway.identity`)
BodyLimits      length, before and while it comes; JSON: depth, members, well-formed, before anything parses it
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, cast

import numpy as np
import orjson
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.errors import Problem, problem_of
from gateway.limits import address_bucket
from gateway.runtime import Gateway

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("gateway.access")

JSON_DEPTH_MAX = 32
JSON_MEMBERS_MAX = 10_000
"""Members and elements of a whole body: `:` and `,` outside strings."""
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_JSON_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_YEAR_S = 31_536_000

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "geolocation=(), camera=(), microphone=()",
    "cache-control": "no-store",
}
"""Set where an endpoint does not set its own."""


class Edge:
    """ASGI, outermost. Nothing that is raised below gets past it."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        self._proxies = gateway.config.proxy_networks
        self._hsts = gateway.config.base_url.startswith("https://")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        state = scope.setdefault("state", {})
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        state["request_id"] = request_id
        state["address"] = self._address(scope, headers)
        status = 0
        sent_bytes = received_bytes = 0

        async def counted_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            return message

        async def dressed_send(message: Message) -> None:
            nonlocal status, sent_bytes
            if message["type"] == "http.response.start":
                status = message["status"]
                self._dress(MutableHeaders(scope=message), state, request_id)
            else:
                sent_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self._within(scope, counted_receive, dressed_send)
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                logger.exception("request %s failed", request_id)
                self._gateway.metrics.count("gateway_faults_total")
                problem = Problem(500, "fault", "a fault of ours; it is in our log under the request id")
            if status == 0:
                await problem.response(request_id)(scope, receive, dressed_send)
            else:
                # The answer had begun. It ends unfinished, so that nobody takes it for whole.
                logger.warning("the answer to request %s breaks off: %s", request_id, problem.detail)
        finally:
            self._note(scope, state, status, received_bytes, sent_bytes, time.monotonic() - started_s)

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self._gateway
        rate = gateway.config.address_requests_per_s
        bucket = address_bucket(scope["state"]["address"])
        gateway.buckets.check(bucket, "address", rate, rate * gateway.config.burst_s)
        await self._app(scope, receive, send)

    def _address(self, scope: Scope, headers: Headers) -> str:
        """The client's address: its own word counts for nothing, that of a trusted proxy for all behind it."""
        client = scope.get("client")
        address = cast(str, client[0]) if client else ""
        if not self._proxies or not self._trusts(address):
            return address
        hops = [hop.strip() for line in headers.getlist("x-forwarded-for") for hop in line.split(",")]
        for hop in reversed(hops):
            try:
                ip_address(hop)
            except ValueError:
                break
            address = hop
            if not self._trusts(hop):
                break
        return address

    def _trusts(self, address: str) -> bool:
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in self._proxies)

    def _dress(self, headers: MutableHeaders, state: Mapping[str, Any], request_id: str) -> None:
        headers["x-request-id"] = request_id
        for name, value in SECURITY_HEADERS.items():
            headers.setdefault(name, value)
        if self._hsts:
            headers.setdefault("strict-transport-security", f"max-age={_YEAR_S}; includeSubDomains")
        taken = state.get("key_limit")
        if taken is not None:
            for name, value in taken.headers("key").items():
                headers.setdefault(name, value)

    def _note(
        self, scope: Scope, state: Mapping[str, Any], status: int, received: int, sent: int, duration_s: float
    ) -> None:
        """One line: what was asked, of whom, and what came of it. No body, no query, no path beyond the route's own."""
        caller = state.get("caller")
        route = getattr(scope.get("route"), "path", "-")
        self._gateway.metrics.count("gateway_requests_total", route=route, status=str(status))
        if not state.get("endless"):  # a stream says nothing of how fast answers are
            self._gateway.metrics.observe("gateway_request_ms", duration_s * 1000)
        if access_logger.isEnabledFor(logging.INFO):
            members = {
                "request_id": state["request_id"],
                "address": state["address"],
                "caller": None if caller is None else caller.actor,
                "key_id": None if caller is None else caller.key_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "bytes_in": received,
                "bytes_out": sent,
                "ms": round(duration_s * 1000, 1),
            }
            access_logger.info("request", extra={"members": members})


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "").encode("latin-1", "replace")
    return given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


# --- bodies -----------------------------------------------------------------------------------------------------------


class BodyLimits:
    """ASGI: how long a body may be, and how deep its JSON. A path with a limit of its own is not looked into."""

    def __init__(self, app: ASGIApp, bytes_max: int, by_path: Mapping[str, int]) -> None:
        """`by_path`: as the routers spell paths, with {names}."""
        self._app = app
        self._bytes_max = bytes_max
        self._exact = {path: limit for path, limit in by_path.items() if "{" not in path}
        self._patterns = [(compile_path(path)[0], limit) for path, limit in by_path.items() if "{" in path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = self._own_limit(scope["path"])
        limit = self._bytes_max if own is None else own
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        if declared and not (declared.isascii() and declared.isdigit() and len(declared) < 16):
            raise Problem(400, "malformed-length", "Content-Length must be a number")
        if declared and int(declared) > limit:
            raise too_large(limit)
        limited = _Limited(receive, limit)
        if own is None and is_json(headers.get("content-type", "")):
            body = await _whole(limited)
            if body is not None:
                check_json(body)
                await self._app(scope, _Replayed(body, receive), send)
                return
            return  # the client has gone
        await self._app(scope, limited, send)

    def _own_limit(self, path: str) -> int | None:
        if (limit := self._exact.get(path)) is not None:
            return limit
        return next((limit for pattern, limit in self._patterns if pattern.match(path)), None)


def too_large(limit: int) -> Problem:
    """For a body that is longer than its path takes.

    The connection goes on: what still comes is thrown away by the server, for a client that is cut off in the middle of
    its body often does not see the answer.
    """
    return Problem(413, "too-large", f"the body must have at most {limit:,} bytes", bytes_max=limit)


class _Limited:
    """Passes a body on, as it comes, up to its limit. Raises Problem 413."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            if self._bytes > self._limit:
                raise too_large(self._limit)
        return message


class _Replayed:
    """A body that was read already, and then whatever else comes."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        return await self._receive()


async def _whole(receive: Receive) -> bytes | None:
    """The whole body; None if the client went away."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def is_json(content_type: str) -> bool:
    """Whether a body of this type is JSON."""
    name = content_type.partition(";")[0].strip().lower()
    return name == "application/json" or (name.startswith("application/") and name.endswith("+json"))


def check_json(body: bytes) -> None:
    """Raises Problem 400 for a body that is no strict JSON (RFC 8259; no NaN, no half surrogate), too deep or too wide.

    0.1 ms for 10 KB. What is not empty has passed here before anything is made of it.
    """
    if not body:
        return
    if body.count(b"[") + body.count(b"{") > JSON_DEPTH_MAX or body.count(b",") >= JSON_MEMBERS_MAX:
        bare = _JSON_STRING.sub(b"", body)
        depth = json_depth(bare)
        if depth > JSON_DEPTH_MAX:
            raise Problem(400, "too-deep", f"JSON must be at most {JSON_DEPTH_MAX} deep, got {depth}")
        members = bare.count(b",") + 1
        if members > JSON_MEMBERS_MAX:
            raise Problem(400, "too-wide", f"JSON must have at most {JSON_MEMBERS_MAX:,} members, got {members:,}")
    try:
        orjson.loads(body)
    except json.JSONDecodeError as error:  # orjson's own is one
        raise Problem(
            400, "malformed-json", f"the body must be JSON: {error.msg}, line {error.lineno}, column {error.colno}"
        ) from None


def json_depth(bare: bytes) -> int:
    """How deep brackets are nested; `bare`: JSON without its strings."""
    brackets = np.frombuffer(bare.translate(None, _NOT_BRACKETS), np.uint8)
    opens = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.cumsum(np.where(opens, 1, -1)).max(initial=0))
