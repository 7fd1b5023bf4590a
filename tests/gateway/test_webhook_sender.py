"""Requests to addresses that somebody else chose."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import Iterator, Sequence
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.webhook_sender import (
    ANSWER_BYTES_MAX,
    RETRY_AFTER_S_MAX,
    Answer,
    Outcome,
    Resolve,
    UrlRefused,
    WebhookSender,
    check_url,
    is_public,
)
from tests.gateway.receivers import Receiver, receiving, serving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def posted(url: str, *, private_allowed: bool = True, timeout_s: float = 20.0, **options: Any) -> Answer:
    async def run() -> Answer:
        sender = WebhookSender(url, timeout_s, private_allowed, **options)
        try:
            return await sender.post(b'{"a":1}', {"webhook-id": "one"})
        finally:
            await sender.close()

    return asyncio.run(run())


def resolving(*addresses: str) -> Resolve:
    async def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


# --- where to ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "223.5.5.5", "::ffff:8.8.8.8"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
    ],
)
def test_addresses_that_lead_into_this_machine_or_its_network_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org/", "https"),
        ("ftp://example.org/", "https"),
        ("https:///path", "https"),
        ("https://user:secret@example.org/", "no password"),
        ("https://example.org/#here", "fragment"),
        ("https://example.org:0/", "port"),
        ("https://example.org:99999/", "Port out of range"),
        ("https://127.0.0.1/", "public address"),
        ("https://[::1]/", "public address"),
        ("https://exa mple.org/", "printable"),
        ("https://例子.org/", "ASCII"),
        ("https://example.org/" + "x" * 3_000, "2048"),
        ("https://2130706433%2f/", "name or an address"),
        ("https://example.org\\@127.0.0.1/", "fragment|name or an address|password"),
        ("example.org", "https"),
    ],
)
def test_urls_that_webhooks_do_not_go_to_are_refused(url: str, reason: str) -> None:
    with pytest.raises(UrlRefused, match=reason):
        check_url(url)


@pytest.mark.parametrize("url", ["https://example.org", "https://example.org:8443/a?b=c", "https://8.8.8.8/"])
def test_public_urls_are_taken(url: str) -> None:
    check_url(url)


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["::ffff:127.0.0.1"], ["64:ff9b::a00:1"]])
def test_name_with_an_address_inside_is_not_connected_to(addresses: list[str]) -> None:
    answer = posted("https://partner.test/", private_allowed=False, resolve=resolving(*addresses))
    assert answer == Answer(Outcome.UNREACHABLE, None, "the webhook's name must resolve to public addresses only")


@pytest.mark.parametrize("url", ["https://0x7f000001/", "https://2130706433/", "https://127.1/", "https://localhost/"])
def test_other_spellings_of_the_loopback_are_not_connected_to(url: str) -> None:
    answer = posted(url, private_allowed=False)
    assert answer.outcome is Outcome.UNREACHABLE
    assert answer.reason in (
        "the webhook's name must resolve to public addresses only",
        "the name cannot be resolved",
    )


def test_connection_goes_to_the_address_that_was_looked_at(receiver: Receiver) -> None:
    """A name that nobody else could resolve: had it been resolved again, there would be no answer."""
    answer = posted(f"http://partner.test:{receiver.port}/in?x=1", resolve=resolving("127.0.0.1"))
    assert answer == Answer(Outcome.ACCEPTED, 200, "answered 200")
    (request,) = receiver.requests
    assert request.headers["host"] == f"partner.test:{receiver.port}"
    assert (request.path, request.body, request.headers["webhook-id"]) == ("/in?x=1", b'{"a":1}', "one")


def test_name_that_changes_its_address_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["93.184.216.34"] if len(asked) == 1 else ["127.0.0.1"]

    async def run() -> None:
        sender = WebhookSender("https://partner.test/", 5.0, resolve=rebinding)
        assert await sender._public_addresses() == ["93.184.216.34"]
        assert await sender._public_addresses() == ["93.184.216.34"]
        monkeypatch.setattr(sender, "_addresses", (["93.184.216.34"], 0.0))  # half a minute later
        answer = await sender.post(b"{}", {})
        assert answer.reason == "the webhook's name must resolve to public addresses only"
        await sender.close()

    asyncio.run(run())
    assert len(asked) == 2


def test_unresolvable_names_are_an_answer_not_an_error() -> None:
    async def broken(host: str, port: int) -> Sequence[str]:
        raise UnicodeError("label too long")

    for resolve in (broken, resolving()):
        answer = posted("https://partner.test/", resolve=resolve)
        assert answer.reason == "the name cannot be resolved"


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "outcome", "retry_after_s"),
    [
        (200, {}, Outcome.ACCEPTED, None),
        (204, {}, Outcome.ACCEPTED, None),
        (301, {"location": "http://127.0.0.1/"}, Outcome.REFUSED, None),
        (400, {}, Outcome.REFUSED, None),
        (410, {}, Outcome.GONE, None),
        (429, {}, Outcome.LATER, None),
        (429, {"retry-after": "7"}, Outcome.LATER, 7.0),
        (429, {"retry-after": "99999"}, Outcome.LATER, RETRY_AFTER_S_MAX),
        (429, {"retry-after": "soon"}, Outcome.LATER, None),
        (429, {"retry-after": "-5"}, Outcome.LATER, None),
        (500, {}, Outcome.REFUSED, None),
        (503, {}, Outcome.REFUSED, None),
        (503, {"retry-after": "3"}, Outcome.LATER, 3.0),
    ],
)
def test_answers_are_told_apart(
    receiver: Receiver, status: int, headers: dict[str, str], outcome: Outcome, retry_after_s: float | None
) -> None:
    receiver.answer = lambda _: (status, headers, b"")
    answer = posted(receiver.url)
    assert (answer.outcome, answer.status, answer.retry_after_s) == (outcome, status, retry_after_s)
    assert len(receiver.requests) == 1


def test_retry_after_may_be_a_date(receiver: Receiver) -> None:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=100)
    receiver.answer = lambda _: (429, {"retry-after": format_datetime(at, usegmt=True)}, b"")
    found = posted(receiver.url).retry_after_s
    assert found is not None
    assert 30 < found <= 100


def test_of_an_endless_answer_no_more_than_the_beginning_is_read() -> None:
    sent_bytes = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n")
        try:
            while True:
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent_bytes += 65_536
        except ConnectionError:
            writer.close()
            ended.set()

    async def run() -> Answer:
        server = await asyncio.start_server(endless, "127.0.0.1", 0)
        sender = WebhookSender(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", 20.0, True)
        answer = await sender.post(b"{}", {})
        await sender.close()
        await ended.wait()
        server.close()
        return answer

    ended = asyncio.Event()
    assert asyncio.run(run()).outcome is Outcome.ACCEPTED
    assert sent_bytes < 100 * ANSWER_BYTES_MAX  # what the system's own buffers took


def test_receiver_that_never_answers_is_waited_for_only_so_long() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    async def run() -> Answer:
        server = await asyncio.start_server(silent, "127.0.0.1", 0)
        sender = WebhookSender(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", 0.2, True)
        answer = await sender.post(b"{}", {})
        await sender.close()
        await ended.wait()
        server.close()
        return answer

    ended = asyncio.Event()
    assert asyncio.run(run()) == Answer(Outcome.UNREACHABLE, None, "no answer within 0.2 s")


def test_receiver_that_is_down_is_unreachable() -> None:
    with receiving() as receiver:
        url = receiver.url
    assert posted(url) == Answer(Outcome.UNREACHABLE, None, "no connection")


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of partner.test, by itself."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "partner.test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("partner.test"), x509.IPAddress(ipaddress.ip_address("::1"))])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, private


@pytest.fixture(scope="module")
def tls_port(certificate: tuple[Path, Path]) -> Iterator[int]:
    receiver = Receiver(0)
    with serving(receiver, lifespan="off", ssl_certfile=certificate[0], ssl_keyfile=certificate[1]) as port:
        yield port


def test_tls_is_that_of_the_name_also_when_the_address_is_connected_to(
    tls_port: int, certificate: tuple[Path, Path]
) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    url = f"https://partner.test:{tls_port}/"
    assert posted(url, resolve=resolving("127.0.0.1"), tls=trusting).outcome is Outcome.ACCEPTED


def test_certificate_of_another_name_or_of_nobody_known_is_refused(
    tls_port: int, certificate: tuple[Path, Path]
) -> None:
    trusting = ssl.create_default_context(cafile=certificate[0])
    other = posted(f"https://other.test:{tls_port}/", resolve=resolving("127.0.0.1"), tls=trusting)
    assert other == Answer(Outcome.UNREACHABLE, None, "TLS failed")
    unknown = posted(f"https://partner.test:{tls_port}/", resolve=resolving("127.0.0.1"))
    assert unknown == Answer(Outcome.UNREACHABLE, None, "TLS failed")
