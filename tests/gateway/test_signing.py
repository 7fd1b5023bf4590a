"""Request signatures: one worked out by hand, and everything that must not pass."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import Key
from gateway.signing import WINDOW_S, BadSignature, Signature, content_digest, parse_signature, sign

KEY = Key("abcdefghijklmnop", bytes(range(32)))
BODY = b'{"hello": "world"}'
DIGEST = "sha-256=:X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE=:"
"""Of BODY: the example of RFC 9530, appendix B."""
CREATED_S = 1_777_885_921
NONCE = "0123456789abcdefABCDEF"


def signed(body: bytes = BODY, method: str = "POST", url: str = "/v1/pings?a=1&b=%20") -> dict[str, str]:
    return sign(KEY.text, method, url, body, created_s=CREATED_S, nonce=NONCE)


def parse(
    headers: dict[str, str], method: str = "POST", path: str = "/v1/pings", query: str = "a=1&b=%20"
) -> Signature:
    return parse_signature(method, path, query, {name.lower(): value for name, value in headers.items()})


def test_the_digest_of_a_body_is_that_of_the_standard() -> None:
    assert content_digest(BODY) == DIGEST


def test_what_is_signed_is_the_base_of_the_standard() -> None:
    parameters = (
        '("@method" "@path" "@query" "content-digest");created=1777885921;keyid="abcdefghijklmnop";'
        'nonce="0123456789abcdefABCDEF";alg="hmac-sha256"'
    )
    base = (
        f'"@method": POST\n"@path": /v1/pings\n"@query": ?a=1&b=%20\n"content-digest": {DIGEST}\n'
        f'"@signature-params": {parameters}'
    )
    mac = base64.b64encode(hmac.digest(KEY.signing_key, base.encode(), "sha256")).decode()
    assert signed() == {
        "Content-Digest": DIGEST,
        "Signature-Input": f"sig={parameters}",
        "Signature": f"sig=:{mac}:",
    }
    assert parse(signed()).base == base.encode()


def test_a_signature_says_whose_it_is_and_of_which_body() -> None:
    signature = parse(signed())
    assert (signature.key_id, signature.created_s, signature.nonce) == (KEY.key_id, CREATED_S, NONCE)
    assert signature.body_digest == hashlib.sha256(BODY).digest()
    assert signature.made_with(KEY.signing_key)
    assert not signature.made_with(KEY.digest)


def test_a_url_with_a_host_is_signed_as_its_path_and_query() -> None:
    assert signed(url="https://gateway.example:8443/v1/pings?a=1&b=%20") == signed()
    assert parse(signed(url="https://gateway.example"), path="/", query="").made_with(KEY.signing_key)


@pytest.mark.parametrize(
    "other",
    [
        {"method": "PUT"},
        {"path": "/v1/pushes"},
        {"path": "/v1/pings/"},
        {"query": "a=2&b=%20"},
        {"query": "a=1&b=+"},
        {"query": ""},
    ],
)
def test_another_request_under_the_same_headers_is_not_genuine(other: dict[str, str]) -> None:
    assert not parse(signed(), **other).made_with(KEY.signing_key)


@pytest.mark.parametrize(
    ("header", "before", "after"),
    [
        ("Content-Digest", "X48E9", "X48E8"),
        ("Signature-Input", "created=1777885921", "created=1777885922"),
        ("Signature-Input", NONCE, NONCE[::-1]),
        ("Signature-Input", "abcdefghijklmnop", "abcdefghijklmnoq"),
        ("Signature-Input", '"@method" "@path"', '"@path" "@method"'),
    ],
)
def test_a_header_that_was_changed_is_noticed(header: str, before: str, after: str) -> None:
    headers = signed()
    assert before in headers[header]
    headers[header] = headers[header].replace(before, after)
    assert not parse(headers).made_with(KEY.signing_key)


@pytest.mark.parametrize(
    ("header", "before", "after", "words"),
    [
        ("Signature", r"sig=.*", "", "Signature-Input must be like"),
        ("Signature", r"^sig", "other", "Signature-Input must be like"),
        ("Signature", r"=:$", ":", "Signature-Input must be like"),
        ("Signature-Input", r".*", "sig", "Signature-Input must be like"),
        ("Signature-Input", r' "@query"', "", "these components must be signed"),
        ("Signature-Input", r' "content-digest"', "", "these components must be signed"),
        ("Signature-Input", r' "@query"', ' "@query" "@query"', "these components must be signed"),
        ("Signature-Input", r' "@query"', ' "@query" "date"', "these components must be signed"),
        ("Signature-Input", r";nonce=\"[^\"]*\"", "", "parameters must be created"),
        ("Signature-Input", r"nonce=\"[^\"]*\"", 'nonce="short"', "parameters must be created"),
        ("Signature-Input", r"created=\d+", 'created="1"', "parameters must be created"),
        ("Signature-Input", r"created=\d+", "created=1;created=2", "parameters must be created"),
        ("Signature-Input", r"hmac-sha256", "hmac-sha1", "parameters must be created"),
        ("Signature-Input", r"$", ";expires=1", "parameters must be created"),
        ("Signature-Input", r"$", ";a=" + "1" * 1100, "at most 1024 characters"),
        ("Content-Digest", r"sha-256", "sha-512", "Content-Digest must hold sha-256"),
        ("Content-Digest", r"=:$", ":", "Content-Digest must hold sha-256"),
    ],
)
def test_headers_of_another_shape_say_what_was_expected(header: str, before: str, after: str, words: str) -> None:
    headers = signed()
    headers[header] = re.sub(before, after, headers[header], count=1)
    with pytest.raises(BadSignature, match=words):
        parse(headers)


def test_a_request_without_a_body_may_do_without_a_digest() -> None:
    parameters = f'("@method" "@path" "@query");alg="hmac-sha256";nonce="{NONCE}";keyid="{KEY.key_id}";created=7'
    base = f'"@method": GET\n"@path": /v1/pushes\n"@query": ?\n"@signature-params": {parameters}'
    mac = base64.b64encode(hmac.digest(KEY.signing_key, base.encode(), "sha256")).decode()
    headers = {"Signature-Input": f"any-1={parameters}", "Signature": f"any-1=:{mac}:"}
    signature = parse(headers, "GET", "/v1/pushes", "")
    assert signature.made_with(KEY.signing_key)
    assert signature.body_digest is None


def test_a_digest_that_comes_with_the_request_must_be_signed() -> None:
    headers = signed()
    headers["Signature-Input"] = headers["Signature-Input"].replace(' "content-digest"', "")
    with pytest.raises(BadSignature, match='"content-digest"'):
        parse(headers)


def test_several_digests_may_stand_in_one_header() -> None:
    headers = signed() | {"Content-Digest": f"sha-512=:abc=:, {DIGEST}"}
    assert parse(headers).body_digest == hashlib.sha256(BODY).digest()


def test_a_signature_is_timely_within_the_window_on_both_sides() -> None:
    signature = parse(signed())
    assert signature.timely(CREATED_S - WINDOW_S)
    assert signature.timely(CREATED_S + WINDOW_S)
    assert not signature.timely(CREATED_S - WINDOW_S - 1)
    assert not signature.timely(CREATED_S + WINDOW_S + 1)


def test_every_signature_has_a_nonce_of_its_own() -> None:
    inputs = {sign(KEY.text, "GET", "/")["Signature-Input"] for _ in range(20)}
    assert len(inputs) == 20


def test_a_request_is_signed_with_a_key_or_not_at_all() -> None:
    with pytest.raises(ValueError, match="a key must be like ty_"):
        sign("secret", "GET", "/")


@given(
    st.text(max_size=300),
    st.text(max_size=100),
    st.one_of(st.none(), st.text(max_size=100)),
)
def test_whatever_the_headers_hold_is_a_signature_or_refused(
    input_text: str, signature_text: str, digest: str | None
) -> None:
    headers = {"signature-input": input_text, "signature": signature_text}
    if digest is not None:
        headers["content-digest"] = digest
    with pytest.raises(BadSignature):
        parse_signature("GET", "/", "", headers)
