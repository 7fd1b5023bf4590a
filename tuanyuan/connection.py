"""Which server a command talks to: the one named, or the embedded one that `tuanyuan run` started under `var`."""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import redis
import typer

from flows.config import FlowConfig
from flows.embedded import EmbeddedServer
from flows.log import SettingsMismatch, read_settings
from flows.server import connect
from gateway.accounts import AccountRefused, Accounts
from gateway.audit_log import AuditLog, HeadFile
from gateway.config import GatewayConfig
from gateway.keys import Sealer
from geoindex.entries import Settings
from tuanyuan.console import EXIT_REFUSED, EXIT_USAGE, fail

ValkeyOption = Annotated[
    str | None,
    typer.Option(
        help="Server: redis://host:port, rediss://, unix://path. Default: TUANYUAN_VALKEY, else the embedded one."
    ),
]
VarOption = Annotated[Path | None, typer.Option(help="Folder of the embedded server's data. Default: ./var")]


def read_config(**options: Any) -> FlowConfig:
    """Options and environment; ends the command with a clear error if they do not fit."""
    try:
        return FlowConfig.read(os.environ, **options)
    except ValueError as problem:
        fail(str(problem), EXIT_USAGE)


class NoServer(Exception):
    """No embedded server runs where it was looked for. The message says what to do."""


@contextmanager
def server(valkey: str | None, var: Path | None) -> Iterator[redis.Redis]:
    """A client of the server that is already running; ends the command if there is none."""
    try:
        client = find_server(valkey, var)
    except NoServer as problem:
        fail(str(problem))
    try:
        yield client
    finally:
        client.close()


def find_server(valkey: str | None, var: Path | None) -> redis.Redis:
    """A client of the server that is already running. Raises NoServer."""
    config = read_config(valkey=valkey, var=var)
    if config.valkey is not None:
        return connect(config.valkey)
    embedded = EmbeddedServer.find(config.embedded_directory)
    if embedded is None:
        raise NoServer(
            f"no server runs under {config.embedded_directory}: start one with `tuanyuan run` "
            "(in another terminal), or name one with --valkey"
        )
    return connect(embedded.url)


def settings_of(client: redis.Redis) -> Settings:
    """The settings that the logs begin with; ends the command if there are no logs yet."""
    settings = read_settings(client)
    if settings is None:
        fail("the server has no logs yet: start `tuanyuan run` first")
    return settings


# --- the gateway's accounts -------------------------------------------------------------------------------------------

SecretFileOption = Annotated[
    Path | None,
    typer.Option(
        help="The gateways' key file. Default: TUANYUAN_GATEWAY_SECRET_FILE, else gateway.key under --var; made if new."
    ),
]


@dataclass(frozen=True, slots=True)
class Registry:
    """The accounts of the server that is already running, and the audit log, which every change is written to first."""

    client: redis.Redis
    config: GatewayConfig
    sealer: Sealer
    accounts: Accounts
    audit: AuditLog

    @property
    def actor(self) -> str:
        """Who is at this command line, as the audit log names them."""
        return f"console:{getpass.getuser()}@{socket.gethostname()}"


@contextmanager
def registry(valkey: str | None, var: Path | None, secret_file: Path | None) -> Iterator[Registry]:
    """Accounts and audit log; ends the command if there is no server, or what was asked for is refused."""
    config = read_gateway_config(valkey=valkey, var=var, secret_file=secret_file)
    with server(valkey, var) as client:
        try:
            sealer = Sealer.read(config.secret_path)
        except (ValueError, OSError) as problem:
            fail(f"the gateways' key file: {problem}")
        audit = AuditLog(client, sealer, HeadFile(config.audit_head_path))
        try:
            yield Registry(client, config, sealer, Accounts(client, sealer), audit)
        except (AccountRefused, SettingsMismatch) as refusal:
            fail(str(refusal), EXIT_REFUSED)


def read_gateway_config(**options: Any) -> GatewayConfig:
    """Options and environment; ends the command with a clear error if they do not fit."""
    try:
        return GatewayConfig.read(os.environ, **options)
    except ValueError as problem:
        fail(str(problem), EXIT_USAGE)
