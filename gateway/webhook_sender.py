"""One request to a receiver that somebody else chose: where it may go, how long it may take, what it may answer.

    url ──check_url──> host ──resolve──> addresses, all of them public ──connect to one of these──> POST ──> Answer

A webhook's url is an address that our own machine will talk to: without care it reaches what only this machine can
reach. So the name is resolved here, every address is looked at, and the connection goes to an address that was looked
at, not to the name: a name that means another address a moment later (DNS rebinding) changes nothing. TLS is still that
of the name. Redirects are not followed, proxies of the environment not used, no more than the beginning of an answer is
read.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import urlsplit

import httpx

URL_CHARACTERS_MAX = 2_048
ANSWER_BYTES_MAX = 64 << 10
"""Of an answer's body; nothing is made of it, but a connection whose answer was read can be used again."""
CONNECT_TIMEOUT_S = 5.0
RETRY_AFTER_S_MAX = 300.0
"""Longer than this nobody is let wait: there are phones behind it."""
RESOLVED_FOR_S = 30.0
"""How long addresses are used before the name is resolved, and they are looked at, again."""
USER_AGENT = "tuanyuan-webhooks/1"
_NAT64 = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}")

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> addresses. Raises OSError."""


class UrlRefused(ValueError):
    """A url that webhooks do not go to. The message says why, and is for the partner."""


class Outcome(StrEnum):
    """What came of a request."""

    ACCEPTED = "accepted"
    """2xx."""
    LATER = "later"
    """429, or 503 with Retry-After: the receiver lives, and asks for time."""
    REFUSED = "refused"
    """Any other answer."""
    UNREACHABLE = "unreachable"
    """No answer: refused connection, broken TLS, timeout, an address that is not allowed."""
    GONE = "gone"
    """410: the receiver wants no more."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a receiver said."""

    outcome: Outcome
    status: int | None
    reason: str
    """In words; nothing of the answer's body."""
    retry_after_s: float | None = None


def is_public(address: str) -> bool:
    """Whether an address is one of the internet's own: none that leads into this machine or its network."""
    parsed: IPv4Address | IPv6Address = ip_address(address.partition("%")[0])
    if isinstance(parsed, IPv6Address):
        inner = parsed.ipv4_mapped or parsed.sixtofour
        if inner is not None:
            return is_public(str(inner))
        if any(parsed in network for network in _NAT64) or parsed.teredo is not None or int(parsed) >> 32 == 0:
            return False
    return parsed.is_global and not parsed.is_multicast


def check_url(url: str, private_allowed: bool = False) -> None:
    """What can be said of a url before its name is resolved. Raises UrlRefused.

    `private_allowed`: for receivers inside one's own network; http is allowed then, too.
    """
    if len(url) > URL_CHARACTERS_MAX or not url.isascii() or not url.isprintable() or " " in url:
        raise UrlRefused(f"a webhook's url must be printable ASCII of at most {URL_CHARACTERS_MAX} characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UrlRefused(f"a webhook's url must be like https://example.org/path: {error}") from None
    schemes = ("https", "http") if private_allowed else ("https",)
    if parts.scheme not in schemes or not parts.hostname:
        raise UrlRefused(f"a webhook's url must be like https://example.org/path, got {url[:100]!r}")
    if parts.username is not None or parts.password is not None:
        raise UrlRefused("a webhook's url must hold no user name and no password: its deliveries are signed")
    if parts.fragment or "#" in url or "\\" in url:
        raise UrlRefused("a webhook's url must have no fragment")
    if port == 0:
        raise UrlRefused("a webhook's port must be from 1 to 65535")
    try:
        ip_address(parts.hostname)
    except ValueError:
        if not _HOST.fullmatch(parts.hostname):
            raise UrlRefused(f"a webhook's host must be a name or an address, got {parts.hostname[:100]!r}") from None
    else:
        if not private_allowed and not is_public(parts.hostname):
            raise UrlRefused("a webhook must go to a public address")


async def resolve(host: str, port: int) -> Sequence[str]:
    """By this machine's resolver."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class WebhookSender:
    """Requests to one receiver, of one partner: connections are not shared, and never used for another host's name."""

    def __init__(
        self,
        url: str,
        timeout_s: float,
        private_allowed: bool = False,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
        connections_max: int = 32,
    ) -> None:
        """Raises UrlRefused."""
        check_url(url, private_allowed)
        parts = urlsplit(url)
        self._scheme = parts.scheme
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._host_header = parts.netloc
        self._path = httpx.URL(url).raw_path.decode()
        self._timeout_s = timeout_s
        self._private_allowed = private_allowed
        self._resolve = resolve
        self._addresses: tuple[Sequence[str], float] = ((), 0.0)
        self._client = httpx.AsyncClient(
            verify=tls or httpx.create_ssl_context(),  # SSL_CERT_FILE, or Mozilla's authorities
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            limits=httpx.Limits(max_connections=connections_max, max_keepalive_connections=connections_max),
            follow_redirects=False,
            trust_env=False,
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()

    async def post(self, body: bytes, headers: dict[str, str]) -> Answer:
        """Send JSON; never raises for what the receiver, its name or the network do."""
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._post(body, headers)
        except TimeoutError:
            return _unreachable(f"no answer within {self._timeout_s:g} s")
        except UrlRefused as refused:
            return _unreachable(str(refused))
        except httpx.TimeoutException:
            return _unreachable(f"no answer within {self._timeout_s:g} s")
        except httpx.ConnectError as error:
            return _unreachable("TLS failed" if "SSL" in str(error) or "certificate" in str(error) else "no connection")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            return _unreachable("the connection broke")
        except (OSError, UnicodeError):  # a label of more than 63 characters, say
            return _unreachable("the name cannot be resolved")

    async def _post(self, body: bytes, headers: dict[str, str]) -> Answer:
        address = (await self._public_addresses())[0]
        shown = f"[{address}]" if ":" in address else address
        is_name = address != self._host
        request = self._client.build_request(
            "POST",
            httpx.URL(f"{self._scheme}://{shown}:{self._port}{self._path}"),
            content=body,
            headers={
                "host": self._host_header,
                "content-type": "application/json",
                "user-agent": USER_AGENT,
                "accept-encoding": "identity",
                **headers,
            },
            extensions={"sni_hostname": self._host} if is_name else None,
        )
        response = await self._client.send(request, stream=True)
        try:
            size_bytes = 0
            async for chunk in response.aiter_raw():
                size_bytes += len(chunk)
                if size_bytes > ANSWER_BYTES_MAX:
                    break  # its status is all we need; the connection is closed
        finally:
            await response.aclose()
        return _answer(response)

    async def _public_addresses(self) -> Sequence[str]:
        now_s = asyncio.get_running_loop().time()
        addresses, until_s = self._addresses
        if addresses and now_s < until_s:
            return addresses
        addresses = await self._resolve(self._host, self._port)
        if not addresses:
            raise OSError("no address")
        # One that is not public is enough: who publishes such a mixture waits for us to choose the wrong one.
        if not self._private_allowed and not all(map(is_public, addresses)):
            raise UrlRefused("the webhook's name must resolve to public addresses only")
        self._addresses = addresses, now_s + RESOLVED_FOR_S
        return addresses


def _unreachable(reason: str) -> Answer:
    return Answer(Outcome.UNREACHABLE, None, reason)


def _answer(response: httpx.Response) -> Answer:
    status = response.status_code
    reason = f"answered {status}"
    retry_after_s = _retry_after_s(response.headers.get("retry-after"))
    if 200 <= status < 300:
        return Answer(Outcome.ACCEPTED, status, reason)
    if status == 410:
        return Answer(Outcome.GONE, status, reason)
    if status == 429 or (status == 503 and retry_after_s is not None):
        return Answer(Outcome.LATER, status, reason, retry_after_s)
    if 300 <= status < 400:
        reason += ": redirects are not followed"
    return Answer(Outcome.REFUSED, status, reason)


def _retry_after_s(text: str | None) -> float | None:
    """Seconds, or a date (RFC 9110, section 10.2.3), as seconds from now: at most RETRY_AFTER_S_MAX."""
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit() and len(text) < 10:
        seconds = float(text)
    else:
        try:
            at = parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_S_MAX)
