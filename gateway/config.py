"""Every setting of a gateway process. Read once at the entry point, as `flows.config` is for a flow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flows.server import connect, masked_url

_SHARED = {"valkey", "var", "unsafe_server"}
"""Settings that a gateway has in common with a flow: their variables have no GATEWAY in their names."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of a gateway: `GatewayConfig.read(os.environ, what the options said)`.

    Each can be given as an environment variable, `TUANYUAN_GATEWAY_` and its name in capitals (`TUANYUAN_` for valkey,
    var and unsafe_server, which a flow has as well); an option wins.
    """

    # --- the server
    valkey: str | None = None
    """The server's url; None: the embedded one, under `var`."""
    var: Path = Path("var")
    """Embedded server's data; the gateway's key file and the head of the audit log, unless named otherwise."""
    unsafe_server: bool = False
    """Go on with a server that may lose what it acknowledged. Said in every log and metric."""

    # --- where it is found
    host: str = "127.0.0.1"
    """Address to listen on. The loopback only, unless somebody says otherwise."""
    port: int = 8080
    """0: a free one."""
    public_url: str | None = None
    """How the world reaches this gateway, say https://alerts.example.org: what stands in feeds, CAP and alert pages."""
    tls_certificate: Path | None = None
    """PEM, the whole chain. With `tls_key`: the gateway speaks HTTPS itself; without: behind a reverse proxy."""
    tls_key: Path | None = None
    """PEM."""
    trusted_proxies: str = ""
    """Networks, as 10.0.0.0/8,::1/128, of proxies whose X-Forwarded-For is believed. Nobody else's is."""
    secret_file: Path | None = None
    """The gateway's own key, which seals what has to be kept whole, and the audit log. None: gateway.key under `var`.
    All gateways of a deployment need the same one. Made if it is not there."""

    # --- limits
    body_bytes_max: int = 256 << 10
    """Of a request, unless its path has a limit of its own."""
    pings_body_bytes_max: int = 8 << 20
    """Of a body of pings, as it travels."""
    photo_bytes_max: int = 4 << 20
    """Of a picture."""
    requests_per_s: float = 50.0
    """Of one key, in the long run; an account may have another limit."""
    pings_per_s: float = 1_000_000.0
    """Of one partner, in the long run; an account may have another limit."""
    address_requests_per_s: float = 500.0
    """Of one address (IPv6: one /64), whatever its keys."""
    failures_per_s: float = 2.0
    """Requests of one address whose key or signature is refused."""
    flow_lag_s_max: float = 60.0
    """Pings are refused while the flow is further behind its logs; 0: never. Checkpoints are loaded within 15 s."""
    burst_s: float = 4.0
    """Every limit lets through at once what it would in so many seconds."""
    wait_s_max: float = 30.0
    """Longest long poll."""

    # --- keys
    key_grace_h: float = 24.0
    """How long the old key of an account stays valid beside its new one."""

    # --- the desk
    details_days: float = 30.0
    """The child's details are erased so many days after the alert was closed."""
    preview_budget: int = 30
    """Previews of one officer within an hour."""
    cap_certificates: Path | None = None
    """Folder of PEM certificates; CAP messages have to be signed by one of them. None: signatures are not asked for."""
    feed_cache_s: int = 10
    """How long anybody may keep a feed before asking again."""

    # --- webhooks
    webhook_private_addresses: bool = False
    """Let webhooks go to private, loopback and link-local addresses: for a partner inside one's own network. Else they
    could be used to reach what only this machine can reach."""
    webhook_timeout_s: float = 10.0
    """For an answer."""

    def __post_init__(self) -> None:
        if self.valkey is not None:
            connect(self.valkey).close()  # opens no connection: only the url is looked at
        for name, value, least, most in (
            ("port", self.port, 0, 65_535),
            ("body_bytes_max", self.body_bytes_max, 1 << 10, 64 << 20),
            ("pings_body_bytes_max", self.pings_body_bytes_max, 1 << 10, 256 << 20),
            ("photo_bytes_max", self.photo_bytes_max, 1 << 10, 64 << 20),
            ("requests_per_s", self.requests_per_s, 0.01, 1e6),
            ("pings_per_s", self.pings_per_s, 1, 1e9),
            ("address_requests_per_s", self.address_requests_per_s, 0.01, 1e6),
            ("failures_per_s", self.failures_per_s, 0.01, 1e6),
            ("flow_lag_s_max", self.flow_lag_s_max, 0, 86_400),
            ("burst_s", self.burst_s, 1, 3_600),
            ("wait_s_max", self.wait_s_max, 0, 300),
            ("key_grace_h", self.key_grace_h, 0, 24 * 90),
            ("details_days", self.details_days, 0, 3_650),
            ("preview_budget", self.preview_budget, 1, 10_000),
            ("feed_cache_s", self.feed_cache_s, 0, 3_600),
            ("webhook_timeout_s", self.webhook_timeout_s, 0.1, 60),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, got {value}")
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: one of them is missing")
        for name, file in (("tls_certificate", self.tls_certificate), ("tls_key", self.tls_key)):
            if file is not None and not file.is_file():
                raise ValueError(f"{name} must be a file, got {str(file)!r}")
        if self.cap_certificates is not None and not self.cap_certificates.is_dir():
            raise ValueError(f"cap_certificates must be a folder, got {str(self.cap_certificates)!r}")
        if self.public_url is not None:
            parts = urlsplit(self.public_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
                raise ValueError(f"public_url must be like https://alerts.example.org, got {self.public_url!r}")
        _ = self.proxy_networks  # raises ValueError

    def __repr__(self) -> str:
        """Fit for a log line: without the password."""
        shown = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.valkey is not None:
            shown["valkey"] = masked_url(self.valkey)
        return f"GatewayConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    @property
    def embedded_directory(self) -> Path:
        return self.var / "valkey"

    @property
    def secret_path(self) -> Path:
        return self.secret_file or self.var / "gateway.key"

    @property
    def audit_head_path(self) -> Path:
        """Where the head of the audit log is kept besides the server: `gateway.audit_log`."""
        return self.var / "audit-log.head"

    @property
    def base_url(self) -> str:
        """What urls of alerts begin with; no slash at the end."""
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        scheme = "http" if self.tls_certificate is None else "https"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}://{host}:{self.port}"

    @property
    def proxy_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        try:
            return tuple(ip_network(text.strip()) for text in self.trusted_proxies.split(",") if text.strip())
        except ValueError as error:
            raise ValueError(f"trusted_proxies must be networks like 10.0.0.0/8,::1/128: {error}") from None

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, **options: Any) -> GatewayConfig:
        """From the environment and from options; an option that is None was not given.

        Raises ValueError naming the variable, what it must be and what it was.
        """
        values: dict[str, Any] = {}
        for field in fields(cls):
            prefix = "TUANYUAN_" if field.name in _SHARED else "TUANYUAN_GATEWAY_"
            name = f"{prefix}{field.name.upper()}"
            text = environment.get(name)
            if text:
                try:
                    values[field.name] = _parsed(str(field.type), text)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        values.update((name, value) for name, value in options.items() if value is not None)
        return cls(**values)


def _parsed(kind: str, text: str) -> object:
    """`kind`: the field's type, as it is written above."""
    if kind == "bool":
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ValueError(f"must be yes or no, got {text!r}")
    if kind == "int":
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"must be a whole number, got {text!r}") from None
    if kind == "float":
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"must be a number, got {text!r}") from None
    return Path(text) if kind.startswith("Path") else text
