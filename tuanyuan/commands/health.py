"""`tuanyuan health`: is the flow alive and keeping up? For health checks of containers and supervisors."""

from __future__ import annotations

from typing import Annotated

import orjson
import typer

from flows.metrics import read_stats
from tuanyuan.connection import ValkeyOption, VarOption, server
from tuanyuan.console import EXIT_FAILED, console

EPILOG = """
Example:

    tuanyuan health --valkey redis://valkey:6379 && echo fine
"""


def health(
    lag_max: Annotated[float, typer.Option(min=0, help="Seconds that a shard may lag behind its log.")] = 60.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    valkey: ValkeyOption = None,
    var: VarOption = None,
) -> None:
    """Exit with 0 if a flow process runs and no shard lags too far behind its log, else with 1."""
    with server(valkey, var) as client:
        stats = read_stats(client)
    lag_s = stats.largest("lag_ms") / 1000
    healthy = stats.process_count > 0 and lag_s <= lag_max
    if json:
        console.out(
            orjson.dumps(
                {"healthy": healthy, "flow_processes": stats.process_count, "lag_s": round(lag_s, 3)}
            ).decode(),
            highlight=False,
        )
    else:
        console.out(f"flow processes: {stats.process_count}; largest lag: {lag_s:.1f} s", highlight=False)
    if not healthy:
        raise typer.Exit(EXIT_FAILED)
