"""Signed requests, in the shape of RFC 9421 (HTTP Message Signatures) with RFC 9530 (Content-Digest).

    Content-Digest:  sha-256=:<base64 of the body's SHA-256>:
    Signature-Input: sig=("@method" "@path" "@query" "content-digest");created=<s>;keyid="<key id>";
                         nonce="<22 characters>";alg="hmac-sha256"
    Signature:       sig=:<base64 of HMAC-SHA256(signing key, signature base)>:

Of the RFC this takes exactly that: one signature, these four components in any order, these parameters in any order. A
request without a body may do without Content-Digest. What is signed is what travels: the path as it was sent, the body
as it was compressed. The key itself never travels; the gateway keeps no more of it than it needs to check this.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from gateway.keys import parse_key

WINDOW_S = 300
"""How far `created` may be off."""
ALGORITHM = "hmac-sha256"
_COMPONENTS = ('"@method"', '"@path"', '"@query"', '"content-digest"')
_HEADER_CHARACTERS_MAX = 1_024
_INPUT = re.compile(
    r"([a-z*][a-z0-9_.*-]{0,31})="  # the label
    r'(\(((?:"[@a-z-]{1,32}"(?: "[@a-z-]{1,32}"){0,7})?)\)'  # what is signed
    r'((?:;[a-z]+=(?:"[^"\\]{0,128}"|[0-9]{1,12})){1,8}))'
)
_PARAMETER = re.compile(r';([a-z]+)=(?:"([^"\\]{0,128})"|([0-9]{1,12}))')
_SIGNATURE = re.compile(r"([a-z*][a-z0-9_.*-]{0,31})=:([A-Za-z0-9+/]{43}=):")
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:,|$)")
_NONCE = re.compile(r"[A-Za-z0-9_-]{16,64}")


class BadSignature(Exception):
    """The request's signature headers are not what this takes. The message says what was expected."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What the headers of a signed request say."""

    key_id: str
    created_s: int
    nonce: str
    base: bytes
    """What was signed."""
    mac: bytes
    body_digest: bytes | None
    """SHA-256 that the body must have; None: there must be no body."""

    def made_with(self, signing_key: bytes) -> bool:
        """Whether this key made it; in constant time."""
        return hmac.compare_digest(hmac.digest(signing_key, self.base, "sha256"), self.mac)

    def timely(self, now_s: float) -> bool:
        """Whether it was made within WINDOW_S of now."""
        return abs(now_s - self.created_s) <= WINDOW_S


def sign(
    key: str,
    method: str,
    url: str,
    body: bytes = b"",
    *,
    created_s: int | None = None,
    nonce: str | None = None,
) -> dict[str, str]:
    """Headers that sign a request: to be sent with it, instead of Authorization.

    `key`: the whole key, ty_…; `url`: absolute, or path and query, exactly as it is sent (percent-encoded); `body`: the
    bytes that travel, after compression. Each request, also one that is sent again, needs a signature of its own.
    Raises ValueError if `key` is none.

        headers = sign(key, "POST", "/v1/pings", body)
    """
    parsed = parse_key(key)
    if parsed is None:
        raise ValueError("a key must be like ty_<key id>_<43 characters>, got something else")
    parts = urlsplit(url)
    digest = content_digest(body)
    parameters = (
        f"({' '.join(_COMPONENTS)});created={int(time.time()) if created_s is None else created_s}"
        f';keyid="{parsed.key_id}";nonce="{nonce or secrets.token_urlsafe(16)}";alg="{ALGORITHM}"'
    )
    values = {
        '"@method"': method.upper(),
        '"@path"': parts.path or "/",
        '"@query"': f"?{parts.query}",
        '"content-digest"': digest,
    }
    base = _base(_COMPONENTS, values, parameters)
    mac = base64.b64encode(hmac.digest(parsed.signing_key, base, "sha256")).decode()
    return {"Content-Digest": digest, "Signature-Input": f"sig={parameters}", "Signature": f"sig=:{mac}:"}


def content_digest(body: bytes) -> str:
    """The Content-Digest header of a body."""
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def parse_signature(method: str, path: str, query: str, headers: Mapping[str, str]) -> Signature:
    """What a request's headers say; `path` and `query` as they were sent, `headers` by lower-case names.

    Raises BadSignature.
    """
    input_text, signature_text = headers.get("signature-input", ""), headers.get("signature", "")
    digest_text = headers.get("content-digest")
    if max(len(input_text), len(signature_text), len(digest_text or "")) > _HEADER_CHARACTERS_MAX:
        raise BadSignature(f"signature headers must have at most {_HEADER_CHARACTERS_MAX} characters")
    found = _INPUT.fullmatch(input_text.strip())
    mac = _SIGNATURE.fullmatch(signature_text.strip())
    if found is None or mac is None or found[1] != mac[1]:
        raise BadSignature(
            'Signature-Input must be like sig=("@method" "@path" "@query" "content-digest");created=…;keyid="…";'
            'nonce="…";alg="hmac-sha256", and Signature like sig=:<base64 of 32 bytes>:'
        )
    components = tuple(found[3].split())
    required = set(_COMPONENTS) if digest_text is not None else set(_COMPONENTS[:3])
    if set(components) != required or len(components) != len(required):
        raise BadSignature(f"these components must be signed, each once: {' '.join(sorted(required))}")
    matched = list(_PARAMETER.finditer(found[4]))
    parameters = {match[1]: match[2] if match[2] is not None else match[3] for match in matched}
    quoted = {match[1] for match in matched if match[2] is not None}
    if (
        sorted(match[1] for match in matched) != ["alg", "created", "keyid", "nonce"]
        or quoted != {"alg", "keyid", "nonce"}
        or parameters["alg"] != ALGORITHM
        or not _NONCE.fullmatch(parameters["nonce"])
    ):
        raise BadSignature(
            "the signature's parameters must be created (seconds since 1970), keyid, nonce (16 to 64 characters of "
            f'A-Z a-z 0-9 _ -) and alg="{ALGORITHM}", each once'
        )
    body_digest = None
    if digest_text is not None:
        digest = _DIGEST.search(digest_text)
        if digest is None:
            raise BadSignature("Content-Digest must hold sha-256=:<base64 of 32 bytes>:")
        body_digest = _bytes(digest[1])
    values = {
        '"@method"': method.upper(),
        '"@path"': path or "/",
        '"@query"': f"?{query}",
        '"content-digest"': (digest_text or "").strip(),
    }
    base = _base(components, values, found[2])
    return Signature(
        parameters["keyid"], int(parameters["created"]), parameters["nonce"], base, _bytes(mac[2]), body_digest
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise BadSignature("a digest must be base64 of 32 bytes") from None


def _base(components: tuple[str, ...], values: Mapping[str, str], parameters: str) -> bytes:
    """RFC 9421, section 2.5."""
    lines = [f"{component}: {values[component]}" for component in components]
    return "\n".join([*lines, f'"@signature-params": {parameters}']).encode("utf-8", "surrogateescape")
