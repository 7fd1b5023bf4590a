"""Which server a command talks to: the one named, or the embedded one that `tuanyuan run` started under `var`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import redis
import typer

from flows.config import FlowConfig
from flows.log import read_settings
from flows.server import EmbeddedServer, connect
from geoindex.entries import Settings
from tuanyuan.console import EXIT_USAGE, fail

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
