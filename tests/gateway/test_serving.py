"""The gateway behind a real socket: TLS, limits on heads, slow clients, a clean end."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import httpx
import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fastapi import FastAPI

from flows import guards
from flows.embedded import EmbeddedServer
from flows.log import ensure_settings
from flows.metrics import Metrics
from flows.server import connect
from gateway import serving
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.runtime import Gateway
from gateway.serving import GatewayServer, listen
from geoindex.entries import Settings
from tests.flows.waiting import eventually

PATIENCE_S = 20.0


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(valkey=server.url, var=tmp_path / "var", port=0)


@contextmanager
def served(app: FastAPI, config: GatewayConfig) -> Iterator[tuple[int, GatewayServer]]:
    """Its port, until the end."""
    ready = threading.Event()
    with listen(config) as listening:
        server = GatewayServer(app, config, ready.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(PATIENCE_S)
            yield listening.getsockname()[1], server
        finally:
            server.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive()


@pytest.fixture
def port(app: FastAPI, config: GatewayConfig) -> Iterator[int]:
    with served(app, config) as (port, _):
        yield port


def answer_to(port: int, *parts: bytes) -> bytes:
    """What comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as link:
        for part in parts:
            link.sendall(part)
        found = b""
        while chunk := link.recv(65_536):
            found += chunk
        return found


def test_it_answers_over_http_1_1(port: int) -> None:
    answer = httpx.get(f"http://127.0.0.1:{port}/readyz")
    assert (answer.status_code, answer.json()["status"], answer.http_version) == (200, "ready", "HTTP/1.1")
    assert "server" not in answer.headers


def test_it_speaks_https_itself(config: GatewayConfig, client: redis.Redis, settings: Settings, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "gateway")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    chain, private = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    config = GatewayConfig(valkey=config.valkey, var=config.var, port=0, tls_certificate=chain, tls_key=private)
    with served(create_app(config, client, Metrics()), config) as (port, _):
        trust = ssl.create_default_context(cafile=str(chain))
        answer = httpx.get(f"https://127.0.0.1:{port}/healthz", verify=trust)
        assert answer.status_code == 200
        assert "strict-transport-security" in answer.headers
        old = ssl.create_default_context(cafile=str(chain))
        old.minimum_version = ssl.TLSVersion.TLSv1_2
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(f"https://127.0.0.1:{port}/healthz", verify=old).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")


@pytest.mark.parametrize(
    "parts",
    [
        (b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: " + b"x" * 40_000 + b"\r\n\r\n",),
        (b"GET /healthz HTTP/1.1\r\nHost: g\r\n", b"".join(b"X%d: y\r\n" % number for number in range(200)) + b"\r\n"),
        (b"GET /" + b"x" * 40_000, b"x" * 10_000),
        (b"GET /healthz HTTP/1.1\r\nX: ", *[b"x" * 1000] * 40),
    ],
    ids=["one long header", "many headers", "a long path", "a header without an end"],
)
def test_a_head_that_is_too_large_is_refused(port: int, parts: tuple[bytes, ...]) -> None:
    assert answer_to(port, *parts).startswith(b"HTTP/1.1 431 ")
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_a_client_that_sends_too_much_reads_why_and_can_go_on(port: int, gateway: Gateway) -> None:
    size = 40 * gateway.config.body_bytes_max
    key = gateway.accounts.add_operator("operator").text.encode()
    head = b"POST /v1/x HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n" % (key, size)
    last = b"GET /healthz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n"
    found = answer_to(port, head, b"x" * size, last)
    assert found.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in found


def test_what_is_no_http_is_refused(port: int) -> None:
    assert answer_to(port, b"\x16\x03\x01 hello\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "begun",
    [b"", b"GET /healthz HTT", b"POST /v1/x HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nabc"],
    ids=["nothing", "half a head", "half a body"],
)
def test_who_sends_a_byte_now_and_then_is_cut_off(
    app: FastAPI, config: GatewayConfig, monkeypatch: pytest.MonkeyPatch, begun: bytes
) -> None:
    monkeypatch.setattr(serving, "READ_TIMEOUT_S", 0.3)
    with served(app, config) as (port, _):
        answer_to(port, begun)  # returns: the gateway has closed the connection


def test_requests_follow_each_other_on_one_connection(port: int) -> None:
    one = b"GET /healthz HTTP/1.1\r\nHost: g\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"
    last = one.replace(b"Host: g", b"Host: g\r\nConnection: close")
    assert answer_to(port, one * 3 + last).count(b"HTTP/1.1 200 OK") == 4  # a head's limit is each one's own


def test_what_is_under_way_is_answered_when_it_ends(app: FastAPI, config: GatewayConfig) -> None:
    begun = threading.Event()
    gateway: Gateway = app.state.gateway

    @app.get("/t/slow")
    def slow() -> dict[str, bool]:
        begun.set()
        return {"told_to_stop": gateway.stopping.wait(PATIENCE_S)}

    with served(app, config) as (port, server):
        answers: list[httpx.Response] = []
        url = f"http://127.0.0.1:{port}/t/slow"
        thread = threading.Thread(target=lambda: answers.append(httpx.get(url, timeout=PATIENCE_S)))
        thread.start()
        assert begun.wait(PATIENCE_S)
        server.stop()
        thread.join(PATIENCE_S)
        assert answers[0].json() == {"told_to_stop": True}


class Counted:
    """A feature's service that notes when it is stopped."""

    def __init__(self, name: str, noted: list[str]) -> None:
        self._name, self._noted = name, noted
        noted.append(f"{name} starts")

    def stop(self) -> None:
        self._noted.append(f"{self._name} stops")
        if self._name == "second":
            raise RuntimeError("cannot end")


def test_features_start_before_the_first_request_and_stop_in_the_opposite_order(
    app: FastAPI, config: GatewayConfig
) -> None:
    noted: list[str] = []

    def starter(name: str) -> Callable[[Gateway], Counted]:
        return lambda gateway: Counted(name, noted)

    class Feature:
        def __init__(self, name: str) -> None:
            self.start = starter(name)

    app.state.features = {name: Feature(name) for name in ("first", "second")}
    gateway: Gateway = app.state.gateway
    with served(app, config):
        assert noted == ["first starts", "second starts"]
        assert isinstance(gateway.service(Counted), Counted)
        was_ready = gateway.ready
    assert noted[2:] == ["second stops", "first stops"]  # one that fails keeps nobody
    assert (was_ready, gateway.ready) == (True, False)
    with pytest.raises(LookupError, match="no Counted was started"):
        gateway.service(Counted)


def test_a_gateway_is_not_ready_while_the_server_may_lose_what_it_acknowledged(
    own_server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "SETTINGS_INTERVAL_S", 0.0)
    config = GatewayConfig(valkey=own_server.url, var=tmp_path / "var", port=0)
    client = connect(own_server.url)
    ensure_settings(client, Settings(shard_count=1))
    client.config_set("appendfsync", "everysec")
    with served(create_app(config, client, Metrics()), config) as (port, _):
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz")
        assert answer.status_code == 503
        assert "appendfsync" in answer.json()["reasons"][0]
        client.config_set("appendfsync", "always")
        eventually(lambda: httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200, PATIENCE_S)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    client.close()
