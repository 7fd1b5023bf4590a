"""`docs/asyncapi.yaml` against what the program really writes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
import pytest
import redis
import yaml
from jsonschema import Draft7Validator

from flows.dead_letters import Corpse, bury, dead_key
from flows.log import LogWriter, format_id, log_key, push_key
from flows.server import LinkOpener
from flows.wire import decode_pings, encode_pings, encode_push
from gateway.handover import GROUP
from geoindex.columns import ID_BYTES_MAX, Push, pack_ids
from geoindex.entries import FORMAT_VERSION, KINDS, RING_KM_MAX, Settings
from tests.flows.test_wire import pings
from tests.gateway.conftest import client as client
from tests.gateway.conftest import open_link as open_link
from tests.gateway.conftest import server as server
from tests.gateway.conftest import session_server as session_server
from tests.gateway.conftest import settings as settings
from tests.gateway.queues import put

DOCUMENT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs/asyncapi.yaml").read_text())
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
DTYPES = {"i64": "<i8", "i32": "<i4", "u32": "<u4", "u16": "<u2", "u8": "<u1"}


def pointed(pointer: str) -> Any:
    assert pointer.startswith("#/"), f"references stay inside: {pointer}"
    found: Any = DOCUMENT
    for part in pointer[2:].split("/"):
        found = found[part]
    return found


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def fits(name: str, value: Any) -> None:
    Draft7Validator(SCHEMAS[name]).validate(value)


def binaries(name: str) -> set[str]:
    return {key for key, schema in SCHEMAS[name]["properties"].items() if schema.get("x-msgpack-type") == "bin"}


def entries(client: redis.Redis, stream: str) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in cast(Any, client.xrange(stream))]


# --- the document -----------------------------------------------------------------------------------------------------


def test_every_reference_leads_somewhere_and_every_part_is_used() -> None:
    found = set(references(DOCUMENT))
    for pointer in found:
        assert pointed(pointer)
    for kind in ("messages", "schemas", "parameters", "securitySchemes"):
        for name in DOCUMENT["components"][kind]:
            assert f"#/components/{kind}/{name}" in found


def test_operations_send_and_receive_messages_of_their_channels() -> None:
    assert DOCUMENT["asyncapi"] == "3.0.0"
    for operation in DOCUMENT["operations"].values():
        assert operation["action"] in ("send", "receive")
        channel = operation["channel"]["$ref"]
        assert set(pointed(channel)) >= {"address", "messages", "parameters"}
        for message in operation["messages"]:
            assert message["$ref"].startswith(f"{channel}/messages/")


def test_addresses_are_the_keys_that_the_program_uses() -> None:
    values = {"shard": "3", "partner": "amap"}
    keys = {"log": log_key(3), "push": push_key(3, "amap"), "dead": dead_key(3, "amap")}
    for name, channel in DOCUMENT["channels"].items():
        parameter = re.compile(r"\{(\w+)\}")
        assert set(parameter.findall(channel["address"])) == set(channel["parameters"])
        assert parameter.sub(lambda found: values[found[1]], channel["address"]) == keys[name]
    assert set(keys) == set(DOCUMENT["channels"])


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_schemas_are_json_schemas(name: str) -> None:
    Draft7Validator.check_schema(SCHEMAS[name])


def test_examples_fit_their_schemas() -> None:
    shown = 0
    for message in DOCUMENT["components"]["messages"].values():
        for example in message.get("examples", []):
            Draft7Validator(pointed(message["payload"]["$ref"])).validate(example["payload"])
            shown += 1
    assert shown


def test_bounds_and_words_are_those_of_the_program() -> None:
    push = SCHEMAS["push"]["properties"]
    assert tuple(push["kind"]["enum"]) == KINDS
    assert push["ring_km"]["maximum"] == RING_KM_MAX
    assert push["device_ids"]["maxItems"] == Settings().push_ids_max
    assert (
        push["device_ids"]["items"]["maxLength"] == SCHEMAS["pings"]["properties"]["width"]["maximum"] == ID_BYTES_MAX
    )
    assert SCHEMAS["pings"]["properties"]["v"]["const"] == FORMAT_VERSION
    assert f"`{GROUP}`" in DOCUMENT["channels"]["push"]["description"]


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [["phone-1", "phone-2"], ["a", "phone-2"], []])
@pytest.mark.parametrize("with_at", [False, True])
def test_ping_batch_has_the_fields_and_columns_that_are_described(ids: list[str], with_at: bool) -> None:
    batch = pings(ids, with_at=with_at)
    payload = encode_pings(batch)
    fields = msgpack.unpackb(payload)
    assert {name for name, value in fields.items() if isinstance(value, bytes)} == binaries("pings")
    fits("pings", fields)
    assert list(fields) == SCHEMAS["pings"]["required"]
    at = 0
    decoded = decode_pings(payload)
    for column in SCHEMAS["pings"]["properties"]["columns"]["x-columns"]:
        there = {"at": fields["at"], "not width": fields["width"] is None, None: True}[column.get("only-if")]
        if not there:
            continue
        dtype = np.dtype(DTYPES[column["dtype"]])
        count = len(fields["columns"]) - at if column["name"] == "id_bytes" else fields["n"]
        values = np.frombuffer(fields["columns"], dtype, count, at)
        assert np.array_equal(values, getattr(decoded, column["name"])), column["name"]
        assert np.array_equal(values, getattr(batch, column["name"])), column["name"]
        at += count * dtype.itemsize
    assert at == len(fields["columns"])


@pytest.mark.parametrize("kind", KINDS)
def test_push_has_the_fields_that_are_described(kind: str) -> None:
    id_bytes, id_end = pack_ids(["phone-1", "手机"])
    fields = msgpack.unpackb(encode_push(Push(0, "寻找-17", 3, kind, 500.0, 1_764_000_000_000, id_bytes, id_end)))
    fits("push", fields)
    assert list(fields) == SCHEMAS["push"]["required"]


def test_stream_entries_have_the_fields_that_are_described(
    client: redis.Redis, open_link: LinkOpener, settings: Settings
) -> None:
    LogWriter(open_link, settings).append_pings(pings(["phone-1", "phone-2"]))
    kinds = {name for shard in (0, 1) for fields in entries(client, log_key(shard)) for name in fields}
    assert kinds == {b"settings", DOCUMENT["components"]["messages"]["pings"]["name"].encode()}

    entry_id = put(client, 1, 7, ["a"])
    (fields,) = entries(client, push_key(1, "amap"))
    (kind,) = fields
    assert kind.decode() in SCHEMAS["push"]["properties"]["kind"]["enum"]
    fits("push", msgpack.unpackb(fields[kind]))

    client.xgroup_create(push_key(1, "amap"), GROUP, id="0")
    client.xreadgroup(GROUP, "one", {push_key(1, "amap"): ">"})
    assert bury(client, Corpse(push_key(1, "amap"), format_id(entry_id), GROUP, 5, "in vain"))
    (letter,) = entries(client, dead_key(1, "amap"))
    named = {name.decode(): value for name, value in letter.items()}
    fits(
        "deadLetter", {key: value if key in binaries("deadLetter") else value.decode() for key, value in named.items()}
    )
    assert dict(msgpack.unpackb(named["entry"])) == fields
