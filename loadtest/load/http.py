"""One HTTP connection of a user, on gevent: what Locust's own fast client is made of, without its idea of latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from geventhttpclient import HTTPClient
from geventhttpclient.url import URL

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 60.0
BLOCK_BYTES = 1 << 16


class Refused(Exception):
    """An answer that is no success. Its words are bounded: status and kind, no body."""

    def __init__(self, status: int, kind: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {kind}".strip())
        self.status = status
        self.retry_after_s = retry_after_s


class NoAnswer(Exception):
    """The connection failed. Words: the kind of failure alone."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A success, or 304."""

    status: int
    headers: Any
    body: bytes


class Connection:
    """Kept alive, opened again when it breaks. `key`: sent with every request unless one is given with it."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._key = key
        self._client = HTTPClient.from_url(
            URL(url),
            concurrency=1,
            connection_timeout=CONNECT_TIMEOUT_S,
            network_timeout=timeout_s,
            block_size=BLOCK_BYTES,
        )

    def ask(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Answer:
        """Raises Refused, NoAnswer."""
        response = self.open(method, path, body, headers, key)
        try:
            return Answer(response.status_code, response, bytes(response.read()))
        except Exception as error:
            raise NoAnswer(f"no answer: {type(error).__name__}") from error

    def open(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> Any:
        """A response whose body is still to be read. Raises Refused, NoAnswer."""
        named = dict(headers or {})
        if bearer := key or self._key:
            named["Authorization"] = f"Bearer {bearer}"
        try:
            response = self._client.request(method, path, body=body, headers=named)
            status = int(response.status_code)
            if status >= 400:
                raise Refused(status, _kind_of(response), _seconds(response.get("retry-after")))
        except Refused:
            raise
        except Exception as error:
            raise NoAnswer(f"no answer: {type(error).__name__}") from error
        return response

    def close(self) -> None:
        self._client.close()


def _kind_of(response: Any) -> str:
    """The last part of a problem's type (RFC 9457), if it says one."""
    import orjson

    try:
        kind = str(orjson.loads(bytes(response.read())).get("type", ""))
    except (ValueError, AttributeError):
        return ""
    return kind.rsplit("/", 1)[-1].rsplit(":", 1)[-1][:40]


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None
