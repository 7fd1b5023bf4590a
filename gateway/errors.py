"""What a request that was not done is answered with: RFC 9457 problem details, the same shape from every endpoint.

    {"type": "https://…#rate-limit", "title": "Too many requests", "status": 429, "detail": "…", "request_id": "…", …}

`raise Problem(409, "revision-conflict", "Somebody edited the alert in between", known_revision=3)` anywhere below an
endpoint. `type` is a short name, stable for programs; `title` follows from the status unless given; `detail` is for
people: what was expected, what came, where. Never a secret in it, and of a phone nothing at all.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import redis
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flows.guards import AppendsRefused, PingsRefused
from flows.server import ServerRefused

logger = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"
TYPE_PREFIX = "urn:tuanyuan:problem:"
SHOWN_CHARACTERS = 100
"""Of what came, in an error."""
ERRORS_MAX = 20
"""Of one body; the rest is counted."""


class Problem(HTTPException):
    """Why a request was not done. `more`: further members of the answer, JSON values."""

    def __init__(
        self,
        status: int,
        type: str,
        detail: str,
        *,
        title: str | None = None,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.type = type
        self.title = title or HTTPStatus(status).phrase
        self.more = more

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The answer's members."""
        members: dict[str, Any] = {
            "type": f"{TYPE_PREFIX}{self.type}",
            "title": self.title,
            "status": self.status_code,
            "detail": self.detail,
        }
        if request_id is not None:
            members["request_id"] = request_id
        return members | self.more

    def response(self, request_id: str | None = None) -> Response:
        """The answer."""
        return Response(
            json.dumps(self.body(request_id), ensure_ascii=False, default=repr).encode(errors="replace"),
            self.status_code,
            dict(self.headers or {}),
            PROBLEM_JSON,
        )


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    model_config = ConfigDict(extra="forbid")

    where: str = Field(description="JSON pointer, beginning with body, query, path or header.", examples=["/body/lat"])
    expected: str = Field(examples=["Input should be less than or equal to 90"])
    got: str = Field(description="The beginning of what came.", examples=["95.2"])


class ProblemBody(BaseModel):
    """Problem details (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(description="Stable name of the problem.", examples=[f"{TYPE_PREFIX}rate-limit"])
    title: str = Field(examples=["Too Many Requests"])
    status: int = Field(ge=400, le=599, examples=[429])
    detail: str = Field(description="For people: what was expected, what came, where.")
    request_id: str | None = Field(None, description="Of the answer's X-Request-Id; say it when you ask us.")
    errors: list[Fault] | None = Field(None, description="Of a request that does not fit its description.")


_DESCRIPTIONS = {
    400: "Not understood: malformed JSON, or headers that contradict each other.",
    401: "No key or signature, or one that is not accepted. All of these look alike.",
    403: "Known, but not allowed. Requests to the desk that end so stand in the audit log.",
    404: "There is no such thing, or not for you.",
    405: "The path has other methods.",
    406: "None of the accepted kinds can be given.",
    409: "Contradicts what happened meanwhile, or before under the same Idempotency-Key.",
    410: "It was here, and is gone for good.",
    413: "The body is larger than this path takes.",
    415: "The body's type or encoding is not taken.",
    422: "Understood, but it does not fit: `errors` says what was expected, what came, and where.",
    429: "Too many requests, or pings; Retry-After says when to come again.",
    500: "A fault of ours; it is in our log under the request id.",
    503: "Not now: the server is away, full, or behind; Retry-After says when to come again.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=` of a route: these statuses, each with problem details."""
    return {
        status: {
            "description": _DESCRIPTIONS.get(status, HTTPStatus(status).phrase),
            "model": ProblemBody,
        }
        for status in statuses
    }


def request_id_of(request: Request) -> str | None:
    """The id that the edge gave this request."""
    found = request.scope.get("state", {}).get("request_id")
    return found if isinstance(found, str) else None


def problem_of(error: Exception) -> Problem | None:
    """What an error below an endpoint is to the one who asked; None: it is a fault of ours."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, RequestValidationError):
        return _of_validation(error.errors())
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        name = phrase.lower().replace(" ", "-")
        return Problem(error.status_code, name, str(error.detail), headers=error.headers)
    if isinstance(error, PingsRefused):
        return _later("pings-held", str(error), error.retry_after_s)
    if isinstance(error, AppendsRefused):
        return _later("appends-refused", str(error), 1.0)
    if isinstance(error, ServerRefused):
        return _later(
            "server-refused", "the server may lose what it acknowledges; nothing is written until that is mended"
        )
    if isinstance(error, redis.OutOfMemoryError):
        return _later("server-full", "the server's memory is full")
    if isinstance(error, redis.ConnectionError | redis.TimeoutError):
        return _later("server-away", "the server does not answer; whether the request was done is not known")
    return None


def _later(type: str, detail: str, retry_after_s: float = 2.0) -> Problem:
    return Problem(503, type, detail, headers={"Retry-After": str(max(1, round(retry_after_s)))})


def _of_validation(errors: Sequence[Any]) -> Problem:
    if len(errors) == 1 and errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "malformed")
        return Problem(400, "malformed-json", f"the body must be JSON: {reason}, at character {errors[0]['loc'][-1]}")
    faults = [fault_of(error) for error in errors[:ERRORS_MAX]]
    first = faults[0]
    detail = f"{first['where']}: {first['expected']}, got {first['got']}"
    if len(errors) > 1:
        detail += f"; and {len(errors) - 1} more"
    return Problem(422, "does-not-fit", detail, errors=faults)


def fault_of(error: Mapping[str, Any]) -> dict[str, str]:
    """One of pydantic's errors as a `Fault`."""
    pointer = "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in error["loc"])
    missing = error["type"] == "missing"
    expected = "must be given" if missing else str(error["msg"])
    return {
        "where": _clean(pointer, 3 * SHOWN_CHARACTERS),
        "expected": _clean(expected, 3 * SHOWN_CHARACTERS),
        "got": "nothing" if missing else _clean(_shown(error.get("input")), SHOWN_CHARACTERS),
    }


def _shown(value: object) -> str:
    """The beginning of what came, cheaply also where it is large."""
    if isinstance(value, str | bytes):
        return repr(value[: SHOWN_CHARACTERS + 1])
    if isinstance(value, dict):
        return f"an object of {len(value)} members"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value)


def _clean(text: str, most: int) -> str:
    """Text that can be encoded, and is not long."""
    text = text.encode(errors="replace").decode()
    return text if len(text) <= most else f"{text[: most - 1]}…"


def install(app: FastAPI) -> None:
    """Have the app answer with problem details, whatever is raised. What is a fault of ours goes up to the edge."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        assert problem is not None, "only what has a problem is handled here"
        return problem.response(request_id_of(request))

    for kind in (
        HTTPException,
        RequestValidationError,
        AppendsRefused,
        ServerRefused,
        redis.OutOfMemoryError,
        redis.ConnectionError,
        redis.TimeoutError,
    ):
        app.add_exception_handler(kind, answer)
