"""The page for partners: its programs run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi import FastAPI

from flows.embedded import EmbeddedServer
from gateway.config import GatewayConfig
from gateway.webhook_settings import new_secret, signed_headers
from tests.flows.waiting import eventually
from tests.gateway.conftest import Keys
from tests.gateway.queues import put
from tests.gateway.receivers import serving

PAGE = (Path(__file__).parents[2] / "docs/partners.md").read_text()
PROGRAM, RECEIVER = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def config(server: EmbeddedServer, tmp_path: Path) -> GatewayConfig:
    return GatewayConfig(valkey=server.url, var=tmp_path / "var", flow_lag_s_max=0)


def test_the_first_program_sends_a_ping_and_prints_the_push(app: FastAPI, keys: Keys, client: redis.Redis) -> None:
    put(client, 0, 7, ["phone-1"])
    with serving(app) as port:
        named = {"TUANYUAN_URL": f"http://127.0.0.1:{port}", "TUANYUAN_KEY": keys.amap}
        program = subprocess.Popen(
            [sys.executable, "-u", "-c", PROGRAM], env=os.environ | named, stdout=subprocess.PIPE, text=True
        )
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "alert a17 phone-1\n"
            put(client, 1, 8, ["phone-1"], kind="resolved")
            assert program.stdout.readline() == "resolved a17 phone-1\n"
            eventually(lambda: client.xpending("push:{s0}:amap", "api")["pending"] == 0, 30)
        finally:
            program.kill()
            program.communicate()


def test_the_receiver_takes_what_is_signed_and_nothing_else() -> None:
    secret = new_secret()
    told: list[Any] = []
    names: dict[str, Any] = {"tell": lambda *push: told.append(push)}
    exec(RECEIVER.replace("whsec_…", secret), names)
    now_ms = time.time() * 1000
    body = b'{"type":"push.alert","timestamp":"2026-01-01T00:00:00Z","data":{"id":"s0:p0:7-1","alert_id":"a17",' + (
        b'"revision":1,"kind":"alert","ring_km":100.0,"at":5,"device_ids":["phone-1"]}}'
    )
    headers = signed_headers([secret], "s0:p0:7-1", body, now_ms)
    assert names["receive"](body, headers) == 204
    assert told == [(("phone-1",), "alert", "a17")]
    assert names["receive"](body + b" ", headers) == 401
    test = b'{"type":"webhook.test","timestamp":"2026-01-01T00:00:00Z","data":{"partner":"amap"}}'
    assert names["receive"](test, signed_headers([secret], "test:0-1", test, now_ms)) == 204
    assert len(told) == 1


def test_endpoints_and_settings_that_the_page_names_exist(app: FastAPI) -> None:
    paths = set(app.openapi()["paths"])
    for path in re.findall(r"/v1/[a-z/-]+[a-z]", PAGE):
        assert path in paths, path
    assert hasattr(GatewayConfig(), "webhook_private_addresses")
