"""`POST /v1/pings`: where the phones of a partner are.

    headers ─> room in the intake, or 503 ─> body ─> decompressed, read, judged, converted (a thread) ─> 429
            ─> intake ─> on disk ─> accepted and refused

The answer comes when what it calls accepted is on disk. Without an answer nobody knows: send the same body again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
import numpy as np
import orjson
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from flows.wire import encode_pings
from gateway.accounts import PartnerAccount
from gateway.compression import BodyTooLarge, Encoding, MalformedBody, decompressed
from gateway.config import GatewayConfig
from gateway.datum import Datum
from gateway.errors import Problem, responses
from gateway.flow_watch import FlowWatch
from gateway.identity import PartnerDep
from gateway.intake import Hold, Intake, run_every_kernel, size_bytes
from gateway.ping_bodies import (
    CLOCK_SLACK_MS,
    PINGS_PER_BODY_MAX,
    REASONS,
    REFUSALS_LISTED_MAX,
    BodyPings,
    Format,
    Terms,
    read_pings,
)
from gateway.runtime import Gateway, Service, gateway_of
from geoindex.columns import PingBatch, pack_ids
from geoindex.entries import Settings

PATH = "/v1/pings"
EXPANSION_MAX = 4
"""How many times longer than it may travel a body may be when it is decompressed."""
_FORMATS = {
    "application/json": Format.JSON,
    "application/x-ndjson": Format.NDJSON,
    "application/ndjson": Format.NDJSON,
    "application/vnd.tuanyuan.pings+msgpack": Format.COLUMNS,
}
_EXAMPLE = {"device_id": "3f8a6c1e9b", "lat": 30.2592, "lng": 120.1304, "observed_at": 1760000000000}
_LATER = {"device_id": "b07d44e2aa", "lat": 30.2741, "lng": 120.1551, "observed_at": "2025-10-09T16:53:21+08:00"}
_EXAMPLE_BATCH = PingBatch(
    np.zeros(1, np.uint16),
    *pack_ids(["3f8a6c1e9b"]),
    np.array([302592000], np.int32),
    np.array([1201304000], np.int32),
    np.array([1760000000000], np.int64),
)
_LINES = f"{orjson.dumps(_EXAMPLE).decode()}\n{orjson.dumps(_LATER).decode()}\n"

router = APIRouter(tags=["pings"])


def body_limits(config: GatewayConfig) -> Mapping[str, int]:
    """Bodies of pings are longer than others, and looked into here."""
    return {PATH: config.pings_body_bytes_max}


def start(gateway: Gateway) -> Service:
    """The intake, running."""
    run_every_kernel()
    watch = FlowWatch(gateway.client, gateway.config.flow_lag_s_max, gateway.metrics, gateway.clock)
    intake = Intake(gateway.guards, watch, gateway.metrics, gateway.clock)
    intake.start()
    return intake


# --- what is sent, what is answered -----------------------------------------------------------------------------------


class RefusedPing(BaseModel):
    """One ping that was not taken."""

    model_config = ConfigDict(extra="forbid")

    position: int = Field(ge=0, description="In the array or batch, or the number of its line; from 0.", examples=[3])
    reason: str = Field(
        description="Stable name of the reason.",
        examples=["latitude"],
        json_schema_extra={"enum": [reason for reason, _ in REASONS.values()]},
    )
    detail: str = Field(description="The same for people.", examples=["lat must be a number from -90 to 90"])


class PingsAnswer(BaseModel):
    """What became of the pings of a body."""

    model_config = ConfigDict(extra="forbid")

    accepted: int = Field(ge=0, description="Pings that are on disk now.", examples=[2])
    refused_total: int = Field(ge=0, description="Pings that were not taken; all others were.", examples=[1])
    refused: list[RefusedPing] = Field(
        max_length=REFUSALS_LISTED_MAX, description=f"The first {REFUSALS_LISTED_MAX:,} of them, by position."
    )


_PING_SCHEMA: dict[str, Any] = {
    "type": "object",
    "title": "Ping",
    "required": ["device_id", "lat", "lng", "observed_at"],
    "properties": {
        "device_id": {
            "type": "string",
            "minLength": 1,
            "maxLength": 64,
            "description": "Yours, and always the same for one phone: 1 to 64 bytes in UTF-8. "
            "Pushes name phones by it. A pseudonym does as well as any.",
        },
        "lat": {"type": "number", "minimum": -90, "maximum": 90, "description": "Degrees, in your account's datum."},
        "lng": {"type": "number", "minimum": -180, "maximum": 180, "description": "Degrees, in your account's datum."},
        "observed_at": {
            "description": "When the phone was there: ms since 1970, or ISO 8601 (without an offset: UTC).",
            "anyOf": [{"type": "integer"}, {"type": "string", "format": "date-time"}],
        },
    },
}
_BODY: dict[str, Any] = {
    "required": True,
    "description": "Pings of any number of phones, in any order.",
    "content": {
        Format.JSON.value: {
            "schema": {"type": "array", "items": _PING_SCHEMA, "maxItems": PINGS_PER_BODY_MAX},
            "examples": {
                "two": {"summary": "Two phones, a time of each kind", "value": [_EXAMPLE, _LATER]},
                "none": {"summary": "Nobody: is the key good?", "value": []},
            },
        },
        Format.NDJSON.value: {
            "schema": {"type": "string", "description": "A ping a line."},
            "examples": {"two": {"summary": "Two phones", "value": _LINES}},
        },
        Format.COLUMNS.value: {
            "schema": {"type": "string", "format": "binary", "description": "A ping batch: see the description above."},
            "examples": {
                "one": {
                    "summary": "One phone; hexadecimal here",
                    "value": encode_pings(_EXAMPLE_BATCH).hex(),
                }
            },
        },
    },
}
_HEADERS: list[dict[str, Any]] = [
    {
        "name": "Content-Encoding",
        "in": "header",
        "required": False,
        "description": "How the body is compressed. Several gzip members or zstd frames in a row are one body.",
        "schema": {"type": "string", "enum": [encoding.value for encoding in Encoding]},
        "examples": {
            "gzip": {"summary": "gzip -c pings.json | curl --data-binary @- …", "value": "gzip"},
            "zstd": {"summary": "zstd -c pings.json | curl --data-binary @- …", "value": "zstd"},
        },
    }
]

DESCRIPTION = f"""
Takes where phones are, and answers when that is on disk. Locations are those of your account's datum (`wgs84`,
`gcj02`, `bd09`) and are converted here; send them as you have them.

**Three bodies**, of at most {PINGS_PER_BODY_MAX:,} pings:

* `{Format.JSON}`: an array of pings.
* `{Format.NDJSON}`: a ping a line. A broken line is one refused ping.
* `{Format.COLUMNS}`: a ping batch, ten times as fast: a msgpack map of `v` (1), `n` (pings), `width` (bytes of every
  id, or nil), `at` (false), `pad` (up to 7 zero bytes, so that columns begin at a multiple of 8) and `columns`, the
  little-endian columns one after the other: `observed_at_ms` i64, `lat_e7` i32, `lng_e7` i32 (1e-7 degree), `id_end`
  u32 (without `width`), `partner` u16 (any: your account is your partner), and the bytes of all ids.

**Compressed** with `Content-Encoding: gzip` or `zstd`:

    gzip -c pings.json | curl -H "Authorization: Bearer $KEY" -H "Content-Type: application/json" \\
        -H "Content-Encoding: gzip" --data-binary @- https://…{PATH}
    zstd -c pings.ndjson | curl -H "Authorization: Bearer $KEY" -H "Content-Type: application/x-ndjson" \\
        -H "Content-Encoding: zstd" --data-binary @- https://…{PATH}

**A ping that is refused** costs its neighbours nothing: the answer names its position and the reason, all others are
taken. Only a body whose pings cannot be told apart is refused as a whole (400). A ping whose `observed_at` is beyond
the limits of the flow by the server's clock is refused here; close to a limit it is taken, and the flow decides.

**Again?** After 429 and 503, when Retry-After has passed, and whenever no answer came: send the same body. A ping that
comes twice changes nothing.
"""


# --- the endpoint -----------------------------------------------------------------------------------------------------


@router.post(
    PATH,
    summary="Where phones are",
    description=DESCRIPTION,
    response_model=PingsAnswer,
    response_description="What was accepted is on disk; what was refused is named.",
    responses={
        200: {
            "content": {
                "application/json": {
                    "examples": {
                        "all": {"summary": "All taken", "value": {"accepted": 2, "refused_total": 0, "refused": []}},
                        "but one": {
                            "summary": "The third was not taken",
                            "value": {
                                "accepted": 2,
                                "refused_total": 1,
                                "refused": [
                                    {
                                        "position": 2,
                                        "reason": "latitude",
                                        "detail": "lat must be a number from -90 to 90",
                                    }
                                ],
                            },
                        },
                    }
                }
            }
        },
        **responses(400, 401, 403, 413, 415, 429, 503),
    },
    openapi_extra={"requestBody": _BODY, "parameters": _HEADERS},
)
async def post_pings(request: Request, caller: PartnerDep) -> Response:
    """What `DESCRIPTION` says. Nothing of the body is read before there is room for it."""
    gateway = gateway_of(request)
    intake = gateway.service(Intake)
    account = caller.account
    assert isinstance(account, PartnerAccount)
    started_s = gateway.clock.monotonic_s()
    format, encoding = _format(request), _encoding(request)
    settings = intake.check()
    terms = _terms(account, settings, intake.now_ms())
    bytes_max = EXPANSION_MAX * gateway.config.pings_body_bytes_max
    with intake.hold() as held:
        body = await _body(request, held)
        found = await anyio.to_thread.run_sync(_read, body, encoding, format, terms, bytes_max, limiter=intake.readers)
        del body
        _take(gateway, account, found.received)
        held.grow(size_bytes(found.pings))
        if len(found.pings):
            await asyncio.wrap_future(intake.submit(found.pings))
    _count(gateway, account, found)
    gateway.metrics.observe("pings_request_ms", 1000 * (gateway.clock.monotonic_s() - started_s))
    answer = {
        "accepted": len(found.pings),
        "refused_total": found.refused,
        "refused": [
            {"position": position, "reason": reason, "detail": detail} for position, reason, detail in found.refusals()
        ],
    }
    return Response(orjson.dumps(answer), media_type="application/json")


def _format(request: Request) -> Format:
    given = request.headers.get("content-type", "")
    format = _FORMATS.get(given.partition(";")[0].strip().lower())
    if format is None:
        known = ", ".join(format.value for format in Format)
        raise Problem(
            415,
            "content-type",
            f"Content-Type must be one of {known}, got {given[:60]!r}",
            headers={"Accept-Post": known},
        )
    return format


def _encoding(request: Request) -> Encoding:
    given = request.headers.get("content-encoding", Encoding.IDENTITY.value)
    try:
        return Encoding(given.strip().lower())
    except ValueError:
        raise Problem(
            415,
            "content-encoding",
            f"Content-Encoding must be gzip or zstd, or not be there, got {given[:60]!r}",
            headers={"Accept-Encoding": "gzip, zstd"},
        ) from None


def _terms(account: PartnerAccount, settings: Settings, now_ms: int) -> Terms:
    return Terms(
        account.index,
        Datum(account.datum),
        now_ms - settings.live_window_ms - CLOCK_SLACK_MS,
        now_ms + settings.future_tolerance_ms + CLOCK_SLACK_MS,
    )


async def _body(request: Request, held: Hold) -> list[bytes]:
    chunks: list[bytes] = []
    try:
        async for chunk in request.stream():
            held.grow(len(chunk))
            chunks.append(chunk)
    except ClientDisconnect:
        raise Problem(400, "unfinished", "the connection ended before the body did") from None
    return chunks


def _read(chunks: list[bytes], encoding: Encoding, format: Format, terms: Terms, bytes_max: int) -> BodyPings:
    """In a thread: everything that takes time by the size of the body."""
    body = b"".join(chunks)
    chunks.clear()
    try:
        return read_pings(decompressed(body, encoding, bytes_max), format, terms)
    except MalformedBody as malformed:
        raise Problem(400, "malformed-body", str(malformed)) from None
    except BodyTooLarge as large:
        raise Problem(413, "too-large", str(large)) from None


def _take(gateway: Gateway, account: PartnerAccount, ping_count: int) -> None:
    """Raises Problem 429."""
    rate = account.pings_per_s or gateway.config.pings_per_s
    gateway.buckets.check(f"pings:{account.name}", "pings", rate, rate * gateway.config.burst_s, max(1, ping_count))


def _count(gateway: Gateway, account: PartnerAccount, found: BodyPings) -> None:
    gateway.metrics.count("pings_received_total", found.received, partner=account.name)
    for reason, count in found.refused_by_reason().items():
        gateway.metrics.count("pings_turned_away_total", count, partner=account.name, reason=reason)
