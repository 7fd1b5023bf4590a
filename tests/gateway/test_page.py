"""The operator's page as it is served: bytes, caches, and what a browser lets it do."""

from __future__ import annotations

import gzip
import re

import pytest

from gateway.page import FOLDER
from tests.gateway.conftest import Http


@pytest.fixture
def page(http: Http) -> str:
    answer = http.get("/")
    assert answer.status_code == 200
    return answer.text


def test_page_needs_no_key_and_asks_this_host_alone(http: Http, page: str) -> None:
    references = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert references
    for reference in references:
        assert reference.startswith("/assets/")
        assert http.get(reference).status_code == 200


def test_browser_runs_and_asks_nothing_from_elsewhere(http: Http) -> None:
    policy = http.get("/").headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy


def test_page_is_asked_for_anew_and_its_parts_are_kept(http: Http, page: str) -> None:
    script = re.findall(r'src="(/assets/[^"]+)"', page)[0]
    assert http.get("/").headers["Cache-Control"] == "no-cache"
    answer = http.get(script)
    assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert answer.headers["Content-Type"] == "text/javascript; charset=utf-8"
    for path in ("/", script):
        etag = http.get(path).headers["ETag"]
        again = http.get(path, headers={"If-None-Match": etag})
        assert (again.status_code, again.content) == (304, b"")


def test_parts_are_compressed_for_whoever_takes_that(http: Http, page: str) -> None:
    script = re.findall(r'src="(/assets/[^"]+)"', page)[0]
    packed = http.get(script, headers={"Accept-Encoding": "gzip"})
    plain = http.get(script, headers={"Accept-Encoding": "identity"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert "Content-Encoding" not in plain.headers
    assert packed.headers["ETag"] != plain.headers["ETag"]
    assert packed.content == plain.content == gzip.decompress((FOLDER / f"{script[1:]}.gz").read_bytes())


@pytest.mark.parametrize(
    "path", ["/assets/none.js", "/assets/..%2findex.html", "/assets/index.html", "/page", "/v1/none"]
)
def test_nothing_else_is_served(http: Http, path: str) -> None:
    assert http.get(path).status_code in (401, 404)


def test_licences_are_served(http: Http) -> None:
    answer = http.get("/third-party-notices.txt")
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert "maplibre-gl" in answer.text
