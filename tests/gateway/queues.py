"""Push queues for tests of their ways out: entries as a flow writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import redis

from flows.log import LogId, format_id, push_key
from flows.push_commands import push_id
from flows.wire import encode_push
from geoindex.columns import Push, pack_ids

PARTNERS = ("amap", "baidu")
"""As in the settings of the tests' server."""


def put(
    client: redis.Redis,
    shard: int,
    log_ms: int,
    device_ids: Sequence[str],
    *,
    partner: str = "amap",
    alert_id: str = "a17",
    kind: str = "alert",
    revision: int = 1,
) -> LogId:
    """One push entry, caused by the log entry of that time; its id."""
    id_bytes, id_end = pack_ids(list(device_ids))
    push = Push(PARTNERS.index(partner), alert_id, revision, kind, 100.0, 1_764_000_000_000, id_bytes, id_end)
    entry_id = push_id((log_ms, 0), 1)
    client.xadd(push_key(shard, partner), {kind: encode_push(push)}, id=format_id(entry_id))
    return entry_id


def name(shard: int, entry_id: LogId, partner: str = "amap") -> str:
    """As it travels."""
    return f"s{shard}:p{PARTNERS.index(partner)}:{format_id(entry_id)}"


def devices(pushes: Sequence[dict[str, Any]]) -> list[str]:
    return [device_id for push in pushes for device_id in push["device_ids"]]
