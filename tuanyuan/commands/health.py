"""`tuanyuan health`: is the flow alive, keeping up, and free of alarms? For health checks and supervisors."""

from __future__ import annotations

from typing import Annotated, Any

import orjson
import redis
import typer

from flows.alarms import Alarm
from flows.metrics import Stats, read_stats
from tuanyuan.connection import NoServer, ValkeyOption, VarOption, find_server
from tuanyuan.console import EXIT_FAILED, console, fail

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
    """Exit with 0 if a flow process runs, no shard lags too far behind its log and no alarm is on, else with 1."""
    try:
        with find_server(valkey, var) as client:
            stats = read_stats(client)
        alarms = sorted(set(stats.alarms))
    except (NoServer, redis.RedisError) as problem:
        if isinstance(problem, NoServer) and not json:
            fail(str(problem))
        # Nobody can say anything through a server that does not answer.
        stats, alarms = Stats(), [Alarm("server_down", "", f"no answer: {problem}")]
    lag_s = stats.largest("lag_ms") / 1000
    unsafe = stats.largest("unsafe_server") > 0
    healthy = stats.process_count > 0 and lag_s <= lag_max and not alarms
    if json:
        view: dict[str, Any] = {
            "healthy": healthy,
            "flow_processes": stats.process_count,
            "lag_s": round(lag_s, 3),
            "unsafe_server": unsafe,
            "alarms": [alarm._asdict() for alarm in alarms],
        }
        console.out(orjson.dumps(view).decode(), highlight=False)
    else:
        console.out(f"flow processes: {stats.process_count}; largest lag: {lag_s:.1f} s", highlight=False)
        if unsafe:
            console.out("the server may lose what it acknowledged (--unsafe-server)", highlight=False)
        for kind, source, words in alarms:
            console.out(f"alarm {kind}{f' ({source})' if source else ''}: {words}", highlight=False)
    if not healthy:
        raise typer.Exit(EXIT_FAILED)
