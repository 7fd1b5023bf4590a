"""A system on this machine, from nothing: Valkey, flow and gateway as processes, accounts, a folder of its own.

    with LocalSystem(folder) as system:          # ended by pid, whatever happens inside
        system.deployment                        # what a run goes against

The logs keep everything and so do the queues, so that the audit at the end sees the run from its first ping on.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import psutil

from flows.embedded import EmbeddedServer
from flows.log import read_settings
from flows.metrics import read_stats
from flows.server import connect
from gateway.accounts import Accounts, Datum
from gateway.config import GatewayConfig
from gateway.keys import Sealer
from loadtest.life import DEFAULT_LIFE_PARTNERS
from loadtest.load.deployment import Deployment

SHARD_COUNT = 8
DATUMS = {partner.name: cast(Datum, partner.datum) for partner in DEFAULT_LIFE_PARTNERS}
"""What the coordinates of each partner mean."""
START_TIMEOUT_S = 90.0
END_TIMEOUT_S = 60.0
SAID_CHARS = 2000
MINISTRY = "000000"
"""Division of whoever may publish everywhere (GB/T 2260)."""
MEMORY_SHARE = 0.4
"""Of the machine's memory that the server may use."""
ENVIRONMENT = {
    "TUANYUAN_GATEWAY_ADDRESS_REQUESTS_PER_S": "1000000",
    "TUANYUAN_GATEWAY_REQUESTS_PER_S": "100000",
}
Say = Callable[[str], None]


class LocalSystem:
    """Started when entered."""

    def __init__(self, folder: Path, keeps_all: bool = True, say: Say = lambda _: None) -> None:
        """`keeps_all`: logs and queues whole, for an audit from the beginning; False for hours of soaking."""
        self.folder, self._keeps_all, self._say = folder, keeps_all, say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._server: EmbeddedServer | None = None
        self._lock = threading.Lock()
        self._port = 0
        self.deployment = Deployment("http://127.0.0.1:0", {"none": ""})
        self.path = folder / "deployment.json"

    def __enter__(self) -> LocalSystem:
        try:
            self._server = EmbeddedServer.start(
                self.folder / "valkey",
                port=None,
                memory_bytes_max=round(psutil.virtual_memory().total * MEMORY_SHARE),
                on_wait=self._say,
            )
            self.start_flow()  # which begins the logs: without them a gateway refuses to start
            self.start_gateway()
            self._make_accounts()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process that was started here."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self._processes.values():
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._server is not None:
            self._server.close()
            self._server = None

    # ---- processes

    @property
    def server(self) -> EmbeddedServer:
        assert self._server is not None, "entered"
        return self._server

    def start_flow(self) -> None:
        """And wait until it works."""
        self._launch_flow()
        self._await_flow()

    def start_gateway(self) -> None:
        """On the port that it had before, if it had one; and wait until it works."""
        self._launch_gateway()
        self._await_gateway()

    def _launch_flow(self) -> None:
        keep = {"TUANYUAN_TRIM_LOGS": "no", "TUANYUAN_KEEP_PUSHES": "yes"} if self._keeps_all else {}
        self._start("flow", "run", "--shard-count", str(SHARD_COUNT), environment=keep)

    def _await_flow(self) -> None:
        self._wait("flow", lambda: "ready;" in self.said("flow") and self._has_logs())

    def _has_logs(self) -> bool:
        client = connect(self.server.url)
        try:
            return read_settings(client) is not None and read_stats(client).process_count > 0
        finally:
            client.close()

    def _launch_gateway(self) -> None:
        self._start("gateway", "serve", "--port", str(self._port), environment=ENVIRONMENT)

    def _await_gateway(self) -> None:
        self._wait("gateway", lambda: "ready;" in self.said("gateway"))
        found = re.findall(r"gateway: http://[^\s:]+:(\d+)", self.said("gateway"))
        self._port = int(found[-1])

    def _start(self, role: str, *command: str, environment: dict[str, str]) -> None:
        where = ["--valkey", self.server.url, "--var", str(self.folder), "--quiet"]
        with self._log(role).open("wb") as log:
            self._processes[role] = subprocess.Popen(
                [sys.executable, "-m", "tuanyuan.cli", *command, *where],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **environment},
            )

    def _log(self, role: str) -> Path:
        return self.folder / f"{role}.log"

    def said(self, role: str) -> str:
        """What a process has written since it was last started."""
        return self._log(role).read_text(errors="replace") if self._log(role).exists() else ""

    def _wait(self, role: str, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not holds():
            code = self._processes[role].poll()
            if code is not None or time.monotonic() > deadline_s:
                ended = f"ended with {code}" if code is not None else f"not there after {START_TIMEOUT_S:.0f} s"
                raise RuntimeError(f"the {role} has not started: {ended}: {self.said(role)[-SAID_CHARS:]}")
            time.sleep(0.05)

    def ended(self) -> str | None:
        """Which process has ended by itself, and its last words."""
        with self._lock:
            for role, process in self._processes.items():
                if process.poll() is not None:
                    return f"the {role} has ended with {process.returncode}: {self.said(role)[-SAID_CHARS:]}"
        return None

    # ---- accounts

    def _make_accounts(self) -> None:
        keys = make_accounts(self.server.url, self.folder, DATUMS)
        self.deployment = Deployment(
            f"http://127.0.0.1:{self._port}",
            valkey=self.server.url,
            var=str(self.folder),
            pids=self._pids(),
            is_local=True,
            **keys,
        )
        self.deployment.write(self.path)

    def _pids(self) -> dict[str, int]:
        return {role: process.pid for role, process in self._processes.items()} | {"valkey": self.server.pid}

    def _tell_pids(self) -> None:
        fields = self.deployment.to_json() | {"pids": self._pids()}
        self.deployment = Deployment.from_json(fields)
        self.deployment.write(self.path)

    # ---- faults

    def kill(self, role: str) -> float:
        """SIGKILL one of them, and start it again; how many seconds until it works."""
        started_s = time.monotonic()
        with self._lock:
            if role == "valkey":
                self._kill_server()
            else:
                process = self._processes[role]
                process.send_signal(signal.SIGKILL)
                process.wait()
                self.start_flow() if role == "flow" else self.start_gateway()
            self._tell_pids()
        return time.monotonic() - started_s

    def _kill_server(self) -> None:
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.close()
        self._server = EmbeddedServer.start(
            self.folder / "valkey",
            port=None,
            memory_bytes_max=round(psutil.virtual_memory().total * MEMORY_SHARE),
        )


def make_accounts(valkey: str, var: Path, partners: Mapping[str, Datum]) -> dict[str, Any]:
    """Partners without limits of their own, an officer of the Ministry and an operator; their keys.

    Raises gateway.accounts.AccountRefused: say, there is one of that name already.
    """
    client = connect(valkey)
    try:
        accounts = Accounts(client, Sealer.read(GatewayConfig(var=var).secret_path))
        return {
            "partners": {
                name: accounts.add_partner(name, datum=datum, pings_per_s=1e9, requests_per_s=1e6).text
                for name, datum in partners.items()
            },
            "officer": accounts.add_officer("load test", MINISTRY, "ministry", requests_per_s=1e6).text,
            "operator": accounts.add_operator("load test").text,
            "datums": {name: datum for name, datum in partners.items() if datum != "wgs84"},
        }
    finally:
        client.close()
