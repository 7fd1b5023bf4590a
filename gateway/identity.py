"""Who a request is from, decided before its body is read; and the dependencies by which endpoints say whom they serve.

    Authorization: Bearer ty_…            or      Signature-Input, Signature, Content-Digest  (`gateway.signing`)

    async def endpoint(caller: PartnerDep) -> ...          # anybody else: 401 without a key, 403 with another one

Unknown, wrong and expired keys and disabled accounts get one and the same answer. Keys are looked up in Valkey at every
request, so what an operator disables ends at once.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Annotated, Any, cast

import anyio.to_thread
from fastapi import Depends, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.accounts import AnyAccount, Caller, Found, OfficerAccount, OperatorAccount, PartnerAccount
from gateway.audit_log import REFUSED
from gateway.errors import Problem
from gateway.limits import Taken, address_bucket
from gateway.runtime import Gateway, gateway_of
from gateway.signing import WINDOW_S, BadSignature, Signature, parse_signature

REFUSALS_PER_S = 1.0
"""Of one key, at endpoints that are not for it: each of them is a row of the audit log, which is kept for ever."""
REFUSALS_BURST = 60.0
_KEY_HEADER_CHARACTERS_MAX = 256
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_WORDS = {
    "partner": "partners",
    "officer": "officers",
    "operator": "operators",
    "viewer": "officers and operators",
}


def unknown_caller() -> Problem:
    """The one answer to every key and signature that is not accepted."""
    return _unauthorized("not-accepted", "a valid key, or a signature made with one, must come with the request")


def _unauthorized(type: str, detail: str) -> Problem:
    return Problem(401, type, detail, headers={"WWW-Authenticate": 'Bearer realm="tuanyuan"'})


class Authenticate:
    """ASGI: finds out whose key a request bears. Refuses wrong ones, and writes without any, ahead of the body."""

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        signed = "signature-input" in headers or "signature" in headers
        bearer = headers.get("authorization")
        state = scope.setdefault("state", {})
        if bearer is not None and signed:
            raise Problem(400, "two-credentials", "either a key or a signature must come with a request, got both")
        if bearer is None and not signed:
            if scope["method"] not in _SAFE_METHODS:
                raise unknown_caller()
            await self._app(scope, receive, send)
            return
        if signed:
            signature = _signature(scope, headers)
            caller = await anyio.to_thread.run_sync(self._signer, signature, state)
            receive = _BodyCheck(receive, signature.body_digest)
        else:
            caller = await anyio.to_thread.run_sync(self._bearer, bearer or "", state)
        taken = self._take(caller)
        state["caller"] = caller
        state["key_limit"] = taken
        await self._app(scope, receive, send)

    def _bearer(self, header: str, state: dict[str, Any]) -> Caller[AnyAccount]:
        scheme, _, text = header.partition(" ")
        caller = None
        if scheme.lower() == "bearer" and len(text) <= _KEY_HEADER_CHARACTERS_MAX:
            caller = self._gateway.accounts.authenticate(text.strip())
        if caller is None:
            raise self._failure(state)
        if caller.account.signed:
            detail = "this account demands signed requests (RFC 9421), got the bare key"
            raise _unauthorized("signature-demanded", detail)
        return caller

    def _signer(self, signature: Signature, state: dict[str, Any]) -> Caller[AnyAccount]:
        found = self._gateway.accounts.find(signature.key_id)
        signing_key = b"\0" * 32 if found is None else self._gateway.accounts.signing_key(found)
        genuine = signature.made_with(signing_key)
        if found is None or not genuine or not found.usable:
            raise self._failure(state)
        if not signature.timely(self._gateway.clock.now_ms() / 1000):
            raise _unauthorized(
                "signature-untimely",
                f"created must be within {WINDOW_S} s of now, got {signature.created_s}: is the clock right?",
            )
        if not self._remember(found, signature.nonce):
            raise _unauthorized("signature-replayed", "this nonce was used before: every request needs its own")
        return found.caller(signed=True)

    def _remember(self, found: Found, nonce: str) -> bool:
        """Whether the nonce is new. It is kept for as long as its signature could be timely."""
        key = f"nonce:{{desk}}:{found.key_id}:{nonce}"
        return bool(self._gateway.client.set(key, b"", nx=True, ex=2 * WINDOW_S + 5))

    def _failure(self, state: dict[str, Any]) -> Problem:
        """Counted against the address. Raises Problem 429 where there were too many."""
        gateway = self._gateway
        gateway.metrics.count("gateway_callers_refused_total")
        rate = gateway.config.failures_per_s
        bucket = f"failures:{address_bucket(state.get('address', ''))}"
        gateway.buckets.check(bucket, "failures", rate, rate * gateway.config.burst_s)
        return unknown_caller()

    def _take(self, caller: Caller[AnyAccount]) -> Taken:
        gateway = self._gateway
        rate = caller.account.requests_per_s or gateway.config.requests_per_s
        return gateway.buckets.check(f"key:{caller.actor}", "key", rate, max(1.0, rate * gateway.config.burst_s))


def _signature(scope: Scope, headers: Headers) -> Signature:
    raw_path = cast(bytes, scope.get("raw_path") or b"")
    path = raw_path.partition(b"?")[0].decode("latin-1")
    query = cast(bytes, scope.get("query_string", b"")).decode("latin-1")
    names = ("signature-input", "signature", "content-digest")
    given = {name: headers.getlist(name) for name in names}
    if any(len(values) > 1 for values in given.values()):
        raise Problem(400, "malformed-signature", "each signature header must come once")
    try:
        return parse_signature(
            scope["method"], path, query, {name: values[0] for name, values in given.items() if values}
        )
    except BadSignature as error:
        raise Problem(400, "malformed-signature", str(error)) from None


class _BodyCheck:
    """Passes a body on, and raises Problem 401 in place of its end if its digest is another one than was signed."""

    def __init__(self, receive: Receive, digest: bytes | None) -> None:
        self._receive = receive
        self._wanted = digest
        self._digest = hashlib.sha256()

    async def __call__(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        body = message.get("body", b"")
        if self._wanted is None:
            if body:
                raise _unauthorized("digest-demanded", "a body must be signed: Content-Digest is missing")
            return message
        self._digest.update(body)
        if not message.get("more_body") and not hmac.compare_digest(self._digest.digest(), self._wanted):
            raise _unauthorized("digest-differs", "the body must be the one that Content-Digest was made of")
        return message


# --- dependencies -----------------------------------------------------------------------------------------------------

_bearer_scheme = HTTPBearer(
    auto_error=False, scheme_name="key", bearerFormat="ty_…", description="The account's key: `Bearer ty_…`."
)
_signature_scheme = APIKeyHeader(
    name="Signature",
    auto_error=False,
    scheme_name="signature",
    description="HMAC-SHA256 request signature (RFC 9421) over @method, @path, @query and content-digest, with "
    "created, keyid, nonce and alg in Signature-Input. `gateway.signing.sign` makes one.",
)
_Documented = (Security(_bearer_scheme), Security(_signature_scheme))


def caller_of(request: Request) -> Caller[AnyAccount] | None:
    """Whoever a request is from; None: it bears neither key nor signature."""
    return cast("Caller[AnyAccount] | None", request.scope.get("state", {}).get("caller"))


def _caller(request: Request, kind: str) -> Caller[AnyAccount]:
    caller = caller_of(request)
    if caller is None:
        raise unknown_caller()
    if caller.kind == kind:
        return caller
    raise _refused(request, caller, kind)


def _refused(request: Request, caller: Caller[AnyAccount], kind: str) -> Problem:
    """Of somebody else's key at the desk, or at an operator's endpoint, a row is kept."""
    gateway = gateway_of(request)
    gateway.buckets.check(f"refusals:{caller.actor}", "refusals", REFUSALS_PER_S, REFUSALS_BURST)
    if kind != "partner":
        route = getattr(request.scope.get("route"), "path", "-")
        details = {"reason": f"for {_WORDS[kind]} alone"}
        gateway.audit.append(caller.actor, f"{request.method} {route}", route, REFUSED, details)
    return Problem(
        403, "not-for-you", f"this is for {_WORDS[kind]}; the key is that of one of the {_WORDS[caller.kind]}"
    )


async def partner_caller(
    request: Request, _key: Annotated[object, _Documented[0]], _signature: Annotated[object, _Documented[1]]
) -> Caller[PartnerAccount]:
    """The partner whose request this is. Raises Problem 401, 403."""
    return cast(Caller[PartnerAccount], _caller(request, "partner"))


def officer_caller(
    request: Request, _key: Annotated[object, _Documented[0]], _signature: Annotated[object, _Documented[1]]
) -> Caller[OfficerAccount]:
    """The officer whose request this is. Raises Problem 401, 403 (with a row in the audit log)."""
    return cast(Caller[OfficerAccount], _caller(request, "officer"))


def operator_caller(
    request: Request, _key: Annotated[object, _Documented[0]], _signature: Annotated[object, _Documented[1]]
) -> Caller[OperatorAccount]:
    """The operator whose request this is. Raises Problem 401, 403 (with a row in the audit log)."""
    return cast(Caller[OperatorAccount], _caller(request, "operator"))


def viewer_caller(
    request: Request, _key: Annotated[object, _Documented[0]], _signature: Annotated[object, _Documented[1]]
) -> Caller[OfficerAccount | OperatorAccount]:
    """The officer or operator whose request this is. Raises Problem 401, 403 (with a row in the audit log)."""
    caller = caller_of(request)
    kind = "officer" if caller is not None and caller.kind == "officer" else "operator"
    if caller is not None and caller.kind == "partner":
        raise _refused(request, caller, "viewer")
    return cast("Caller[OfficerAccount | OperatorAccount]", _caller(request, kind))


PartnerDep = Annotated[Caller[PartnerAccount], Depends(partner_caller)]
OfficerDep = Annotated[Caller[OfficerAccount], Depends(officer_caller)]
OperatorDep = Annotated[Caller[OperatorAccount], Depends(operator_caller)]
ViewerDep = Annotated[Caller[OfficerAccount | OperatorAccount], Depends(viewer_caller)]
