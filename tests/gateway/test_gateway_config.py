"""Settings of a gateway: defaults that are safe, and words for what does not fit."""

from __future__ import annotations

from ipaddress import ip_network
from pathlib import Path

import pytest

from gateway.config import GatewayConfig


def test_without_settings_it_listens_on_the_loopback_and_reaches_no_private_address() -> None:
    config = GatewayConfig.read({})
    assert (config.host, config.port, config.base_url) == ("127.0.0.1", 8080, "http://127.0.0.1:8080")
    assert not config.webhook_private_addresses
    assert config.proxy_networks == ()
    assert config.details_days == 30


def test_the_environment_is_read_and_options_win() -> None:
    environment = {
        "TUANYUAN_VALKEY": "redis://h:1",
        "TUANYUAN_GATEWAY_PORT": "9000",
        "TUANYUAN_GATEWAY_DETAILS_DAYS": "7.5",
        "TUANYUAN_GATEWAY_WEBHOOK_PRIVATE_ADDRESSES": "yes",
        "TUANYUAN_GATEWAY_SECRET_FILE": "/etc/tuanyuan.key",
        "TUANYUAN_PORT": "1",
    }
    config = GatewayConfig.read(environment, port=9001, host=None)
    assert (config.valkey, config.port, config.host) == ("redis://h:1", 9001, "127.0.0.1")
    assert (config.details_days, config.webhook_private_addresses) == (7.5, True)
    assert config.secret_path == Path("/etc/tuanyuan.key")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TUANYUAN_GATEWAY_PORT": "many"}, "TUANYUAN_GATEWAY_PORT: must be a whole number, got 'many'"),
        ({"TUANYUAN_GATEWAY_BURST_S": "x"}, "TUANYUAN_GATEWAY_BURST_S: must be a number, got 'x'"),
        ({"TUANYUAN_UNSAFE_SERVER": "maybe"}, "TUANYUAN_UNSAFE_SERVER: must be yes or no"),
        ({"TUANYUAN_GATEWAY_PORT": "70000"}, "port must be from 0 to 65535, got 70000"),
        ({"TUANYUAN_GATEWAY_REQUESTS_PER_S": "nan"}, "requests_per_s must be from"),
        ({"TUANYUAN_GATEWAY_TRUSTED_PROXIES": "10.0.0.1/8"}, "trusted_proxies must be networks"),
        ({"TUANYUAN_GATEWAY_PUBLIC_URL": "ftp://x"}, "public_url must be like https://"),
        ({"TUANYUAN_GATEWAY_TLS_KEY": "k.pem"}, "go together"),
        ({"TUANYUAN_GATEWAY_CAP_CERTIFICATES": "/no/such"}, "cap_certificates must be a folder, got '/no/such'"),
        ({"TUANYUAN_VALKEY": "http://x"}, "a server's url must begin with"),
    ],
)
def test_what_does_not_fit_is_named(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GatewayConfig.read(environment)


def test_certificate_and_key_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "c.pem").touch()
    with pytest.raises(ValueError, match="tls_key must be a file"):
        GatewayConfig(tls_certificate=tmp_path / "c.pem", tls_key=tmp_path / "k.pem")


def test_a_shown_configuration_has_no_password() -> None:
    assert "hunter2" not in repr(GatewayConfig(valkey="redis://user:hunter2@h:1"))


def test_proxies_are_networks_of_both_kinds() -> None:
    config = GatewayConfig(trusted_proxies="10.0.0.0/8, ::1/128")
    assert config.proxy_networks == (ip_network("10.0.0.0/8"), ip_network("::1/128"))
