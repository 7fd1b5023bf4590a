"""`tuanyuan serve`: the gateway."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from tuanyuan.connection import (
    SecretFileOption,
    ValkeyOption,
    VarOption,
    read_gateway_config,
    server,
    settings_of,
)
from tuanyuan.console import EXIT_USAGE, fail, note

EPILOG = """
Examples:

    tuanyuan serve                                  beside `tuanyuan run`, on http://127.0.0.1:8080

    tuanyuan serve --host 0.0.0.0 --port 8443 --tls-certificate chain.pem --tls-key key.pem

    tuanyuan serve --trusted-proxies 10.0.0.0/8 --public-url https://alerts.example.org

Every setting is also an environment variable: TUANYUAN_GATEWAY_ and its name (gateway/config.py lists them). Any number
of gateways may run on one server; those on other machines need the same key file. Log lines are JSON, on stderr.
Ctrl-C or SIGTERM ends cleanly: what is under way is answered. A second one ends at once.
"""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on. Default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="0: a free one. Default: 8080.")] = None,
    public_url: Annotated[str | None, typer.Option(help="How the world reaches it: what alert pages link to.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM, the whole chain; with --tls-key: HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM.")] = None,
    trusted_proxies: Annotated[
        str | None, typer.Option(help="Networks of proxies whose X-Forwarded-For is believed: 10.0.0.0/8,::1/128.")
    ] = None,
    valkey: ValkeyOption = None,
    var: VarOption = None,
    secret_file: SecretFileOption = None,
    unsafe_server: Annotated[
        bool | None, typer.Option("--unsafe-server", help="Go on with a server that may lose what it acknowledged.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for every request.")] = False,
) -> None:
    """Run a gateway: partners' pings and pushes, the alert desk, public pages and feeds, over HTTP."""
    # Here, so that no other command waits for FastAPI.
    from flows.malloc import keep_freed_memory
    from gateway.app import create_app
    from gateway.serving import GatewayServer, listen

    config = read_gateway_config(
        host=host,
        port=port,
        public_url=public_url,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        trusted_proxies=trusted_proxies,
        valkey=valkey,
        var=var,
        secret_file=secret_file,
        unsafe_server=unsafe_server,
    )
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(server(config.valkey, config.var))
        settings_of(client)
        try:
            app = create_app(config, client)
        except (ValueError, OSError) as problem:
            fail(f"the gateway does not start: {problem}", EXIT_USAGE)
        try:
            listening = stack.enter_context(listen(config))
        except OSError as problem:
            fail(f"cannot listen on {config.host}:{config.port}: {problem.strerror or problem}")
        _log_as_json(quiet)
        address, bound_port = listening.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        scheme = "http" if config.tls_certificate is None else "https"

        def ready() -> None:
            gc.freeze()  # as `tuanyuan run` does: a full collection stops everything for 70 ms and more
            note(f"gateway: {scheme}://{shown}:{bound_port}")
            note("ready; Ctrl-C stops")

        gateway_server = GatewayServer(app, config, ready)

        def stop(_signal: int, _frame: FrameType | None) -> None:
            note("stopping: what is under way is answered ...")
            gateway_server.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        gateway_server.run([listening])
        if not gateway_server.started:
            fail("the gateway did not start; the line above says why")
    note("stopped cleanly")


def _log_as_json(quiet: bool) -> None:
    from gateway.log_json import JsonFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # its lines hold whole urls
    if quiet:
        logging.getLogger("gateway.access").setLevel(logging.WARNING)
