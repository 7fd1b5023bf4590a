"""The live flow as a Bytewax cluster, for those who want its scheduler: one shard's source, machine and sink may then
be in different processes.

    export TUANYUAN_VALKEY=redis://10.0.0.5:6379 TUANYUAN_VAR=/shared/tuanyuan
    python -m bytewax.run "tuanyuan.cluster:flow()" -i 0 -a "127.0.0.1:2101;127.0.0.1:2102"
    python -m bytewax.run "tuanyuan.cluster:flow()" -i 1 -a "127.0.0.1:2101;127.0.0.1:2102"

All processes need the same `var`, where checkpoints are; SIGTERM to each ends the cluster cleanly. The cluster's port
speaks pickle without asking who calls: loopback or a private network only. After a kill, what is replayed from the
last checkpoint is not held back by the limit on entries in flight: memory for it must be there. Independent processes
(`tuanyuan run --shards 0-3`) are faster, and one that dies stops no other.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import sys

from bytewax.dataflow import Dataflow

from tuanyuan import kernel_cache


def flow() -> Dataflow:
    """The dataflow, with its threads running. Settings come from the environment (`flows.config`), logs must exist."""
    kernel_cache.use()  # before anything of geoindex is imported
    from flows.config import FlowConfig
    from flows.live import open_flow
    from flows.log import read_settings
    from flows.server import connect

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = FlowConfig.read(os.environ)
    if config.valkey is None:
        raise SystemExit("a cluster needs a server of its own: set TUANYUAN_VALKEY")
    client = connect(config.valkey)
    settings = read_settings(client)
    if settings is None:
        raise SystemExit("there are no logs yet; run `tuanyuan run` once")
    live = open_flow(config, client, settings, in_cluster=True)
    signal.signal(signal.SIGTERM, lambda _number, _frame: live.stop())

    def end() -> None:
        # Bytewax does not say when it has ended; only whoever was asked to stop has processed all of its entries.
        try:
            if live.stopping:
                live.finish()
        finally:
            live.end()

    atexit.register(end)
    live.start()
    return live.dataflow()
